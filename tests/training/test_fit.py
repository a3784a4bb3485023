"""The door to training, end to end on tiny models: what comes out, what is refused, what a kill leaves."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, RobertaConfig, RobertaModel, TrainerCallback

from equipoise.core.errors import NumericsError, StageError, UsageError
from equipoise.core.files import read_json, read_jsonl
from equipoise.models import _elementwise
from equipoise.models._elementwise import EAGER, Kernels
from equipoise.models.load import load_causal, load_sequence_classifier
from equipoise.objectives._base import Needs, Scored
from equipoise.training.checkpoints import newest_complete
from equipoise.training.fit import fit
from equipoise.training.settings import TrainSettings
from equipoise.training.start_check import check_positions
from tests.tiny import preference_dicts, recipe, tiny, tokenizer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def test_dpo_starts_at_ln_2_and_learns(base: Path, tmp_path: Path) -> None:
    run = fit(recipe(base, tmp_path / "out"), train_dataset=preference_dicts(), eval_dataset=preference_dicts(4, seed=9))
    log = [line for line in read_jsonl(run.folder / "log.jsonl") if "loss" in line]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1]["loss"] < 0.5
    assert log[-1]["rewards/margins"] > 0
    assert len(log) == run.results["steps"] == 6
    last = read_jsonl(run.folder / "log.jsonl")[-2]
    assert "train_steps_per_second" in last
    assert not {"train_samples_per_second", "total_flos"} & last.keys(), "of a step the library counts one sample and no FLOPs"
    assert {"eval_loss", "eval_rewards/accuracies"} <= run.results["dev"].keys()
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    assert model.config.vocab_size == 96
    assert read_json(run.folder / "start_check.json")["form"] == "packed"
    assert read_json(run.folder / "accounting.json")["main"]["train"][0]["rows_in"] == 12
    assert (run.folder / "trained_on.npz").is_file()
    assert run.results["cost"]["pairs"] == 24
    assert not list(run.folder.rglob("*.bin")), "nothing is pickled into the model folder"


def test_torch_compile_reaches_the_step_and_trains_the_same(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of the step are asked for by the setting, and are those that norms and gates then run."""
    calls: list[str] = []

    def counted(function: Any) -> Any:
        def call(*given: Any) -> Any:
            calls.append(function.__name__)
            return function(*given)

        return call

    monkeypatch.setattr(_elementwise, "compiled", lambda device: Kernels(*map(counted, EAGER)))
    losses = {}
    for wanted in (False, True):
        run = fit(recipe(base, tmp_path / f"{wanted}", max_steps=2, torch_compile=wanted), train_dataset=preference_dicts())
        losses[wanted] = [line["loss"] for line in read_jsonl(run.folder / "log.jsonl") if "loss" in line]
        assert bool(calls) == wanted
    assert set(calls) == {"norm", "norm_backward", "gate", "gate_backward", "rotate", "rotate_backward", "exponentials"}
    assert losses[True] == losses[False]


def test_a_finished_run_is_not_run_again(base: Path, tmp_path: Path) -> None:
    wanted = recipe(base, tmp_path / "out", max_steps=1)
    first = fit(wanted, train_dataset=preference_dicts())
    again = fit(wanted, train_dataset=preference_dicts())
    assert again.skipped
    assert again.results == first.results
    with pytest.raises(StageError, match="learning_rate"):
        fit(recipe(base, tmp_path / "out", max_steps=1, learning_rate=1e-3), train_dataset=preference_dicts())


def test_lora_takes_its_reference_with_the_adapter_off(base: Path, tmp_path: Path) -> None:
    run = fit(recipe(base, tmp_path / "lora", use_peft=True, lora_r=4), train_dataset=preference_dicts())
    full = fit(recipe(base, tmp_path / "full", max_steps=1), train_dataset=preference_dicts())
    assert (run.folder / "model" / "adapter_config.json").is_file()
    assert run.results["cost"]["reference_tokens"] > 0
    # Same reference weights, rows and numerics: the full run reads the store the LoRA run filled.
    assert full.results["cost"]["reference_tokens"] == 0
    log = [line for line in read_jsonl(run.folder / "log.jsonl") if "loss" in line]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1]["loss"] < log[0]["loss"]


def test_an_adapter_goes_on_and_its_own_start_is_the_reference(base: Path, tmp_path: Path) -> None:
    first = fit(recipe(base, tmp_path / "sft", use_peft=True, streams=[{"objective": {"name": "sft"}}]), train_dataset=preference_dicts())
    second = fit(recipe(first.folder / "model", tmp_path / "dpo", use_peft=True, max_steps=2), train_dataset=preference_dicts())
    log = [line for line in read_jsonl(second.folder / "log.jsonl") if "loss" in line]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    merged = fit(recipe(first.folder / "model", tmp_path / "full", max_steps=1), train_dataset=preference_dicts())
    assert (merged.folder / "model" / "model.safetensors").is_file()


