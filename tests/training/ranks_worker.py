"""One of several processes of `test_ranks.py`: runs every case once, since importing the Trainer costs seconds.

`python -m tests.training.ranks_worker FOLDER`, with the variables torchrun sets. What a rank saw is left in FOLDER.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from equipoise.core import files
from equipoise.core.errors import EquipoiseError
from equipoise.data.plan import Planner
from equipoise.data.rows import TokenRow
from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.gradients import gradients_in_place
from equipoise.models.logps import unwrapped
from equipoise.objectives._load import build
from equipoise.reference.build import build as build_store
from equipoise.reference.key import Context
from equipoise.reference.live import LiveReference
from equipoise.reference.store import ReferenceStore
from equipoise.training import _references, _rows
from equipoise.training import fit as fit_module
from equipoise.training._model import make_trainable
from equipoise.training._ranks import Ranks
from equipoise.training._step import StepRunner
from equipoise.training._streams import Forward, Stream
from equipoise.training.fit import fit
from equipoise.training.meters import Meters
from equipoise.training.settings import TrainSettings
from equipoise.training.sharding import shard
from tests.tiny import pairs, preference_dicts, row, tiny

CPU = torch.device("cpu")
SPECS = ("dpo", "kto", "sft", "bco", "aot", "tdpo2")
WRAPS = ("ddp", "lora", "fsdp", "fsdp-lora")
BUDGET = 40


# ---- one step, by the runner itself


def step_rows(name: str) -> list[TokenRow]:
    """A few units, one of them as long as all others: one rank has more micro-batches, and the other idles."""
    if name == "sft":
        return [*[row(f"s{number}", 3 + number, {"gold": 1 + 3 * number}) for number in range(6)], row("long", 20, {"gold": 90})]
    if name == "kto":
        short = [row(f"k{number}", 3 + number, {"sample": 4 + number, "mismatched": 9 - number}, label=number % 2) for number in range(4)]
        return [*short, row("long", 20, {"sample": 45, "mismatched": 45}, label=1)]
    if name == "bco":
        short = [row(f"b{number}", 3 + number, {"sample": 4 + number}, label=number % 2) for number in range(6)]
        return [*short, row("long", 20, {"sample": 90}, label=1)]
    return [*pairs(4), row("long", 20, {"chosen": 40, "rejected": 50})]


def step_stream(name: str, folder: Path) -> Stream:
    """The rows with references under another random model, so that no log-ratio is zero."""
    stream = Stream("main", step_rows(name), build({"name": name}))
    if stream.objective.needs.reference == "stored":
        reference = tiny(seed=7)
        stream.store = ReferenceStore(folder / name, Context("seed 7", "none", "float32", "packed/cpu"))
        with attention_of(reference, NAME):
            # Every process fills its own: the values are the same, and this is not what is tried here.
            build_store(reference, stream.rows, stream.store, "packed", 64, CPU, rank=0, world_size=1)
    return stream


def step_plan(stream: Stream, world_size: int) -> Planner:
    return Planner((stream.lengths,), len(stream.rows), BUDGET, shuffle=False, world_size=world_size)


@contextmanager
def unsynchronised(model: DistributedDataParallel) -> Iterator[None]:
    """As the trainer goes through all micro-batches of a step but the last."""
    with model.no_sync(), gradients_in_place():
        yield


def step_model(wrap: str) -> torch.nn.Module:
    """A tiny model; an adapter's weights are random on both sides, or half of its gradients would be zero."""
    model: Any = tiny(seed=3)
    if wrap.endswith("lora"):
        settings = TrainSettings.make({"model_name_or_path": "none", "use_peft": True, "lora_r": 4})
        model, _ = make_trainable(model, settings, "logps")
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def step_gradient(name: str, wrap: str, folder: Path, rank: int, world_size: int) -> dict[str, np.ndarray]:
    """Gradients of a step by parameter, the loss, and how many micro-batches idled."""
    stream = step_stream(name, folder)
    step = step_plan(stream, world_size).step(0)
    plain = step_model(wrap)
    model: Any = plain
    sync: Callable[[bool], AbstractContextManager[Any]] = lambda last: gradients_in_place()  # noqa: E731
    if world_size > 1 and wrap.startswith("fsdp"):
        shard(model, CPU)
        assert isinstance(model, FSDPModule)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        sync = lambda last: nullcontext()  # noqa: E731
    elif world_size > 1:
        model = DistributedDataParallel(plain)
        sync = lambda last: nullcontext() if last else unsynchronised(model)  # noqa: E731
    live = LiveReference(tiny(seed=7))
    live.model.set_attn_implementation(NAME)
    runner = StepRunner([stream], Forward("packed", CPU, live=live), Meters(), lambda loss: loss.backward(), sync, rank, world_size)
    with attention_of(unwrapped(plain), NAME):
        loss = float(runner.run(model, step))
    gradients = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).numpy()
        for name, value in ((name, parameter.grad) for name, parameter in plain.named_parameters())
        if value is not None
    }
    return gradients | {"loss": np.array(loss), "idle": np.array(sum(micro.idle for micro in step.ranks[rank]))}


# ---- whole runs


class StoppedError(Exception):
    """What stands for a kill: nothing after it is written."""


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == self.step:
            raise StoppedError


class Watch(TrainerCallback):
    """Whether training saw what it should: DTensor parameters under FSDP."""

    kinds: set[str] = set()  # noqa: RUF012

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        self.kinds |= {type(parameter).__name__ for parameter in model.parameters()}


