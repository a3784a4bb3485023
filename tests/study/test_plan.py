"""Settings, graph and plan: everything that is known before anything is run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from equipoise.core.errors import StageError, UsageError
from equipoise.core.files import file_fingerprint, write_jsonl
from equipoise.evaluation import power
from equipoise.study._cost import forward_flops, parameters_of, train_flops
from equipoise.study._graph import build_graph
from equipoise.study._lock import write_lock
from equipoise.study._prompts import study_prompts
from equipoise.study._sizes import detectable_differences
from equipoise.study.plan import check_budget, plan_study
from equipoise.study.settings import StudySettings, bundled, load_study
from equipoise.training.machine import Machine

from .conftest import words

MACHINE = Machine("cpu", float32=1e9, bfloat16=2e9)


def make(values, *overrides):
    return StudySettings.make(values, overrides)


# ---- the judge and the token credit


def test_an_implicit_judge_needs_two_finished_models(values):
    pair = ("judge.scorer=implicit", "judge.base_model_name_or_path=base")
    with pytest.raises(UsageError, match="no `data` to train on"):
        make(values, *pair)
    with pytest.raises(UsageError, match="give `base_model_name_or_path`"):
        make(values, "judge.scorer=implicit", "judge.data=[]")
    with pytest.raises(UsageError, match="belongs to `scorer: implicit`"):
        make(values, "judge.base_model_name_or_path=base")
    study = make(values, *pair, "judge.data=[]")
    other = make(values, "judge.scorer=implicit", "judge.base_model_name_or_path=other", "judge.data=[]")
    (held_out,), (held_out_other,) = build_graph(study).judge, build_graph(other).judge
    assert held_out.kind == "held_out"
    assert held_out.key != held_out_other.key


def test_token_credit_changes_only_the_scores_it_is_part_of(values):
    """Of trained arms with the first seed; its time is in the plan."""
    on, off = (make(values, "seeds=[0,1]", f"evaluation.token_credit={count}") for count in (2, 0))
    keys = [{(arm.name, arm.seed): arm.score.key for arm in build_graph(study).arms} for study in (on, off)]
    changed = {name for name in keys[0] if keys[0][name] != keys[1][name]}
    assert changed == {("sft", 0), ("dpo", 0), ("sft_dpo", 0)}
    plans = [plan_study(study, machine=MACHINE) for study in (on, off)]
    dpo = next(arm for arm in plans[0].graph.arms if (arm.name, arm.seed) == ("dpo", 0))
    without = next(arm for arm in plans[1].graph.arms if (arm.name, arm.seed) == ("dpo", 0))
    more, less = plans[0].seconds(dpo.score), plans[1].seconds(without.score)
    assert more > less > 0


# ---- bundled studies


def test_the_bundled_studies_are_found_by_either_spelling():
    assert {"quickstart", "opt350m", "hh-smollm2"} <= set(bundled())
    assert load_study("hh-smollm2") == load_study("hh_smollm2")


@pytest.mark.parametrize("name", bundled())
def test_every_bundled_study_plans_with_nothing_at_hand(name, tmp_path, monkeypatch):
    """Without the models, the data folder or a network: estimates where the study gives them, notes where it does not."""
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    study = load_study(name)
    plan = plan_study(study, machine=MACHINE)
    assert {row.node.kind for row in plan.stages} >= {"train", "generate", "score"}
    assert set(plan.spent) == {arm for arm, stages in study.arms.items() if stages}
    assert plan.warnings


def test_opt350m_is_the_papers_recipe():
    """The table of the training section: lr 2e-5, batch 2 × 4, 2 epochs of all-token SFT on all weights, 1 of LoRA DPO."""
    study = load_study("opt350m")
    graph = build_graph(study)
    sft, dpo, after = (next(arm for arm in graph.arms if arm.name == name).training[-1] for name in ("sft", "dpo", "sft_dpo"))
    assert sft.training["num_train_epochs"] == 2
    assert sft.training["tokenise"]["learn"] == "all"
    assert "use_peft" not in sft.training
    for node in (dpo, after):
        assert (node.training["lora_r"], node.training["lora_alpha"], node.training["lora_dropout"]) == (8, 16, 0.05)
        assert node.training["lora_target_modules"] == ["q_proj", "v_proj"]
    for node in (sft, dpo, after):
        assert node.training["learning_rate"] == 2e-5
        assert node.training["per_device_train_batch_size"] * node.training["gradient_accumulation_steps"] == 8
    assert study.evaluation.sampling.max_new_tokens == 50
    assert study.evaluation.sampling.temperature == 0
    # 160 800 rows at 250 tokens, as the study expects: two passes for SFT, one for DPO.
    plan = plan_study(study, prompts=[], machine=MACHINE)
    assert plan.spent["sft"]["pairs"] == 321_600
    assert plan.spent["sft_dpo"]["tokens"] == 3 * 160_800 * 250


def test_the_quickstart_spends_the_same_pairs_on_every_arm():
    plan = plan_study(load_study("quickstart"), machine=MACHINE)
    assert {figures["pairs"] for figures in plan.spent.values()} == {160.0}
    assert plan.prompts == {"helpful": 80, "harmful": 80, "benign": 80}
    assert not any("do not spend" in warning for warning in plan.warnings)


# ---- settings


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sedes=[1]", "Did you mean 'seeds'"),
        ("stages.sft.trainig={}", "Did you mean 'training'"),
        ("training.learning_rat=1", "Did you mean 'learning_rate'"),
        ("stages.sft.data=pair", "Did you mean 'pairs'"),
        ("arms.sft=[sftt]", "Did you mean 'sft'"),
        ("stages.dpo.objective.name=dpoo", "Did you mean 'dpo'"),
        ("judge.data=juge", "Did you mean 'judge'"),
        ("evaluation.baseline=bas", "Did you mean 'base'"),
        ("primary.0.metric=reward_harm", "Did you mean 'reward_harmful'"),
        ("learning_rate=1e-5", "Did you mean 'training.learning_rate'"),
        ("training.output_dir=x", "set by the study itself"),
        ("seeds=[0,0]", "names a seed twice"),
        ("evaluation.prompts.0.data=pairs", "either `source` or `data`"),
    ],
)
def test_a_wrong_setting_names_the_nearest_right_one(values, override, words):
    with pytest.raises(UsageError) as caught:
        make(values, override)
    assert words in str(caught.value)


def test_an_objectives_wrong_value_is_found_when_planning(values):
    with pytest.raises(UsageError, match="beta"):
        plan_study(make(values, "stages.dpo.objective.beta=-1"), machine=MACHINE)


def test_a_recipe_that_cannot_work_is_found_when_planning(values):
    with pytest.raises(UsageError, match="Did you mean 'wandb'"):
        plan_study(make(values, "training.report_to=wandbb"), machine=MACHINE)


def test_prompts_of_a_data_block_need_an_axis(values):
    values["evaluation"]["prompts"] = [{"data": "pairs"}]
    with pytest.raises(UsageError, match="axis"):
        make(values)


# ---- graph


def test_a_common_stage_is_one_node_for_each_seed(values):
    graph = build_graph(make(values, "seeds=[0,1,2]"))
    trained = [node for node in graph.nodes() if node.kind == "train" and not node.judge]
    # sft, dpo from the base, dpo after sft: three a seed; the arms' four stages share one.
    assert len(trained) == 9
    shared = {arm.training[0].key for arm in graph.arms if arm.name in ("sft", "sft_dpo") and arm.seed == 1}
    assert len(shared) == 1
    assert len({node.key for node in graph.nodes()}) == len(graph.nodes())


def test_arms_that_are_not_trained_are_asked_once(values):
    graph = build_graph(make(values, "seeds=[0,1,2]"))
    assert [arm.name for arm in graph.arms].count("base") == 1
    assert [arm.name for arm in graph.arms].count("echo") == 1
    assert [arm.name for arm in graph.arms].count("dpo") == 3


def test_an_edited_objective_file_is_another_stage_and_another_decision(values, tmp_path):
    file, folder = tmp_path / "mine.py", tmp_path / "study"
    file.write_text("# one loss", encoding="utf-8")
    values["stages"]["dpo"]["objective"] = {"name": "mine", "file": str(file)}
    study = make(values)
    before, _ = build_graph(study), write_lock(folder, study, [], [], False)
    assert write_lock(folder, study, [], [], False)["objective_files"] == {str(file): file_fingerprint(file)}
    file.write_text("# another loss", encoding="utf-8")
    after = build_graph(study)
    keys = [{arm.name: arm.score.key for arm in graph.arms} for graph in (before, after)]
    assert {name for name in keys[0] if keys[0][name] != keys[1][name]} == {"dpo", "sft_dpo"}
    with pytest.raises(StageError, match="objective_files"):
        write_lock(folder, study, [], [], False)
    file.unlink()
    assert build_graph(study).arms, "a plan needs no file"


def test_a_named_stage_changes_in_every_arm_and_an_inline_one_in_its_own(values):
    before, after = build_graph(make(values)), build_graph(make(values, "stages.sft.training.learning_rate=0.5"))
    keys = [{arm.name: [node.key for node in arm.training] for arm in graph.arms} for graph in (before, after)]
    assert keys[0]["dpo"] == keys[1]["dpo"]
    assert keys[0]["sft"] != keys[1]["sft"]
    assert keys[0]["sft_dpo"][1] != keys[1]["sft_dpo"][1]
    inline = build_graph(make(values, "arms.sft=[{objective: sft, data: pairs}]"))
    assert next(arm for arm in inline.arms if arm.name == "sft").training[0].key == keys[0]["sft"][0]


def test_prompts_that_share_an_id_get_ids_of_their_own(values, tmp_path):
    rows = [{"id": name, "prompt": f"question {number} {words(number)}?"} for number, name in enumerate(["x", "x", "x", "0/x", "x"])]
    write_jsonl(tmp_path / "asked.jsonl", rows)
    values["evaluation"]["prompts"] = [{"source": str(tmp_path / "asked.jsonl"), "axis": "helpful"}]
    assert [prompt.id for prompt in study_prompts(make(values))] == ["x", "0/x", "0/x/2", "0/0/x", "0/x/3"]
    values["evaluation"]["prompts"][0]["limit"] = 2
    assert len(study_prompts(make(values))) == 2


def test_evaluation_settings_are_checked_before_anything_is_trained(values):
    for wrong, message in (
        ("evaluation.settings.confidence=0.5", "evaluation.settings: confidence"),
        ("evaluation.settings.alhpa=0.1", "Did you mean 'alpha'"),
        ("evaluation.margins.reward_harmfull=0.1", "evaluation.margins: no metric named 'reward_harmfull'.*'reward_harmful'"),
        ("evaluation.margins.hmr=-1", "must be above 0"),
    ):
        with pytest.raises(UsageError, match=message):
            make(values, wrong)


def test_an_arm_named_like_a_null_policy_is_refused(values):
    values["arms"]["echo"] = ["sft"]
    with pytest.raises(UsageError, match=r"arms\.echo: a null policy has that name"):
        make(values)
    values["evaluation"]["null_policies"] = ["empty"]
    assert "echo" in make(values).arms


# ---- costs


def test_tokens_are_counted_on_the_real_data(values, files):
    """The tokenizer is byte by byte, so they can be counted by hand: the prompt once, then the replies, each with its end."""
    rows = [json.loads(line) for line in Path(files["pairs"]).read_text().splitlines()]
    plan = plan_study(make(values), machine=MACHINE)
    sft, dpo = (next(row for row in plan.stages if row.node.name == name and row.node.kind == "train") for name in ("sft", "dpo"))
    prompts = [len(f"<user>{row['prompt']}<assistant>") for row in rows]
    chosen = [len(row["chosen"]) + 1 for row in rows]
    rejected = [len(row["rejected"]) + 1 for row in rows]
    # Two steps of four units, on rows of average size.
    assert sft.units == dpo.units == 8
    assert sft.tokens == pytest.approx(8 * (sum(prompts) + sum(chosen)) / 12)
    assert dpo.tokens == pytest.approx(8 * (sum(prompts) + sum(chosen) + sum(rejected)) / 12)
    assert sft.counted
    assert dpo.counted


def test_flops_follow_the_stated_model(values, tiny):
    """6 a weight and token for all weights, 4 for LoRA, 2 more where a reference reads along."""
    weights = parameters_of(tiny["llama"])
    # Embeddings 259 × 16; attention 4 × 16 × 16; MLP 3 × 16 × 32; three norms of 16.
    assert weights == 259 * 16 + 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16
    assert parameters_of(tiny["llama"], head=False) == weights - 259 * 16
    assert train_flops(weights, 10, lora=False, reference=False) == 60 * weights
    assert train_flops(weights, 10, lora=True, reference=True) == 60 * weights
    assert forward_flops(weights, 10) == 20 * weights
    plan = plan_study(make(values), machine=MACHINE)
    assert plan.spent["sft"]["flops"] == pytest.approx(6 * weights * plan.spent["sft"]["tokens"])


@pytest.mark.parametrize(("name", "size"), [("facebook/opt-350m", 350e6), ("org/Big-1.5B-chat", 1.5e9), ("nobody/knows", None)])
def test_sizes_are_read_off_names(name, size):
    assert parameters_of(name) == size


def test_expected_sizes_win_over_names():
    assert parameters_of("facebook/opt-350m", {"facebook/opt-350m": 331e6}) == 331_000_000


# ---- budget and power


def test_an_unequal_budget_is_a_warning_or_an_error(values):
    plan = plan_study(make(values, "budget.equal=pairs"), machine=MACHINE)
    # sft_dpo trains twice on eight pairs, the others once.
    assert {arm: figures["pairs"] for arm, figures in plan.spent.items()} == {"sft": 8, "dpo": 8, "sft_dpo": 16}
    assert any("sft_dpo spends more than" in warning for warning in plan.warnings)
    check_budget(plan)
    with pytest.raises(UsageError, match="sft 8, dpo 8, sft_dpo 16"):
        check_budget(plan_study(make(values, "budget.equal=pairs", "budget.strict=true"), machine=MACHINE))
    assert not plan_study(make(values), machine=MACHINE).warnings


def test_the_smallest_detectable_difference_is_said_beforehand(values):
    """Paired means: (z_0.9875 + z_0.8) / √n standard deviations, z from the normal table: Holm asks p < 0.025 of the first of two."""
    values["primary"].append({"a": "dpo", "b": "base", "metric": "hmr"})
    plan = plan_study(make(values), machine=MACHINE)
    mean, rate = plan.detectable
    assert mean["n"] == rate["n"] == 3
    assert mean["difference"] == pytest.approx((2.241403 + 0.841621) / math.sqrt(3), rel=1e-5)
    assert "first of 2 contrasts" in mean["assumes"]
    # Three prompts can never reach p < 0.05 in an exact McNemar test (smallest p is 2 / 2³).
    assert rate["difference"] is None


def test_plan_and_evaluation_say_one_smallest_difference(values):
    """Two samples with their own sizes, and the study's own alpha: what `evaluate` would say before a run."""
    values["primary"] = [{"a": "dpo", "b": "base", "metric": "cas"}]
    values["evaluation"]["settings"] = {"alpha": 0.2}
    counts = {"helpful": 100, "harmful": 20}
    (found,) = detectable_differences(make(values), counts)
    (expected,) = power.detectable_differences(counts, alpha=0.2, names=["cas"])
    assert found == {"a": "dpo", "b": "base", **expected}
    assert found["n"] == 120


