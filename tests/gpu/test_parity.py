"""On a GPU: our log-probs and gradients against plain forwards, in float32 exactly and in bfloat16 within the model's own scatter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from equipoise.models import _flex, _varlen, heads
from equipoise.models._elementwise import EAGER, compiled, computing_with
from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.batch import pack
from equipoise.models.gradients import gradients_in_place
from equipoise.models.layers import lean_layers, watching
from equipoise.models.logps import policy_logps, token_logps
from equipoise.training.start_check import choose_form
from tests.gpu.shapes import LENGTHS, SHAPES, model, rows

pytestmark = pytest.mark.gpu
register()
ROWS = rows(LENGTHS)
REPLIES = sum(len(row.branches) for row in ROWS)
Autocast = Callable[[], AbstractContextManager[Any]]


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cuda", dtype=torch.bfloat16)


def packed(policy: Any, context: Autocast = nullcontext) -> torch.Tensor:
    """As a training step computes, after a start check has watched."""
    with torch.no_grad(), attention_of(policy, NAME), context(), watching(policy):
        policy_logps(policy, pack(ROWS[:1]).to("cuda"))
    with lean_layers(policy, compiled(torch.device("cuda", 0))), attention_of(policy, NAME), context():
        return policy_logps(policy, pack(ROWS).to("cuda"))


def packed_plainly(policy: Any, context: Autocast = nullcontext) -> torch.Tensor:
    """With the family's own layers."""
    with attention_of(policy, NAME), context():
        return policy_logps(policy, pack(ROWS).to("cuda"))


def plain(policy: Any, context: Autocast = nullcontext) -> torch.Tensor:
    """[N, T] from one unpadded, unshared forward a reply under the model's own attention."""
    branches = [(row, branch) for row in ROWS for branch in row.branches]
    width = max(len(branch.ids) for _, branch in branches)
    lines = []
    for row, branch in branches:
        ids = torch.tensor([*row.prompt.tolist(), *branch.ids.tolist()], device="cuda")[None]
        with context():
            logits = policy(input_ids=ids, use_cache=False).logits[0, len(row.prompt) - 1 : -1]
        values = token_logps(logits, ids[0, len(row.prompt) :]).float()
        lines.append(torch.nn.functional.pad(values, (0, width - len(values))))
    return torch.stack(lines)


def gradient(policy: Any, values: torch.Tensor) -> torch.Tensor:
    """Gradient of a fixed random weighting of the log-probs, and nothing left behind."""
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).to(values)
    policy.zero_grad()
    (values * weights).sum().backward()
    found = torch.cat([part.grad.flatten().float() for part in policy.parameters() if part.grad is not None])
    policy.zero_grad()
    return found


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 16, 64), (14, 2, 64), (32, 8, 64), (32, 8, 128)])
def test_the_kernels_serve_these_heads_in_bfloat16(heads: int, kv_heads: int, head_dim: int) -> None:
    assert _varlen.works(heads, kv_heads, head_dim, torch.bfloat16, torch.device("cuda", 0))
    assert _flex.works(heads, kv_heads, head_dim, torch.bfloat16, torch.device("cuda", 0))


@pytest.mark.parametrize("heads", [(16, 16), (14, 2), (32, 8)])
def test_the_kernel_serves_these_heads_in_float32(heads: tuple[int, int]) -> None:
    assert _flex.works(*heads, 64, torch.float32, torch.device("cuda", 0))


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_lean_layers_and_gradients_in_place(name: str) -> None:
    policy = model(name, layers=2)
    expected = gradient(policy, packed_plainly(policy))
    with gradients_in_place():
        assert relative(gradient(policy, packed(policy)), expected) <= 1e-5


