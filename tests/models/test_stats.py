"""Statistics of the next-token distribution: by hand, by gradcheck, and the same through both heads of a model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from equipoise.core.errors import NumericsError
from equipoise.models import heads
from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.batch import pack
from equipoise.models.logps import policy_logps, policy_statistics, reply_logits
from equipoise.models.stats import NAMES, head_statistics, statistics
from equipoise.objectives._base import STATS
from tests.tiny import pairs, tiny

register()


def test_by_hand() -> None:
    # π = (½, ¼, ¼) from logits that sum to 8 before the softmax; π_ref uniform.
    logits = torch.tensor([[4.0, 2.0, 2.0]], dtype=torch.float64).log()
    table = statistics(logits, torch.tensor([1]), NAMES, torch.zeros(1, 3, dtype=torch.float64))
    expected = [
        math.log(0.25),
        math.log(8),
        1.5 * math.log(2),
        math.log(1 / 4 + 2 / 16),
        (math.log(2 / 3) + 2 * math.log(4 / 3)) / 3,
    ]
    assert table[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_the_names_are_those_objectives_may_ask_for() -> None:
    assert set(NAMES) == set(STATS)


def test_a_policy_equal_to_its_reference_has_no_divergence_and_no_gradient_of_it() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    divergence = statistics(logits, torch.zeros(4, dtype=torch.long), ["kl_ref"], logits.detach())[:, 1]
    (gradient,) = torch.autograd.grad(divergence.sum(), logits)
    assert divergence.abs().max() < 1e-14
    assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("bias", [False, True])
def test_in_chunks_with_gradcheck(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(heads.CHUNK_BYTES, "cpu", 4 * 7 * 2)
    generator = torch.Generator().manual_seed(1)
    shapes = [(5, 3), (7, 3)] + ([(7,)] if bias else [])
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    target, reference = torch.tensor([0, 6, 2, 3, 3]), torch.randn(5, 7, generator=generator, dtype=torch.float64)

    def run(hidden: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        return head_statistics(hidden, weight, shift, target, NAMES, reference)

    whole = values[0] @ values[1].T + (values[2] if bias else 0)
    torch.testing.assert_close(run(*values), statistics(whole, target, NAMES, reference), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(run, tuple(values))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt350m"])
def test_both_heads_of_a_model_agree(name: str) -> None:
    model: Any = tiny(name, seed=1).double()
    batch = pack(pairs(3))
    with attention_of(model, NAME):
        with torch.no_grad():
            theirs = reply_logits(tiny_reference(name), batch)
        found = {}
        for head in ("chunked", "logits"):
            logps, stats = policy_statistics(model, batch, NAMES, theirs, head)  # type: ignore[arg-type]
            torch.testing.assert_close(logps, policy_logps(model, batch))
            model.zero_grad()
            (logps.sum() + sum((number + 1) * value.sum() for number, value in enumerate(stats.values()))).backward()
            found[head] = (stats, {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None})
    for key in NAMES:
        torch.testing.assert_close(found["chunked"][0][key], found["logits"][0][key], rtol=1e-9, atol=1e-10)
        assert found["chunked"][0][key].abs().sum() > 0
    for key, gradient in found["chunked"][1].items():
        torch.testing.assert_close(gradient, found["logits"][1][key], rtol=1e-8, atol=1e-10)


def tiny_reference(name: str) -> Any:
    model: Any = tiny(name, seed=2).double()
    model.set_attn_implementation(NAME)
    return model


def test_what_cannot_be_computed_raises() -> None:
    logits = torch.zeros(1, 2)
    with pytest.raises(NumericsError, match="reference logits"):
        statistics(logits, torch.tensor([0]), ["kl_ref"])
    with pytest.raises(NumericsError, match="not known"):
        statistics(logits, torch.tensor([0]), ["variance"])
