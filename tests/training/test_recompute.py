"""Activation checkpointing: half the memory, the same gradient, in every layout and with everything random in the right place."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.data.plan import Planner
from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.batch import Form, pack
from equipoise.models.logps import head_of, unwrapped
from equipoise.objectives._load import build
from equipoise.reference.build import build as build_store
from equipoise.reference.key import Context
from equipoise.reference.store import ReferenceStore
from equipoise.training._step import StepRunner
from equipoise.training._streams import Forward, Stream
from equipoise.training.fit import fit
from equipoise.training.meters import Meters
from equipoise.training.settings import TrainSettings
from tests.tiny import pairs, preference_dicts, row, tiny, tokenizer

register()
CPU = torch.device("cpu")
FORMS: tuple[Form, ...] = ("packed", "separate", "padded")


def stream_of(method: str, folder: Path) -> Stream:
    """Rows with references under another random model, so that no log-ratio is zero."""
    kto = [row(f"k{n}", 2 + 3 * n, {"sample": 1 + n, "mismatched": 7 - n}, label=n % 2) for n in range(6)]
    rows = kto if method == "kto" else pairs(6)
    reference = tiny(seed=7)
    store = ReferenceStore(folder, Context("seed 7", "none", "float32", "packed/cpu"))
    with attention_of(reference, NAME):
        build_store(reference, rows, store, "packed", 64, CPU)
    return Stream("main", rows, build({"name": method}), store=store)


def policy(lora: bool, dropout: float, family: str = "llama") -> Any:
    model: Any = tiny(family, seed=3)
    model.config.attention_dropout = dropout
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    head_of(model, pack(pairs(1), "padded"))  # which probes a new model once: its layers would be counted
    return model


def recompute(model: Any) -> None:
    """As the Trainer switches it on."""
    inner = unwrapped(model)
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def gradient(stream: Stream, form: Form, lora: bool, dropout: float, checkpointed: bool, low: bool = False) -> tuple[torch.Tensor, int]:
    """Gradient of one step cut into micro-batches, and how often the first layer ran forwards."""
    model = policy(lora, dropout)
    if checkpointed:
        recompute(model)
    model.train()
    runs = [0]
    attention = unwrapped(model).model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    planner = Planner((stream.lengths,), len(stream.rows), 60, shuffle=False, shared=form == "packed", padded=form == "padded")
    autocast = (lambda: torch.autocast("cpu", dtype=torch.bfloat16)) if low else nullcontext
    forward = Forward(form, CPU, autocast=autocast)
    runner = StepRunner([stream], forward, Meters(), backward=lambda loss: loss.backward(), sync=lambda last: nullcontext())
    torch.manual_seed(11)
    with forward.attention(unwrapped(model)):
        runner.run(model, planner.step(0))
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]), runs[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
def test_recomputed_activations_give_the_same_gradient(form: Form, lora: bool, dropout: float, tmp_path: Path) -> None:
    stream = stream_of("dpo", tmp_path)
    kept, forwards = gradient(stream, form, lora, dropout, checkpointed=False)
    again, more = gradient(stream, form, lora, dropout, checkpointed=True)
    assert more == 2 * forwards > 2, "every layer ran once more in the backward pass"
    assert kept.norm() > 1e-3
    assert (again - kept).norm() / kept.norm() < 1e-6
    if dropout:
        without, _ = gradient(stream, form, lora, 0.0, checkpointed=False)
        assert (kept - without).norm() / without.norm() > 1e-2, "dropout was on"


@pytest.mark.parametrize("form", FORMS)
def test_coupled_objectives_recompute_with_the_dropout_of_their_first_pass(form: Form, tmp_path: Path) -> None:
    """KTO's baseline takes two passes over the step, and checkpointing a third: all of them must drop the same activations."""
    stream = stream_of("kto", tmp_path)
    assert stream.objective.needs.coupled
    kept, forwards = gradient(stream, form, True, 0.3, checkpointed=False)
    again, more = gradient(stream, form, True, 0.3, checkpointed=True)
    assert more == forwards + forwards // 2, "only the pass with gradient is recomputed"
    assert (again - kept).norm() / kept.norm() < 1e-6


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("form", FORMS)
def test_under_bfloat16_autocast_too(form: Form, lora: bool, tmp_path: Path) -> None:
    """Recomputing repeats the same roundings, so even here 1e-6 holds; bfloat16 itself is 1e-2 away from float32."""
    stream = stream_of("dpo", tmp_path)
    kept, _ = gradient(stream, form, lora, 0.3, checkpointed=False, low=True)
    again, _ = gradient(stream, form, lora, 0.3, checkpointed=True, low=True)
    exact, _ = gradient(stream, form, lora, 0.3, checkpointed=False)
    assert (again - kept).norm() / kept.norm() < 1e-6
    assert (kept - exact).norm() / exact.norm() > 1e-4, "autocast was on"


def test_the_row_mask_is_still_there_when_layers_run_again(tmp_path: Path) -> None:
    """The block that told the model its rows is left before the backward pass: the mask travels as an argument, not as a global."""
    from equipoise.models.attention import RowMask, _current

    stream, model = stream_of("dpo", tmp_path), policy(False, 0.0)
    recompute(model)
    model.train()
    seen: list[tuple[bool, Any]] = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, positional, named: seen.append((_current.get() is not None, named["attention_mask"])), with_kwargs=True
    )
    forward = Forward("packed", CPU)
    with forward.attention(model):
        scored = forward.scored(model, stream, [0, 1])
        assert scored.policy is not None
        scored.policy.sum().backward()
    assert [inside for inside, _ in seen] == [True, False]
    assert all(isinstance(mask, RowMask) and mask.rows == pack([stream.rows[0], stream.rows[1]], "packed").rows for _, mask in seen)


@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
def test_fit_really_recomputes_and_ends_with_the_same_losses(use_peft: bool, tmp_path: Path) -> None:
    from equipoise.core.files import read_jsonl

    steps, found = 3, {}
    for wanted in (False, True):
        model: Any = tiny(seed=5)
        runs = [0, 0]

        def count(module: Any, *_: Any, runs: list[int] = runs) -> None:
            runs[module.training] += 1

        model.model.layers[0].self_attn.register_forward_pre_hook(count)
        run = fit(
            TrainSettings.make(
                {
                    "model_name_or_path": "in memory",
                    "output_dir": str(tmp_path / f"{wanted}"),
                    "reference_store": str(tmp_path / "store"),
                    "gradient_checkpointing": wanted,
                    "use_peft": use_peft,
                    "lora_dropout": 0.2,
                    "learning_rate": 1e-2,
                    "per_device_train_batch_size": 4,
                    "token_budget": 10_000,
                    "max_steps": steps,
                }
            ),
            model=model,
            tokenizer=tokenizer(),
            train_dataset=preference_dicts(),
        )
        found[wanted] = (runs[True], [line["loss"] for line in read_jsonl(run.folder / "log.jsonl") if "loss" in line])
    assert found[False][0] == steps
    assert found[True][0] == 2 * steps
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-5)
