"""On a GPU: runs of `fit`, resume, memory that does not hold all logits, and a step that does not wait for the device."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainerCallback

from equipoise.core.files import read_jsonl, write_jsonl
from equipoise.data.plan import Planner
from equipoise.models import _flex, _varlen
from equipoise.models._elementwise import kernels_for
from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.batch import pack
from equipoise.models.layers import watching
from equipoise.models.logps import policy_logps
from equipoise.objectives._load import build
from equipoise.reference.build import build as build_store
from equipoise.reference.key import Context
from equipoise.reference.store import ReferenceStore
from equipoise.training._step import StepRunner
from equipoise.training._streams import Forward, Stream
from equipoise.training.estimate import Estimator
from equipoise.training.fit import fit
from equipoise.training.machine import Machine
from equipoise.training.meters import Meters
from equipoise.training.settings import TrainSettings
from tests.gpu.shapes import LENGTHS, model, rows
from tests.tiny import VOCAB, preference_dicts, tokenizer

pytestmark = pytest.mark.gpu
register()
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose heads the kernel serves, with a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    made = model(
        "llama-3.2-1b",
        layers=2,
        device="cpu",
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def settings(base: Path, out: Path, **values: Any) -> TrainSettings:
    return TrainSettings.make(
        {
            "model_name_or_path": str(base),
            "output_dir": str(out),
            "reference_store": str(out.parent / "store"),
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 16,
            "num_train_epochs": 2,
            **values,
        }
    )


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"bf16": True},
        {"dtype": "bfloat16"},
        {"bf16": True, "use_peft": True, "lora_r": 4},
        {"bf16": True, "gradient_checkpointing": True},
        {"bf16": True, "use_peft": True, "lora_r": 4, "gradient_checkpointing": True},
    ],
    ids=["float32", "autocast", "bfloat16", "lora", "recomputed", "lora-recomputed"],
)
def test_fit_learns(base: Path, tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[bool] = []
    kernel = _varlen if values else _flex
    usable = kernel.usable
    monkeypatch.setattr(kernel, "usable", lambda *arguments: served.append(usable(*arguments)) or served[-1])
    run = fit(settings(base, tmp_path / "out", **values), train_dataset=preference_dicts(64))
    assert run.results["form"] == "packed"
    assert served.count(True) > served.count(False), "the kernel must have run, not the fallback"
    log = [line["loss"] for line in read_jsonl(run.folder / "log.jsonl") if "loss" in line]
    assert len(log) == 8
    assert log[0] == pytest.approx(math.log(2), abs=1e-5 if not values else 1e-2)
    assert all(math.isfinite(loss) for loss in log)
    assert min(log[4:]) < log[0], log


@pytest.mark.parametrize("config", ["alone", "ddp", "fsdp2"])
def test_accelerate_launches_it(config: str, base: Path, tmp_path: Path) -> None:
    """The shipped configs with one process, on this device: the losses of a run without a launcher."""
    import transformers

    write_jsonl(tmp_path / "pairs.jsonl", preference_dicts(64))
    recipe = tmp_path / "recipe.yaml"
    wanted = settings(base, tmp_path / "launched", bf16=True, streams=[{"data": {"dataset_name": str(tmp_path / "pairs.jsonl")}}])
    recipe.write_text(yaml.safe_dump(wanted.model_dump(mode="json", exclude_unset=True)))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"examples/accelerate/{config}.yaml", "--num_processes", "1"]
    command = [sys.executable, *([] if config == "alone" else launcher), "-m", "equipoise", "train", "--config", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = fit(settings(base, tmp_path / "whole", bf16=True), train_dataset=preference_dicts(64))
    losses = [
        [line["loss"] for line in read_jsonl(folder / "log.jsonl") if "loss" in line] for folder in (tmp_path / "launched", whole.folder)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "launched" / "model")
    before = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert any(not torch.equal(one, other) for one, other in zip(trained.parameters(), before.parameters(), strict=True))


class Stop(TrainerCallback):
    """Ends the process's run, as a kill would, after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_where_a_whole_one_does(base: Path, tmp_path: Path) -> None:
    data = preference_dicts(64)
    wanted = settings(base, tmp_path / "stopped", bf16=True, save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        fit(wanted, train_dataset=data, callbacks=[Stop(5)])
    resumed = fit(wanted, train_dataset=data)
    assert resumed.results["resumed_from"] == "checkpoint-4"
    whole = fit(settings(base, tmp_path / "whole", bf16=True, save_steps=2), train_dataset=data)
    losses = [[line["loss"] for line in read_jsonl(run.folder / "log.jsonl") if "loss" in line] for run in (resumed, whole)]
    # Atomic additions in backward kernels are not in one order, so equal to rounding and not to the bit.
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


def test_memory_never_holds_all_logits() -> None:
    """Forward and backward over R reply tokens of a 151,936-token vocabulary take less than one float32 [R, V]."""
    policy = model("qwen2.5-0.5b", layers=1).train()
    batch = pack(rows([(40, (250, 250))] * 16)).to(CUDA)
    replies, vocabulary = len(batch.target), policy.config.vocab_size
    with attention_of(policy, NAME), torch.autocast("cuda", dtype=torch.bfloat16):
        policy_logps(policy, pack(rows(LENGTHS)).to(CUDA)).sum().backward()  # kernels compiled, gradients allocated
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        policy_logps(policy, batch).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < replies * vocabulary * 4, f"{peak / 2**30:.2f} GiB for [R, V] of {replies * vocabulary * 4 / 2**30:.2f} GiB"


@pytest.mark.parametrize("kind", ["segments", "flex"])
def test_attention_does_not_wait_for_the_device(kind: str) -> None:
    """Making the mask and running the kernel, forward and backward, with waiting made an error."""
    spans = pack(rows(LENGTHS)).rows
    size = sum(span.length for span in spans)
    parts = [torch.randn(1, heads, size, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (14, 2, 2)]
    cotangent = torch.randn(1, size, 14, 64, device="cuda", dtype=torch.bfloat16)

    def once() -> None:
        kernel: Any = _varlen if kind == "segments" else _flex
        assert kernel.usable(*parts, 0.0)
        if kind == "segments":
            output = _varlen.attend(*parts, _varlen.layout(spans, CUDA), 100, None)
        else:
            output = _flex.attend(*parts, _flex.block_mask(spans, 100, CUDA), None)
        output.backward(cotangent)

    once()
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(stream: Stream, budget: int, policy: Any) -> tuple[int, list[str]]:
    """How many micro-batches a step was cut into, and where it waited for the device."""
    planner = Planner((stream.lengths,), len(stream.rows), budget, shuffle=False)
    low = partial(torch.autocast, "cuda", dtype=torch.bfloat16)
    forward = Forward("packed", CUDA, autocast=low, kernels=kernels_for(CUDA, None))
    with torch.no_grad(), attention_of(policy, NAME), low(), watching(policy):
        policy_logps(policy, pack(stream.rows[:2]).to(CUDA))
    runner = StepRunner([stream], forward, Meters(), backward=lambda loss: loss.backward(), sync=lambda last: nullcontext())
    step = planner.step(0)
    with attention_of(policy, NAME):
        runner.run(policy, step)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                runner.run(policy, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return len(step.ranks[0]), [f"{item.filename}:{item.lineno}" for item in seen if "synchronizing" in str(item.message)]


def test_a_step_waits_as_often_however_it_is_cut(tmp_path: Path) -> None:
    """Once a step may wait (is its loss finite?), a micro-batch not; transformers' own look at the positions is let through."""
    policy = model("llama-3.2-1b", layers=1, vocab_size=2048, hidden_size=256, num_attention_heads=4, num_key_value_heads=2).train()
    data = rows([(130, (60, 70))] * 32, 2048)
    store = ReferenceStore(tmp_path, Context("gpu", "none", "float32", "packed"))
    with attention_of(policy, NAME):
        build_store(policy, data, store, "packed", 4096, CUDA)
    stream = Stream("main", data, build({"name": "dpo"}), store=store)
    few, many = waits(stream, 8192, policy), waits(stream, 1024, policy)
    assert few[0] < many[0]
    ours = [[place for place in places if "masking_utils" not in place] for _, places in (few, many)]
    assert len(ours[1]) <= len(ours[0]), f"waits a micro-batch: {sorted(set(ours[1]))}"


@pytest.mark.parametrize("values", [{"bf16": True}, {"bf16": True, "use_peft": True}, {}], ids=["autocast", "lora", "float32"])
def test_the_plan_says_what_memory_a_run_takes(values: dict[str, Any], tmp_path: Path) -> None:
    """Within 20 % of what torch handed out at the worst moment."""
    made = model("llama-3.2-1b", layers=4, device="cpu", vocab_size=32000, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    made.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    data = rows([(130, (60, 70)), (40, (200, 30)), (300, (90, 100))] * 16, 32000)
    wanted = settings(tmp_path / "base", tmp_path / "out", token_budget=8192, max_steps=3, per_device_train_batch_size=48, **values)
    lengths = [[(len(row.prompt), tuple(len(branch.ids) for branch in row.branches)) for row in data]]
    told = Estimator(wanted, lengths, Machine("cuda", 1e14, 1e14)).estimate().memory
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fit(wanted, train_dataset=data)
    taken = torch.cuda.max_memory_allocated() - before
    assert told.peak == pytest.approx(taken, rel=0.2), told.as_json()