@pytest.mark.parametrize("keep", [0, 2**30], ids=["computed again", "kept"])
@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_the_head_in_bfloat16_is_as_near_the_truth_as_rounding_allows(kind: str, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks over a large vocabulary, against float64 on the same bfloat16 numbers; W's gradient added to what is there."""
    monkeypatch.setattr(heads, "KEEP_BYTES", keep)
    monkeypatch.setitem(heads.CHUNK_BYTES, "cuda", 4 * 50_000 * 100)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(333, 256, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
    weight = (torch.randn(50_000, 256, generator=generator) / 16).bfloat16().float().to("cuda").requires_grad_()
    weight.grad = torch.ones_like(weight)
    target = torch.randint(0, 50_000, (333,), generator=generator).to("cuda")
    cotangent = torch.randn(333, generator=generator).to("cuda")
    exact = [part.detach().double().requires_grad_() for part in (hidden, weight)]
    expected = (exact[0] @ exact[1].T).log_softmax(-1).gather(1, target[:, None])[:, 0]
    expected.backward(cotangent.double())
    with computing_with(compiled(torch.device("cuda", 0)) if kind == "compiled" else EAGER), gradients_in_place(), autocast():
        values = heads.head_logps(hidden, weight, None, target)
    values.backward(cotangent)
    assert values.dtype == torch.float32
    assert float((values - expected).abs().max()) <= 0.1
    assert hidden.grad is not None
    assert relative(hidden.grad.double(), exact[0].grad) <= 1e-2
    assert relative(weight.grad.double() - 1, exact[1].grad) <= 1e-2


def test_products_of_16_bit_numbers_are_added_unrounded() -> None:
    assert heads.adds_wide(torch.float32, torch.bfloat16, torch.device("cuda", 0))


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_float32_log_probs_and_gradients(name: str) -> None:
    policy = model(name, layers=2)
    expected = plain(policy)
    assert expected[expected != 0].std() > 0.1, "the model must be far from uniform for this test to see anything"
    values = packed(policy)
    assert float((values - expected).abs().max()) <= 1e-4
    assert relative(gradient(policy, values), gradient(policy, expected)) <= 1e-5


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_bfloat16_is_as_near_the_truth_as_the_models_own(name: str) -> None:
    """Distance to float32 log-probs and gradients: at most 1.5 times that of plain bfloat16 forwards."""
    policy = model(name, layers=2)
    truth = plain(policy)
    true_gradient = gradient(policy, truth)
    truth = truth.detach()
    native = plain(policy, autocast)
    native_off = float((native - truth).abs().mean()), relative(gradient(policy, native), true_gradient)
    ours = packed(policy, autocast)
    ours_off = float((ours - truth).abs().mean()), relative(gradient(policy, ours), true_gradient)
    assert ours_off[0] <= 1.5 * native_off[0], (ours_off, native_off)
    assert ours_off[1] <= 1.5 * native_off[1], (ours_off, native_off)


@pytest.mark.parametrize("dtype", ["float32", "autocast", "bfloat16"])
def test_full_depth_passes_the_start_check(dtype: str) -> None:
    policy = model("llama-3.2-1b", dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    context: Autocast = autocast if dtype == "autocast" else nullcontext
    form, report = choose_form(policy, ROWS, "auto", torch.device("cuda"), context)
    assert form == "packed", report
    assert report["tried"]["packed"]["problem"] is None


@pytest.mark.parametrize("head_dim", [8, 80, 96])
def test_other_head_sizes_give_the_same_whoever_serves_them(head_dim: int) -> None:
    """8 is too narrow for the kernel and goes row by row; 80 and 96 are no powers of two."""
    policy = model("llama-3.2-1b", layers=2, hidden_size=4 * head_dim, head_dim=head_dim, num_attention_heads=4, num_key_value_heads=2)
    with torch.no_grad():
        assert float((packed(policy) - plain(policy)).abs().max()) <= 1e-4


def test_recomputed_layers_give_the_same_gradient() -> None:
    policy = model("llama-3.2-1b", layers=2).train()
    whole = gradient(policy, packed_plainly(policy, autocast))
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    assert relative(gradient(policy, packed_plainly(policy, autocast)), whole) <= 1e-3