def test_the_store_outlives_learning_rate_and_beta(base: Path, tmp_path: Path) -> None:
    fit(recipe(base, tmp_path / "one", max_steps=1), train_dataset=preference_dicts())
    other = recipe(base, tmp_path / "two", max_steps=1, learning_rate=1e-4, streams=[{"objective": {"name": "dpo", "beta": 0.5}}])
    assert fit(other, train_dataset=preference_dicts()).results["cost"]["reference_tokens"] == 0


def test_objects_in_memory_callbacks_and_a_users_loss(tmp_path: Path) -> None:
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.steps += 1

    def imitate(scored: Scored) -> torch.Tensor:
        return -scored.side("chosen").policy_logps()

    counter, model = Count(), tiny(seed=5)
    run = fit(
        TrainSettings.make(
            {"model_name_or_path": "in memory", "output_dir": str(tmp_path / "out"), "learning_rate": 1e-2, "num_train_epochs": 3}
        ),
        model=model,
        tokenizer=tokenizer(),
        train_dataset=preference_dicts(),
        objective=imitate,
        needs=Needs(roles=("chosen", "rejected")),
        callbacks=[counter],
    )
    assert counter.steps == run.results["steps"] == 6
    log = [line["loss"] for line in read_jsonl(run.folder / "log.jsonl") if "loss" in line]
    assert log[-1] < log[0]


