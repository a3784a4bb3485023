"""Whole studies on tiny models: run, run again, change, kill, fail."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from equipoise.cli.main import main
from equipoise.core.errors import StageError, UsageError
from equipoise.core.files import file_sha256, read_json, read_jsonl, write_jsonl
from equipoise.study.run import failures, run_study
from equipoise.study.settings import StudySettings

from .conftest import study_values, write_files


def words(number):
    """Words nobody else gets."""
    return " ".join(hashlib.sha256(f"{number} {place}".encode()).hexdigest()[:5] for place in range(6))


POLICIES = ["always_refuse", "echo", "empty", "random_reply"]


def make(values, *overrides):
    return StudySettings.make(values, overrides)


def stage(folder, kind, name):
    """The one stage folder of this kind and name."""
    (found,) = folder.glob(f"stages/{kind}-{name}-*")
    return found


def outcome(folder):
    """What a study found, without times and places: weights, replies, verdicts, evaluation."""
    weights = {path.parent.parent.name: file_sha256(path) for path in folder.glob("stages/train-*/model/*.safetensors")}
    replies = {path.parent.name: file_sha256(path) for path in folder.glob("stages/*/completions.jsonl")}
    verdicts = {path.parent.name: file_sha256(path) for path in folder.glob("stages/*/verdicts.jsonl")}
    return weights, replies, verdicts, read_json(folder / "evaluation" / "evaluation.json")


# ---- from start to end


@pytest.fixture(scope="module")
def finished(tiny, own_cache, tmp_path_factory):
    """The settings and the folder of a study that ran to its end, undisturbed. Tests only read it."""
    folder = tmp_path_factory.mktemp("finished")
    values = study_values(tiny, write_files(folder))
    return values, run_study(StudySettings.make(values), folder / "study")


def test_a_whole_study_from_pairs_to_report(finished):
    _, folder = finished
    arms = {arm["name"]: arm for arm in read_json(folder / "arms.json")["arms"]}
    assert {name: arm["status"] for name, arm in arms.items()} == dict.fromkeys(("base", "sft", "dpo", "sft_dpo"), "done")
    assert [item["kind"] for item in arms["sft_dpo"]["stages"]] == ["train", "train", "generate", "score"]
    assert arms["base"]["model"] is None
    assert (folder / arms["sft_dpo"]["model"] / "adapter_model.safetensors").is_file()
    evaluation = read_json(folder / "evaluation" / "evaluation.json")
    assert {name: model["kind"] for name, model in evaluation["models"].items()} == {
        **dict.fromkeys(arms, "arm"),
        **dict.fromkeys(POLICIES, "null"),
    }
    assert not evaluation["independence"]["blocked"]
    assert not evaluation["independence"]["unknown"]
    assert [row["metric"] for row in evaluation["comparisons"] if row["primary"]] == ["reward_harmful"]
    assert (folder / "report" / "report.html").is_file()


def test_a_stage_two_arms_share_is_trained_once(finished):
    _, folder = finished
    arms = {arm["name"]: arm for arm in read_json(folder / "arms.json")["arms"]}
    assert arms["sft"]["stages"][0] == arms["sft_dpo"]["stages"][0]
    assert len(list(folder.glob("stages/train-*"))) == 4  # the judge, sft, dpo, dpo after sft
    # Its cost counts in both: eight pairs for sft, eight more for the dpo after it.
    assert (arms["sft"]["cost"]["pairs"], arms["sft_dpo"]["cost"]["pairs"]) == (8, 16)


def test_the_judge_is_tried_on_pairs_it_never_saw(finished):
    _, folder = finished
    held_out = read_json(stage(folder, "held_out", "judge") / "held_out.json")
    assert held_out["pair_accuracy"]["n"] == held_out["length_baseline"]["n"] == 6
    # Every chosen reply of the fixture is longer than its rejected one, so length alone gets all six.
    assert held_out["length_baseline"]["value"] == 100
    assert held_out["pair_accuracy"]["value"] == pytest.approx(100 * held_out["counts"]["correct"] / 6, abs=1e-5)
    assert read_json(folder / "evaluation" / "evaluation.json")["judge"]["held_out"]["pair_accuracy"]["n"] == 6


def test_kl_to_the_base_is_measured_for_trained_arms_only(finished):
    _, folder = finished
    verdicts = folder.glob("stages/score-*/verdicts.jsonl")
    signed = {path.parent.name.split("-")[1]: {row["by"] for row in read_jsonl(path)} for path in verdicts}
    assert {name for name, by in signed.items() if "kl_to_base" in by} == {"sft", "dpo", "sft_dpo"}
    assert all({"reward", "invalid", "refusal", "length"} <= by for by in signed.values())


def test_first_replies_of_trained_arms_are_credited_token_by_token(finished):
    _, folder = finished
    found = {path.parent.name.split("-")[1]: read_jsonl(path) for path in folder.glob("stages/score-*/token_credit.jsonl")}
    assert set(found) == {"sft", "dpo", "sft_dpo"}
    for name, lines in found.items():
        assert [line["id"] for line in lines] == [f"{axis}-{number}" for axis in ("helpful", "harmful", "benign") for number in range(2)]
        texts = {row["id"]: row["text"] for row in read_jsonl(stage(folder, "generate", name) / "completions.jsonl")}
        verdicts = read_jsonl(stage(folder, "score", name) / "verdicts.jsonl")
        sums = {row["id"]: row["value"] for row in verdicts if row["by"] == "token_credit"}
        # The one says nats a token, the other 0.1 a nat: the same log-ratio.
        tokens = {row["id"]: row["value"] for row in verdicts if row["by"] == "length"}
        apart = {row["id"]: row["value"] for row in verdicts if row["by"] == "kl_to_base"}
        for line in lines:
            assert "".join(piece["text"] for piece in line["pieces"]) == texts[line["id"]]
            assert sums[line["id"]] == line["credit"] == pytest.approx(0.1 * apart[line["id"]] * tokens[line["id"]], abs=1e-6)
    assert "Token credit" in (folder / "report" / "report.html").read_text(encoding="utf-8")


def test_the_lock_says_what_was_decided_beforehand(finished):
    values, folder = finished
    lock = read_json(folder / "study.lock.json")
    assert lock["study"] == make(values).resolved()
    assert lock["primary"] == values["primary"]
    assert lock["prompts"]["n"] == 9
    assert lock["detectable"][0]["n"] == 3


def test_a_model_that_is_not_there_is_told_before_the_judge_is_trained(finished, tmp_path):
    values, _ = finished
    with pytest.raises(UsageError, match="is not a folder"):
        run_study(make(values, f"model_name_or_path={tmp_path}/tinny"), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_finished_study_is_not_run_again(finished):
    values, folder = finished
    before = outcome(folder)
    done = {path: path.stat().st_mtime_ns for path in folder.glob("stages/*/done.json")}
    run_study(make(values), folder)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("stages/*/done.json")} == done
    assert outcome(folder) == before


def test_training_data_is_kept_apart_from_the_evaluation_and_the_judge_from_both(values, files, tmp_path):
    """Held-out pairs that are also asked, trained on and judged by: they stay in the evaluation only, and are counted."""
    for name in ("pairs", "judge"):
        with open(files[name], "a", encoding="utf-8") as stream:
            stream.write(Path(files["held_out"]).read_text(encoding="utf-8"))
    values["evaluation"]["prompts"].append({"data": "held_out", "axis": "harmful"})
    values["evaluation"]["null_policies"] = []
    values["arms"] = {"base": [], "sft": ["sft"]}
    values["primary"] = []
    folder = run_study(make(values), tmp_path / "study", report=False)
    for name, kept in (("sft", 12), ("judge", 8)):
        loaded, _ = read_json(stage(folder, "train", name) / "accounting.json")["main"]["train"]
        assert (loaded["rows_in"], loaded["kept"]) == (kept + 6, kept)
    assert not read_json(folder / "evaluation" / "evaluation.json")["independence"]["blocked"]


# ---- what was decided stays decided


def test_a_changed_study_is_refused_and_says_what_changed(finished):
    values, folder = finished
    with pytest.raises(StageError) as caught:
        run_study(make(values, "training.learning_rate=0.02", "seeds=[0,1]"), folder)
    assert "study.training.learning_rate: 0.01 → 0.02" in str(caught.value)
    assert "study.seeds.1: (absent) → 1" in str(caught.value)
    assert "--overwrite" in str(caught.value)


def test_deciding_anew_keeps_what_still_fits_and_leaves_a_trace(values, tmp_path, monkeypatch):
    small = {**values, "arms": {"base": []}, "primary": []}
    small["evaluation"] = {**values["evaluation"], "null_policies": ["empty"]}
    folder = run_study(make(small), tmp_path / "study", report=False)
    trained = stage(folder, "train", "judge") / "done.json"
    before = trained.stat().st_mtime_ns
    small["evaluation"] = {**small["evaluation"], "sampling": {"max_new_tokens": 5}}
    run_study(make(small), folder, overwrite=True, report=False)
    assert trained.stat().st_mtime_ns == before
    assert read_json(folder / "study.lock.json")["changed"] == [["study.evaluation.sampling.max_new_tokens: 4 → 5"]]


# ---- what fails and what is killed


def test_a_failed_arm_is_marked_and_the_others_go_on(values, tmp_path, monkeypatch, capsys):
    """Whatever stops one arm (here: no memory) stands in arms.json; the rest is compared, and the next call tries again."""
    from equipoise.training import fit as room

    def out_of_memory(settings, **rest):
        if settings.learning_rate == 0.5:
            raise RuntimeError("out of memory")
        return fit(settings, **rest)

    fit = room.fit
    monkeypatch.setattr(room, "fit", out_of_memory)
    values["stages"]["broken"] = {"objective": "sft", "data": "pairs", "training": {"learning_rate": 0.5}}
    values["arms"] = {"base": [], "broken": ["broken", "dpo"], "sft": ["sft"]}
    values["primary"] = [{"a": "sft", "b": "broken", "metric": "reward_harmful"}, {"a": "sft", "b": "base", "metric": "reward_harmful"}]
    values["evaluation"]["null_policies"] = ["empty"]
    file, folder = tmp_path / "study.yaml", tmp_path / "study"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    command = ["study", "run", str(file), "--json", "--output-dir", str(folder)]
    assert main(command) == 1
    assert json.loads(capsys.readouterr().out)["failed"] == {"broken (seed 0)": "RuntimeError: out of memory"}
    evaluation = read_json(folder / "evaluation" / "evaluation.json")
    assert set(evaluation["models"]) == {"base", "sft", "empty"}
    lost, kept = [row for row in evaluation["comparisons"] if row["primary"]]
    assert [(row["a"], row["b"]) for row in (lost, kept)] == [("sft", "broken"), ("sft", "base")]
    assert (lost["p"], lost["p_holm"], kept["p_holm"]) == (None, None, min(1, 2 * kept["p"])), "a lost contrast still counts for Holm"
    report = (folder / "report" / "report.md").read_text(encoding="utf-8")
    assert "one undecided and one not tested" in report
    assert "sft against broken on reward on harmful prompts could not be tested: broken is not among the models evaluated" in report
    monkeypatch.undo()
    assert main(command) == 0
    assert failures(folder) == {}
    assert set(read_json(folder / "evaluation" / "evaluation.json")["models"]) == {"base", "broken", "sft", "empty"}


def test_without_its_baseline_a_study_is_evaluated_and_says_what_is_lacking(values, tmp_path, monkeypatch):
    from equipoise.generation import _stage as room

    def no_reply_of_the_base(settings, **rest):
        if "generate-base-" in settings.output_dir:
            raise RuntimeError("no reply")
        return generate(settings, **rest)

    generate = room.generate
    monkeypatch.setattr(room, "generate", no_reply_of_the_base)
    values["arms"] = {"base": [], "sft": ["sft"]}
    values["primary"] = [{"a": "sft", "b": "base", "metric": "reward_harmful"}]
    values["evaluation"]["null_policies"] = ["empty"]
    folder = run_study(make(values), tmp_path / "study")
    evaluation = read_json(folder / "evaluation" / "evaluation.json")
    assert (evaluation["baseline"], set(evaluation["models"])) == (None, {"sft", "empty"})
    assert "win_rate" not in evaluation["metrics"]
    assert any(warning.startswith("There is no baseline among these models: no win rate") for warning in evaluation["warnings"])
    report = (folder / "report" / "report.md").read_text(encoding="utf-8")
    assert "There is no baseline among these models" in report
    assert "none: base was planned and is not among the models evaluated" in report


def test_where_every_arm_failed_nothing_is_said(values, tmp_path, monkeypatch):
    from equipoise.generation import _stage as room

    def no_reply(settings, **rest):
        raise RuntimeError("no reply")

    monkeypatch.setattr(room, "generate", no_reply)
    small = {**values, "arms": {"base": []}, "primary": []}
    with pytest.raises(StageError, match="no reply"):
        run_study(make(small), tmp_path / "study")
    assert failures(tmp_path / "study")["base (seed 0)"] == "RuntimeError: no reply"
    assert not (tmp_path / "study" / "evaluation").exists()


def test_an_implicit_reward_judges_wherever_a_reward_model_does(values, tiny, tmp_path):
    """DPO's own policy against its reference, on every arm's replies and on held-out pairs; no token credit asked."""
    values["judge"] = {
        "name": "own",
        "scorer": "implicit",
        "model_name_or_path": tiny["opt"],
        "base_model_name_or_path": tiny["llama"],
        "held_out": "held_out",
    }
    values["arms"], values["primary"] = {"base": [], "sft": ["sft"]}, []
    values["evaluation"] |= {"null_policies": ["empty"], "kl_to_base": False, "token_credit": 0}
    folder = run_study(make(values), tmp_path / "study")
    held_out = read_json(stage(folder, "held_out", "own") / "held_out.json")
    assert (held_out["pair_accuracy"]["n"], held_out["counts"]["missing"]) == (6, 0)
    for name in ("base", "sft", "empty"):
        rewards = [row for row in read_jsonl(stage(folder, "score", name) / "verdicts.jsonl") if row["by"] == "reward"]
        assert len(rewards) == 9
        assert None not in [row["value"] for row in rewards]
    evaluation = read_json(folder / "evaluation" / "evaluation.json")
    assert evaluation["judge"]["weights"] == f"{tiny['opt']}, implicit reward against {tiny['llama']}"
    assert not list(folder.glob("stages/score-*/token_credit.jsonl"))


def test_killed_at_several_points_and_continued_it_ends_the_same(finished, tmp_path):
    """kill -9 while the judge trains, an arm answers, a reference is built, an arm is scored and the report is written."""
    values, undisturbed = finished
    file, folder = tmp_path / "study.yaml", tmp_path / "study"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    # A stage's accounting is written just before its reference is built.
    for mark in ("train-judge-*/inputs.json", "generate-sft-*/inputs.json", "train-dpo*/accounting.json", "score-sft_dpo-*/inputs.json"):
        kill_when(file, folder, f"stages/{mark}")
        assert not (folder / "evaluation" / "done.json").exists()
    kill_when(file, folder, "report/figures/*.svg")
    assert not (folder / "report" / "report.html").exists()
    run_study(make(values), folder)
    ours, theirs = outcome(folder), outcome(undisturbed)
    assert ours[:3] == theirs[:3]
    assert ours[3]["models"] == theirs[3]["models"]
    assert ours[3]["comparisons"] == theirs[3]["comparisons"]


def kill_when(file, folder, mark):
    """Start the study in a process of its own and kill it as soon as the file appears."""
    # A fork server imports the libraries once for all the processes that are to be killed.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["equipoise.study.run", "equipoise.study.plan", "equipoise.training.fit", "equipoise.generation.local"]
    )
    process = processes.Process(target=main, args=(["study", "run", str(file), "--output-dir", str(folder)],))
    process.start()
    try:
        limit = time.monotonic() + 240
        while not list(folder.glob(mark)) and process.is_alive() and time.monotonic() < limit:
            time.sleep(0.002)
        assert process.is_alive(), f"it ended by itself, with exit code {process.exitcode}"
        assert list(folder.glob(mark))
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL


# ---- the paper's study, with stand-ins


def test_opt350m_runs_with_local_stand_ins(tiny, tmp_path, capsys):
    """The shipped recipe, unchanged but for where models, data and prompts come from and for its length."""
    hh = tmp_path / "hh.jsonl"
    turns = [f"\n\nHuman: {words(number)}?\n\nAssistant:" for number in range(12)]
    write_jsonl(hh, [{"chosen": f"{turn} Gladly, {number}.", "rejected": f"{turn} No!"} for number, turn in enumerate(turns)])
    prompts = {axis: tmp_path / f"{axis}.json" for axis in ("harmful", "helpful")}
    for place, path in enumerate(prompts.values()):
        path.write_text(json.dumps([f"Human: {words(5000 + 100 * place + number)}?" for number in range(3)]), encoding="utf-8")
    sets = [
        f"model_name_or_path={tiny['opt']}",
        f"judge.model_name_or_path={tiny['reward']}",
        f"data.hh.dataset_name={hh}",
        "data.hh.dataset_split=null",
        "training.max_steps=1",
        "evaluation.sampling.max_new_tokens=4",
        "evaluation.settings.resamples=1000",
        "evaluation.settings.flips=1000",
        *(f"evaluation.prompts.{number}.source={path}" for number, path in enumerate(prompts.values())),
    ]
    arguments = [part for item in sets for part in ("--set", item)]
    folder = tmp_path / "study"
    assert main(["study", "run", "opt350m", "--json", "--output-dir", str(folder), *arguments]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["failed"] == {}
    assert Path(said["report"]).is_file()
    replies = read_jsonl(stage(folder, "generate", "base") / "completions.jsonl")
    assert len(replies) == 6
    settings = read_json(stage(folder, "train", "sft") / "settings.json")
    assert settings["tokenise"]["learn"] == "all"
    assert settings["tokenise"]["max_length"] == 512
    evaluation = read_json(folder / "evaluation" / "evaluation.json")
    assert evaluation["models"]["base"]["estimates"]["cas"]["value"] is not None
    assert evaluation["independence"]["unknown"]  # nobody knows what the stand-in judge was trained on


def test_a_guide_is_trained_first_and_then_only_compared_with(values, tmp_path):
    values["stages"]["guided"] = {**values["stages"]["dpo"], "start": "base", "reference": "previous"}
    values["arms"] = {"base": [], "pre_dpo": ["dpo", "guided"]}
    values["primary"] = []
    values["evaluation"]["null_policies"] = []
    folder = run_study(make(values), tmp_path / "study", report=False)
    settings = read_json(stage(folder, "train", "guided") / "settings.json")
    assert settings["model_name_or_path"] == values["model_name_or_path"]
    assert Path(settings["reference_model"]) == stage(folder, "train", "dpo") / "model"
    # Against a trained guide the untrained policy does not start at ln 2.
    first = next(line for line in read_jsonl(stage(folder, "train", "guided") / "log.jsonl") if "loss" in line)
    assert first["loss"] != pytest.approx(0.6931, abs=1e-3)
    assert {arm["name"]: arm["status"] for arm in read_json(folder / "arms.json")["arms"]}["pre_dpo"] == "done"
