"""Lean layers: the families' own numbers and gradients, less kept, and nothing replaced that computes something else."""

from __future__ import annotations

from contextlib import nullcontext
from threading import Thread
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from equipoise.core.errors import UsageError
from equipoise.models import _elementwise, _rows, layers
from equipoise.models._compile import COMPILED_SHAPES, with_open_shapes
from equipoise.models._elementwise import EAGER, Kernels, compiled
from equipoise.models._rows import RowAttention
from equipoise.models.attention import NAME, RowMask, attention_of, register
from equipoise.models.batch import Span, pack
from equipoise.models.layers import lean_layers
from equipoise.models.logps import policy_logps
from equipoise.training import _simulate
from equipoise.training._simulate import Simulation
from equipoise.training.settings import TrainSettings
from tests.tiny import FAMILIES, pairs, tiny

register()


def replaced(model: Any) -> set[str]:
    with lean_layers(model):
        return {name for name, module in model.named_modules() if "forward" in vars(module)}


def run(layer: Any, hidden: torch.Tensor, lean: bool) -> list[torch.Tensor]:
    """Output, gradient of the input, gradients of the weights."""
    hidden = hidden.clone().requires_grad_()
    layer.zero_grad()
    with lean_layers(layer) if lean else nullcontext():
        output = layer(hidden)
    (output.float() * torch.linspace(-1, 2, output.numel()).view(output.shape)).sum().backward()
    return [output.detach(), hidden.grad, *(weight.grad.clone() for weight in layer.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm(weights: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(16, eps=1e-3).to(weights)
    torch.nn.init.normal_(norm.weight)
    hidden = torch.randn(2, 5, 16).to(dtype)
    (theirs, *expected), (ours, *found) = run(norm, hidden, False), run(norm, hidden, True)
    assert torch.equal(ours, theirs)
    low = torch.bfloat16 in (weights, dtype)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2 if low else 1e-5, atol=5e-2 if low else 1e-6)


def test_rms_norm_by_hand() -> None:
    """x = (3, 4), weight (1, 2), ε = 0: mean x² = 12.5, y = (0.8485…, 2.2627…); dy₀/dx₀ = (1/√12.5)(1 − 9/25)."""
    hidden, weight = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.tensor([1.0, 2.0], requires_grad=True)
    output = layers.RMSNorm.apply(hidden, weight, 0.0, None, EAGER)
    scale = 12.5**-0.5
    torch.testing.assert_close(output, torch.tensor([[3 * scale, 8 * scale]]))
    output[0, 0].backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[scale * (1 - 9 / 25), -scale * 12 / 25]]))
    torch.testing.assert_close(weight.grad, torch.tensor([3 * scale, 0.0]))


def mlp(**changes: Any) -> Any:
    config = FAMILIES["llama"]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return LlamaMLP(config)


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_gated_mlp(lora: bool) -> None:
    layer = mlp()
    if lora:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False), layer)
        layer.down_proj.base_layer.weight.requires_grad_(True)
        for weight in layer.parameters():
            weight.requires_grad_(True)
    assert replaced(layer) == ({"", "gate_proj", "up_proj", "down_proj"} if lora else {""})
    hidden = torch.randn(2, 5, 32)
    (theirs, *expected), (ours, *found) = run(layer, hidden, False), run(layer, hidden, True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if lora else 0, atol=1e-6 if lora else 0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gated_product_gradcheck() -> None:
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *parts: layers.GatedProduct.apply(*parts, EAGER), (gate, up))


class OnePlus(LlamaRMSNorm):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + super().forward(hidden) / self.weight