def test_kto_and_streams(base: Path, tmp_path: Path) -> None:
    kto = fit(recipe(base, tmp_path / "kto", streams=[{"objective": {"name": "kto"}}]), train_dataset=preference_dicts())
    log = [line for line in read_jsonl(kto.folder / "log.jsonl") if "loss" in line]
    # At the reference r = z = 0, so every reply costs ½.
    assert log[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert "kl" in log[-1]
    path = tmp_path / "buffer.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in preference_dicts(5, seed=3)))
    streams = [
        {"name": "safety", "objective": {"name": "dpo"}},
        {"name": "buffer", "data": {"dataset_name": str(path)}, "objective": {"name": "dpo"}, "weight": 0.5},
    ]
    both = fit(recipe(base, tmp_path / "both", streams=streams), train_dataset=preference_dicts())
    first = next(line for line in read_jsonl(both.folder / "log.jsonl") if "loss" in line)
    assert first["loss"] == pytest.approx(1.5 * math.log(2), abs=1e-6)
    assert {"safety/rewards/margins", "buffer/rewards/margins"} <= first.keys()


def test_a_reward_model(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path / "base"
    tiny(seed=5).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    run = fit(
        recipe(folder, tmp_path / "rm", num_train_epochs=8, streams=[{"objective": {"name": "bradley_terry"}}]),
        train_dataset=preference_dicts(),
    )
    log = [line for line in read_jsonl(run.folder / "log.jsonl") if "loss" in line]
    assert log[-1]["loss"] < log[0]["loss"]
    model = AutoModelForSequenceClassification.from_pretrained(run.folder / "model")
    assert model.config.num_labels == 1


def test_a_reward_models_adapter_loads_scores_and_goes_on(base: Path, tmp_path: Path) -> None:
    reward = [{"objective": {"name": "bradley_terry"}}]
    run = fit(recipe(base, tmp_path / "rm", use_peft=True, streams=reward), train_dataset=preference_dicts())
    model = load_sequence_classifier(run.folder / "model", device="cpu")
    ids = torch.arange(5, 25)[None]
    values = load_file(run.folder / "model" / "adapter_model.safetensors")
    (head,) = (value for name, value in values.items() if name.endswith("score.weight"))
    trained = dict(model.named_parameters())["base_model.model.score.modules_to_save.default.weight"]
    assert torch.equal(trained, head)
    with torch.no_grad():
        assert model(ids).logits.shape == (1, 1)
    more = fit(
        recipe(run.folder / "model", tmp_path / "more", use_peft=True, max_steps=1, streams=reward), train_dataset=preference_dicts()
    )
    assert (more.folder / "model" / "adapter_config.json").is_file()
    with pytest.raises(UsageError, match="adapter of a reward model"):
        load_causal(run.folder / "model", device="cpu")


def test_another_reference_model(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny(seed=8).save_pretrained(other)
    tokenizer().save_pretrained(other)
    run = fit(recipe(base, tmp_path / "out", reference_model=str(other), max_steps=1), train_dataset=preference_dicts())
    first = next(line for line in read_jsonl(run.folder / "log.jsonl") if "loss" in line)
    assert abs(first["loss"] - math.log(2)) > 1e-3


def test_what_cannot_work_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'dpo'"):
        fit(recipe(base, tmp_path / "a", streams=[{"objective": {"name": "dpoo"}}]), train_dataset=preference_dicts())
    with pytest.raises(UsageError, match="betta"):
        fit(recipe(base, tmp_path / "b", streams=[{"objective": {"name": "dpo", "betta": 1}}]), train_dataset=preference_dicts())
    with pytest.raises(UsageError, match="No weight is left"):
        fit(recipe(base, tmp_path / "c", trainable="no_such_weight"), train_dataset=preference_dicts())
    with pytest.raises(UsageError, match="no data"):
        fit(recipe(base, tmp_path / "d"))
    with pytest.raises(UsageError, match="is not a folder"):
        fit(recipe(tmp_path / "nowhere", tmp_path / "e"), train_dataset=preference_dicts())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"report_to": "wandbb"}, "Unknown tracker report_to='wandbb'. Did you mean 'wandb'"),
        ({"report_to": "clearml"}, "needs clearml, which is not installed: pip install clearml"),
        ({"max_steps": 0}, "max_steps=0 would train nothing"),
        ({"lr_scheduler_type": "cosin"}, "Did you mean 'cosine'"),
        ({"save_strategy": "steps", "save_steps": 0}, "needs save_steps"),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "needs checkpoints"),
        ({"load_best_model_at_end": True}, "no dev rows to choose by"),
        ({"use_peft": True, "lora_target_modules": ["nope"]}, "lora_target_modules=.*nope"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(values: dict[str, Any], said: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        fit(recipe(base, tmp_path / "out", **values), train_dataset=preference_dicts())


def test_rows_longer_than_learned_positions_are_refused(tmp_path: Path) -> None:
    long = [{"prompt": "w1 " * 200, "chosen": "w2", "rejected": "w3"}]
    with pytest.raises(UsageError, match=r"knows 128 positions: set tokenise.max_length=128"):
        fit(recipe("in memory", tmp_path / "out"), model=tiny("gpt2"), tokenizer=tokenizer(), train_dataset=long)


def test_tables_of_positions_may_begin_with_something_else() -> None:
    roberta = RobertaModel(
        RobertaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=34, vocab_size=9)
    )
    check_positions(roberta, 32)
    with pytest.raises(UsageError, match="knows 32 positions"):
        check_positions(roberta, 33)
    check_positions(tiny("opt"), 128)
    with pytest.raises(UsageError, match="knows 128 positions"):
        check_positions(tiny("opt"), 129)


def test_separate_replies_can_be_packed_by_name(base: Path, tmp_path: Path) -> None:
    """Rows of one reply share nothing, and `packed` means the same as `separate` for them."""
    wanted = recipe(base, tmp_path / "out", attention="packed", max_steps=1, streams=[{"objective": {"name": "sft"}}])
    assert fit(wanted, train_dataset=preference_dicts()).results["form"] == "packed"


def test_the_best_checkpoint_is_kept_however_saving_is_set(base: Path, tmp_path: Path) -> None:
    data = {"train_dataset": preference_dicts(), "eval_dataset": preference_dicts(4, seed=9)}
    for number, values in enumerate(({"save_steps": 2}, {"eval_steps": 2}, {"eval_steps": 1, "save_strategy": "steps"})):
        run = fit(recipe(base, tmp_path / str(number), load_best_model_at_end=True, **values), **data)
        told = [line["eval_loss"] for line in read_jsonl(run.folder / "log.jsonl") if "eval_loss" in line]
        assert run.results["dev"]["eval_loss"] == pytest.approx(min(told), abs=1e-6)


class Stop(TrainerCallback):
    """Ends a run in the middle, as a lack of memory would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise MemoryError("enough")


@pytest.mark.parametrize("every", [1, 2, 100])
def test_the_loss_of_a_resumed_run_is_that_of_all_its_steps(every: int, base: Path, tmp_path: Path) -> None:
    """But for steps before the checkpoint that no log line tells: with a line every 100 steps, all of those."""
    whole = fit(recipe(base, tmp_path / "whole"), train_dataset=preference_dicts())
    losses = [line["loss"] for line in read_jsonl(whole.folder / "log.jsonl") if "loss" in line]
    with pytest.raises(MemoryError):
        fit(recipe(base, tmp_path / "out", save_steps=2, logging_steps=every), train_dataset=preference_dicts(), callbacks=[Stop(5)])
    run = fit(recipe(base, tmp_path / "out", save_steps=2, logging_steps=every), train_dataset=preference_dicts())
    expected = losses if every < 100 else losses[4:]
    assert run.results["train_loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_a_stopped_run_goes_on_with_smaller_micro_batches(base: Path, tmp_path: Path) -> None:
    """What does not change the recipe may be changed; the loss told at the end is that of all steps."""
    whole = fit(recipe(base, tmp_path / "whole"), train_dataset=preference_dicts())
    with pytest.raises(MemoryError):
        fit(recipe(base, tmp_path / "out", save_steps=2), train_dataset=preference_dicts(), callbacks=[Stop(5)])
    smaller = {"token_budget": 60, "gradient_checkpointing": True, "save_steps": 1, "logging_steps": 1, "save_strategy": "steps"}
    run = fit(recipe(base, tmp_path / "out", **smaller), train_dataset=preference_dicts())
    assert run.results["resumed_from"] == "checkpoint-4"
    assert run.results["train_loss"] == pytest.approx(whole.results["train_loss"], rel=1e-4)
    with pytest.raises(StageError, match=r"other settings or inputs \(learning_rate\)"):
        fit(recipe(base, tmp_path / "out", learning_rate=1e-3, **smaller), train_dataset=preference_dicts())


def test_a_long_epoch_has_checkpoints_by_default(base: Path, tmp_path: Path) -> None:
    assert recipe(base, tmp_path).save_steps == 500
    with pytest.raises(MemoryError):
        fit(recipe(base, tmp_path / "out", num_train_epochs=1, save_steps=2), train_dataset=preference_dicts(), callbacks=[Stop(3)])
    assert [item.name for item in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_no_step_is_saved_twice(base: Path, tmp_path: Path) -> None:
    """Steps 3 and 6 end an epoch; 6, and where it stops early 4, are also multiples of save_steps."""

    class Saved(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.steps.append(state.global_step)

    for values, expected in (({}, [2, 3, 4, 6]), ({"max_steps": 4}, [2, 3, 4]), ({"save_strategy": "steps"}, [2, 4, 6])):
        saved = Saved()
        fit(recipe(base, tmp_path / str(expected), save_steps=2, **values), train_dataset=preference_dicts(), callbacks=[saved])
        assert saved.steps == expected


def test_an_edited_loss_is_another_run(base: Path, tmp_path: Path) -> None:
    def made(factor: float) -> Any:
        return lambda scored: -factor * scored.side("chosen").policy_logps()

    def other(scored: Scored) -> torch.Tensor:
        return -scored.side("rejected").policy_logps()

    wanted = recipe(base, tmp_path / "out", max_steps=1)
    assert not fit(wanted, train_dataset=preference_dicts(), objective=made(1.0)).skipped
    assert fit(wanted, train_dataset=preference_dicts(), objective=made(1.0)).skipped
    for changed in (made(2.0), other):
        with pytest.raises(StageError, match="input objective"):
            fit(wanted, train_dataset=preference_dicts(), objective=changed)


def test_a_loss_that_blows_up_stops_the_run(base: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="not finite for rows"):
        fit(
            recipe(base, tmp_path / "out"),
            train_dataset=preference_dicts(),
            objective=lambda scored: scored.side("chosen").logratios() * torch.inf,
        )
    assert not (tmp_path / "out" / "done.json").exists()


SCRIPT = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from transformers import TrainerCallback
from equipoise.training.fit import fit
from equipoise.training.settings import TrainSettings
from tests.tiny import preference_dicts

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

settings = TrainSettings.make(json.loads(sys.argv[1]))
fit(settings, train_dataset=preference_dicts(), eval_dataset=preference_dicts(4, seed=9), callbacks=[Kill()])
"""


def test_kill_9_then_the_same_bytes(base: Path, tmp_path: Path) -> None:
    """Killed in the middle of an epoch, after a checkpoint: the resumed run ends with the bytes of one never killed."""
    wanted = recipe(base, tmp_path / "killed", save_steps=2, use_peft=True, lora_dropout=0.2, lora_r=4)
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]))
    command = [sys.executable, "-c", SCRIPT]
    killed = subprocess.run([*command, json.dumps(wanted.resolved()), "5"], env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    checkpoint = newest_complete(tmp_path / "killed" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"
    # A save that was cut short must not be resumed from.
    (tmp_path / "killed" / "checkpoints" / "checkpoint-5").mkdir()
    data = {"train_dataset": preference_dicts(), "eval_dataset": preference_dicts(4, seed=9)}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed = fit(wanted, **data)
        whole = fit(recipe(base, tmp_path / "whole", save_steps=2, use_peft=True, lora_dropout=0.2, lora_r=4), **data)
    finally:
        torch.set_num_threads(before)
    one, other = (run.folder / "model" / "adapter_model.safetensors" for run in (resumed, whole))
    assert one.read_bytes() == other.read_bytes()
    assert not (tmp_path / "killed" / "checkpoints").exists()
    losses = [[line["loss"] for line in read_jsonl(run.folder / "log.jsonl") if "loss" in line] for run in (resumed, whole)]
    assert losses[0] == losses[1]
    assert resumed.results["cost"]["pairs"] == whole.results["cost"]["pairs"]
