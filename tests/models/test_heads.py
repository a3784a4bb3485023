"""The chunked head against log-softmax as written down, by autograd and by `gradcheck`; and which models it may serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equipoise.models import heads
from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.batch import pack
from equipoise.models.heads import HeadLogps, head_logps
from equipoise.models.logps import head_of, policy_logps
from tests.tiny import DIFFICULT, FAMILIES, pairs, tiny

register()
ROWS, HIDDEN, VOCAB = 23, 16, 41


def inputs(dtype: torch.dtype = torch.float64, bias: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    shift = torch.randn(VOCAB, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden, weight, shift, torch.randint(0, VOCAB, (ROWS,), generator=generator)


def written_out(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor:
    logits = hidden @ weight.T + (0 if bias is None else bias)
    return logits.log_softmax(-1)[torch.arange(len(target)), target]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("chunk", [5, 100], ids=["chunks", "one"])
@pytest.mark.parametrize("keep", [0, 2**30], ids=["computed again", "kept"])
def test_values_and_gradients(keep: int, chunk: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "KEEP_BYTES", keep)
    monkeypatch.setitem(heads.CHUNK_BYTES, "cpu", 4 * VOCAB * chunk)
    given = inputs(bias=bias)
    tensors = [value for value in given[:3] if value is not None]
    weights = torch.linspace(-2, 3, ROWS, dtype=torch.float64)
    expected = written_out(*given)
    torch.testing.assert_close(head_logps(*given), expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad((expected * weights).sum(), tensors)
    found = torch.autograd.grad((head_logps(*given) * weights).sum(), tensors)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, bias, target = inputs(bias=True)
    assert torch.autograd.gradcheck(lambda *values: HeadLogps.apply(*values, target), (hidden, weight, bias))


def test_a_frozen_head_gives_the_gradient_of_the_hidden_states_alone() -> None:
    hidden, weight, _, target = inputs()
    weight.requires_grad_(False)
    values = head_logps(hidden, weight, None, target)
    saved = [value.shape for value in values.grad_fn.saved_tensors if value is not None]  # type: ignore[union-attr]
    assert (ROWS, HIDDEN) in saved
    assert (ROWS, VOCAB) not in saved, "with the head frozen nothing of the vocabulary's size is kept"
    (found,) = torch.autograd.grad(values.sum(), hidden)
    (wanted,) = torch.autograd.grad(written_out(hidden, weight, None, target).sum(), hidden)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_large_logits_keep_their_digits() -> None:
    """Logits of ±1e4: the most likely token has log-prob 0, another −2e4 and no overflow on the way."""
    hidden = torch.tensor([[1e4], [1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    values = head_logps(hidden, weight, None, torch.tensor([0, 1]))
    assert values.tolist() == [0.0, -2e4]
    values.sum().backward()
    assert torch.isfinite(hidden.grad).all()  # type: ignore[arg-type]


def test_under_bfloat16_autocast_values_are_float32_and_gradients_those_of_their_tensors() -> None:
    hidden, weight, _, target = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head_logps(hidden, weight, None, target)
    assert values.dtype == torch.float32
    values.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    exact = written_out(hidden, weight, None, target)
    assert (values - exact).abs().max() < 0.1
    (wanted,) = torch.autograd.grad(exact.sum(), weight)
    assert (weight.grad - wanted).norm() / wanted.norm() < 0.02


SCALED = {"cohere", "granite", "gemma2"}


@pytest.mark.parametrize("name", sorted(FAMILIES | {"gemma2": DIFFICULT["gemma2"]}))
def test_models_that_change_their_logits_afterwards_keep_their_own_head(name: str) -> None:
    config = (FAMILIES | DIFFICULT)[name]()
    if name == "cohere":
        assert config.logit_scale != 1
    if name == "granite":
        config.logits_scaling = 8.0
    model: Any = tiny(name)
    if name == "granite":
        model.config.logits_scaling = 8.0
        model.logits_scaling = 8.0
    expected = "logits" if name in SCALED else "chunked"
    assert head_of(model, pack(pairs(2), "padded")) == expected


def test_the_models_own_layer_is_put_back() -> None:
    model: Any = tiny()
    layer = model.get_output_embeddings()
    with attention_of(model, NAME):
        policy_logps(model, pack(pairs(2)))
    assert "forward" not in layer.__dict__
    assert model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, layer.weight.shape[0])