RUNS: dict[str, dict[str, Any]] = {
    "full": {"optim": "sgd", "learning_rate": 0.1},
    "lora": {"optim": "sgd", "learning_rate": 1.0, "use_peft": True, "lora_r": 4},
    "kto": {"optim": "sgd", "learning_rate": 0.1, "streams": [{"objective": {"name": "kto"}}]},
    "fsdp": {"optim": "sgd", "learning_rate": 0.1, "fsdp": True},
    "fsdp-lora": {"optim": "sgd", "learning_rate": 1.0, "fsdp": True, "use_peft": True, "lora_r": 4},
    "fsdp-best": {"optim": "sgd", "learning_rate": 0.1, "fsdp": True, "eval_steps": 2, "load_best_model_at_end": True},
}
RESUMED: dict[str, dict[str, Any]] = {
    "adam-lora": {"use_peft": True, "lora_r": 4, "lora_dropout": 0.2, "learning_rate": 1e-2},
    "adam-fsdp": {"fsdp": True, "learning_rate": 1e-2},
}
MOVED = ("full", "fsdp")


def run_settings(base: Path, out: Path, world_size: int, **values: Any) -> TrainSettings:
    """Six units a step on any number of processes: 13 rows make steps of six, six and one, whose other rank idles."""
    return TrainSettings.make(
        {
            "model_name_or_path": str(base),
            "output_dir": str(out),
            "per_device_train_batch_size": 6 // world_size,
            "num_train_epochs": 2,
            "token_budget": 60,
            "save_steps": 2,
            "save_total_limit": 5,
            "reference_store": str(out.parent / f"store-{out.name}"),
        }
        | values
    )


def data() -> dict[str, Any]:
    return {"train_dataset": preference_dicts(13), "eval_dataset": preference_dicts(3, seed=9)}


def stopped(settings: TrainSettings, step: int) -> None:
    try:
        fit(settings, callbacks=[StopAt(step)], **data())
    except StoppedError:
        return
    raise AssertionError("it was not stopped")


def refusals(base: Path, folder: Path) -> dict[str, str]:
    """What every rank hears when only rank 0 looked."""
    heard: dict[str, str] = {}
    cases: dict[str, Callable[[], Any]] = {
        "stage": lambda: fit(run_settings(base, folder / "full", 2, learning_rate=0.5), **data()),
        "data": lambda: fit(run_settings(base, folder / "none", 2), train_dataset=[{"prompt": "w1", "chosen": "w2"}]),
        "agree": lambda: Ranks.join().agree("the weather", torch.distributed.get_rank()),
    }
    for name, case in cases.items():
        try:
            case()
        except EquipoiseError as error:
            heard[name] = f"{type(error).__name__}: {error}"
    return heard


def counted(base: Path, folder: Path) -> dict[str, Any]:
    """A run with its once-only work counted: calls of the tokenizer, hashes of weights, files written atomically."""
    calls: dict[str, Any] = {"tokenise": 0, "weights": 0, "identity": 0, "written": []}

    def count(module: Any, name: str, key: str) -> None:
        original = getattr(module, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls[key] += 1
            return original(*args, **kwargs)

        setattr(module, name, wrapper)

    count(_rows, "tokenise", "tokenise")
    count(_references, "forward_fingerprint", "weights")
    count(fit_module, "model_identity", "identity")
    atomic = files.atomic

    def listed(path: Any, *args: Any, **kwargs: Any) -> Any:
        calls["written"].append(Path(path).name)
        return atomic(path, *args, **kwargs)

    files.atomic = listed
    run = fit(run_settings(base, folder / "counted", 2), **data())
    files.atomic = atomic
    return calls | {"steps": run.results["steps"], "reference_tokens": run.results["cost"]["reference_tokens"]}


def main(folder: Path) -> None:
    """Every case, in the same order on every rank."""
    register()
    torch.set_num_threads(1)
    ranks = Ranks.join()
    base, mine = folder / "base", folder / f"rank-{ranks.rank}"
    mine.mkdir()
    for name in SPECS:
        for wrap in WRAPS:
            np.savez(mine / f"step-{name}-{wrap}.npz", **step_gradient(name, wrap, mine / "stores", ranks.rank, ranks.size))
    report: dict[str, Any] = {"counted": counted(base, folder), "kinds": {}}
    for name, values in RUNS.items():
        watch = Watch()
        watch.kinds = set()
        run = fit(run_settings(base, folder / name, 2, **values), callbacks=[watch], **data())
        report["kinds"][name] = sorted(watch.kinds)
        report[name] = dict(run.results)
        assert fit(run_settings(base, folder / name, 2, **values), **data()).skipped
    for name, values in RESUMED.items():
        fit(run_settings(base, folder / f"{name}-whole", 2, **values), **data())
        broken = run_settings(base, folder / f"{name}-broken", 2, **values)
        stopped(broken, 5)
        report[f"{name}-broken"] = dict(fit(broken, **data()).results)
    for name in MOVED:
        stopped(run_settings(base, folder / f"{name}-2-to-1", 2, **RUNS[name]), 5)
        report[f"{name}-1-to-2"] = dict(fit(run_settings(base, folder / f"{name}-1-to-2", 1, **RUNS[name]), **data()).results)
    report["refused"] = refusals(base, folder)
    (mine / "report.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