def test_a_mistyped_setting_of_the_evaluation_is_said_before_the_run(values):
    values["evaluation"]["settings"] = {"resample": 2000}
    with pytest.raises(UsageError, match=r"evaluation.settings: Unknown setting 'resample'.*resamples"):
        plan_study(make(values), machine=MACHINE)


def test_prompts_that_stand_twice_are_asked_once_and_limits_hold(values, files):
    values["evaluation"]["prompts"] = [
        {"source": files["prompts"]},
        {"source": files["prompts"]},
        {"data": "held_out", "axis": "helpful", "limit": 2},
    ]
    assert plan_study(make(values), machine=MACHINE).prompts == {"helpful": 5, "harmful": 3, "benign": 3}
    values["evaluation"]["prompts"] = [{"source": files["prompts"], "axes": ["benign"], "limit": 1}]
    assert plan_study(make(values), machine=MACHINE).prompts == {"benign": 1}


def test_a_stage_may_start_from_the_base_and_be_compared_with_the_one_before(values):
    """Pre-DPO: the model trained first is the reference of a second run from the beginning."""
    values["stages"]["guided"] = {**values["stages"]["dpo"], "start": "base", "reference": "previous"}
    values["stages"]["anchored"] = {**values["stages"]["dpo"], "reference": "base"}
    values["arms"] |= {"pre_dpo": ["dpo", "guided"], "anchored": ["sft", "anchored"]}
    arms = {arm.name: arm for arm in build_graph(StudySettings.make(values)).arms}
    first, second = arms["pre_dpo"].training
    assert second.start is None
    assert second.reference is first
    assert arms["pre_dpo"].generate.start is second
    assert arms["anchored"].training[1].start is arms["anchored"].training[0]
    assert arms["anchored"].training[1].reference == "base"
    assert arms["sft_dpo"].training[1].reference == "start"