class TwoInputs(LlamaRMSNorm):
    def forward(self, hidden: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(hidden * gate)


class Scaled(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


def test_what_computes_something_else_is_left_alone() -> None:
    config = FAMILIES["llama"]()
    for layer in (OnePlus(8), TwoInputs(8), Scaled(config), mlp(hidden_act="gelu")):
        assert replaced(layer) == set(), type(layer).__name__
    # In float32 the same numbers; of 16-bit inputs it makes another dtype.
    assert replaced(Olmo2RMSNorm(8)) == set()
    assert replaced(LlamaRMSNorm(8)) == {""}
    assert replaced(mlp()) == {""}


def test_which_layers_of_a_family() -> None:
    llama = replaced(tiny("llama"))
    assert {"model.norm", "model.layers.0.input_layernorm", "model.layers.1.mlp"} <= llama
    assert len(llama) == 5 + 2
    # Gemma scales by one plus the weight, and gates with GELU.
    assert replaced(tiny("gemma3")) == set()
    assert replaced(tiny("gpt2")) == set()


def test_somebody_elses_forward_is_left_alone() -> None:
    model = tiny("llama")
    own = model.model.norm.forward
    model.model.norm.forward = own
    with lean_layers(model):
        assert model.model.norm.forward is own


def test_layers_are_put_back_when_a_forward_fails() -> None:
    model = tiny("llama")
    with pytest.raises(ZeroDivisionError), lean_layers(model):
        raise ZeroDivisionError
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_the_models_gradients_and_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama").train()

    def gradient() -> torch.Tensor:
        model.zero_grad()
        with attention_of(model, NAME), layers.lean_layers(model):
            policy_logps(model, pack(pairs(4))).sum().backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    def kept() -> int:
        settings = TrainSettings(model_name_or_path="unused", output_dir="unused")
        return Simulation(settings, "logps", config=FAMILIES["llama"]()).run([(40, (30, 20))], "packed").kept

    ours, lean = gradient(), kept()
    for module in (layers, _simulate):
        monkeypatch.setattr(module, "lean_layers", lambda model: nullcontext())
    torch.testing.assert_close(ours, gradient(), rtol=1e-4, atol=1e-6)
    assert lean < 0.8 * kept()


@pytest.mark.parametrize("block", [128, 2], ids=["one block", "blocks"])
@pytest.mark.parametrize("window", [None, 4], ids=["full", "window"])
@pytest.mark.parametrize("groups", [1, 2], ids=["heads", "grouped"])
def test_row_attention_gradcheck(groups: int, window: int | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "BLOCK", block)
    rows = (Span(0, 3, (4, 2, 3)), Span(12, 1, (2,)))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 15, 8, generator=generator, dtype=torch.float64, requires_grad=True) for heads in (2 * groups, 2, 2)
    )
    pieces = RowMask(rows, window).pieces(torch.float64)
    assert len({len(piece.blocks) for piece in pieces}) == (1 if block > 9 else 3)
    assert torch.autograd.gradcheck(lambda *parts: RowAttention.apply(*parts, pieces, None), (query, key, value))


def test_compiled_kernels_give_the_same_step() -> None:
    """On micro-batches of two sizes, which share the kernels."""
    try:
        kernels = compiled(torch.device("cpu"))
    except UsageError as error:
        pytest.skip(str(error))
    model = tiny("llama").train()

    def gradient(kernels: Kernels) -> torch.Tensor:
        model.zero_grad()
        for number in (1, 3):
            with attention_of(model, NAME), lean_layers(model, kernels):
                policy_logps(model, pack(pairs(number))).sum().backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    torch.testing.assert_close(gradient(kernels), gradient(EAGER), rtol=1e-4, atol=1e-5)


def test_a_kernel_that_comes_out_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(function: Any) -> Any:
        return (lambda *inputs: function(*inputs) * 1.5) if function is _elementwise.rotate else function

    monkeypatch.setattr(_elementwise, "with_open_shapes", wrong)
    with pytest.raises(UsageError, match=r"rotate is 0\.\d+ off"):
        compiled.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr(_elementwise, "with_open_shapes", lambda function: function)
    assert compiled.__wrapped__(torch.device("cpu")) == EAGER


def test_every_thread_may_compile_as_often() -> None:
    """torch's settings are a thread's own where they are context variables; backward passes on a GPU have a thread of their own."""
    seen: list[int] = []

    def work() -> None:
        with_open_shapes(lambda: None)()
        seen.append(torch._dynamo.config.recompile_limit)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [COMPILED_SHAPES]


def test_what_cannot_be_compiled_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(function: Any, **_: Any) -> Any:
        def fails(*_: Any) -> Any:
            raise RuntimeError("no compiler was found\nand a long trace")

        return fails

    monkeypatch.setattr(torch, "compile", refuses)
    with pytest.raises(UsageError, match=r"torch_compile=true.*no compiler was found\)\. They need a C\+\+ compiler; leave"):
        compiled.__wrapped__(torch.device("cpu"))
