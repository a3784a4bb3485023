"""Lean LoRA layers: PEFT's numbers and gradients with fewer tensors; what is more than plain LoRA is left to PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear

from equipoise.models import layers
from equipoise.models._lora import AddLora
from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.batch import pack
from equipoise.models.layers import lean_layers
from equipoise.models.logps import policy_logps, unwrapped
from equipoise.training._simulate import Simulation
from equipoise.training.settings import TrainSettings
from tests.tiny import FAMILIES, pairs, tiny

register()


def adapted(family: str = "llama", **changes: Any) -> Any:
    """A tiny model under adapters that are not zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **changes)
    return get_peft_model(tiny(family), config).train()


def gradients(model: Any, autocast: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of some rows and the gradients of what is trained."""
    model.zero_grad()
    torch.manual_seed(1)
    with attention_of(unwrapped(model), NAME), lean_layers(model):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            values = policy_logps(model, pack(pairs(3)))
        (values * torch.linspace(-1, 2, values.numel()).view_as(values)).sum().backward()
    return values.detach(), torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@pytest.fixture
def as_peft_has_it(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and LoRA layers are PEFT's from then on."""
    return lambda: monkeypatch.setattr(layers, "is_lora", lambda module: False)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_values_and_gradients_are_those_of_peft(family: str, dropout: float, as_peft_has_it: Callable[[], None]) -> None:
    """Qwen2's and OPT's linear layers have biases."""
    model = adapted(family, lora_dropout=dropout)
    values, found = gradients(model)
    as_peft_has_it()
    theirs, expected = gradients(model)
    torch.testing.assert_close(values, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_in_16_bits_no_further_from_float32_than_peft(as_peft_has_it: Callable[[], None]) -> None:
    model = adapted()
    exact, expected = gradients(model)
    values, found = gradients(model, autocast=True)
    as_peft_has_it()
    theirs, other = gradients(model, autocast=True)
    assert (values - exact).abs().mean() <= 1.2 * (theirs - exact).abs().mean()
    assert (found - expected).norm() <= 1.2 * (other - expected).norm()


def test_gradcheck() -> None:
    output, hidden, down, up = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (3, 4), (2, 4), (5, 2)))
    assert torch.autograd.gradcheck(lambda output, *parts: AddLora.apply(output.clone(), *parts, 1.5), (output, hidden, down, up))


def replaced(model: Any) -> list[str]:
    """Names of the LoRA layers that ours stands in for."""
    with lean_layers(model):
        return [name for name, module in model.named_modules() if type(module) is Linear and "forward" in vars(module)]


def outputs(model: Any, lean: bool) -> torch.Tensor:
    with torch.no_grad():
        if not lean:
            return model(input_ids=torch.arange(7)[None]).logits
        with lean_layers(model):
            return model(input_ids=torch.arange(7)[None]).logits


@pytest.mark.parametrize("kind", ["dora", "bias", "two", "merged", "disabled", "16-bit base", "hooks"])
def test_what_is_more_than_plain_lora_is_left_to_peft(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(use_dora=kind == "dora", lora_bias=kind == "bias").eval()
    if kind == "two":
        model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
    elif kind == "merged":
        model.merge_adapter()
    elif kind == "disabled":
        model.base_model.disable_adapter_layers()
    elif kind == "hooks":
        for module in model.modules():
            if hasattr(module, "base_layer"):
                module.base_layer.register_full_backward_hook(lambda *_: None)
    elif kind == "16-bit base":
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
    expected = outputs(model, lean=False)
    assert replaced(model), "what is refused below is not the trial"

    def refuse(*_: Any) -> None:
        raise AssertionError("ours ran")

    monkeypatch.setattr(AddLora, "apply", refuse)
    torch.testing.assert_close(outputs(model, lean=True), expected)


def test_the_trial_does_not_depend_on_autocast() -> None:
    """The start check of a 16-bit run is the first to ask."""
    model = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert replaced(model)


def test_adapters_may_be_switched_off_inside() -> None:
    """As the reference pass of a LoRA run does."""
    model = adapted().eval()
    with lean_layers(model), torch.no_grad(), model.disable_adapter():
        off = model(input_ids=torch.arange(7)[None]).logits
    torch.testing.assert_close(off, outputs(unwrapped(tiny("llama")), lean=False))


def test_a_layer_that_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of PEFT, say: the trial has to see it."""
    model, own = adapted(), Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, hidden: 2 * own(self, hidden))
    assert not replaced(model)


def test_less_is_moved_and_taken(as_peft_has_it: Callable[[], None]) -> None:
    settings = TrainSettings(model_name_or_path="unused", output_dir="unused", use_peft=True)

    def footprint() -> Any:
        return Simulation(settings, "logps", config=FAMILIES["llama"]()).run([(40, (30, 20))], "packed")

    ours = footprint()
    as_peft_has_it()
    theirs = footprint()
    assert ours.forward_moved < 0.85 * theirs.forward_moved
    assert ours.flops == pytest.approx(theirs.flops, rel=1e-6), "the same products are counted"
    assert ours.peak <= theirs.peak
