"""What autocast rounds anyway is made in 16 bits: found out by watching, the same products to the bit."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama
from transformers.models.olmo2 import modeling_olmo2

from equipoise.models import _rotary
from equipoise.models._elementwise import EAGER, Kernels, rotate, rotate_backward
from equipoise.models._readers import rounded_by_readers, watched
from equipoise.models._rotary import Rotation, lean_rotations
from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.batch import pack
from equipoise.models.layers import lean_layers, watching
from equipoise.models.logps import policy_logps
from tests.tiny import pairs, tiny

register()
# Not `EAGER` itself: what is compiled on a GPU, one operation after the other.
OWN = Kernels()._replace(gate=lambda gates, up: EAGER.gate(gates, up))


def low() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def seen(model: Any, context: Any = low) -> set[str]:
    with torch.no_grad(), attention_of(model, NAME), context(), watching(model):
        policy_logps(model, pack(pairs(2)))
    return {name for name, module in model.named_modules() if rounded_by_readers(module)}


def test_norms_that_feed_projections() -> None:
    layers = {f"model.layers.{number}.{name}" for number in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")}
    assert seen(tiny("llama")) == layers, "and not the last one, whose rows are picked before the head reads them"
    # Gemma's norms after a block go into the float32 residual; those of queries and keys are rotated.
    before = {f"model.layers.{number}.{name}" for number in (0, 1) for name in ("input_layernorm", "pre_feedforward_layernorm")}
    assert seen(tiny("gemma3")) == before


def test_without_autocast_or_watching_nothing_is_rounded() -> None:
    assert seen(tiny("llama"), nullcontext) == set()
    assert not rounded_by_readers(torch.nn.Linear(2, 2))


def test_the_last_watch_counts_and_one_that_failed_does_not() -> None:
    model = tiny("llama")
    narrow = seen(model)
    with pytest.raises(ZeroDivisionError), watching(model):
        raise ZeroDivisionError
    assert narrow
    assert {name for name, module in model.named_modules() if rounded_by_readers(module)} == narrow
    assert seen(model, nullcontext) == set()


def test_what_is_watched_may_go() -> None:
    """Nothing is kept in memory for being watched."""
    norm = torch.nn.LayerNorm(4)
    with low(), watched([norm]):
        gone = weakref.ref(norm(torch.ones(2, 4)))
        assert gone() is None


def test_asking_for_a_shape_is_no_reading() -> None:
    norm, linear = torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)
    for read, expected in (
        (lambda made: (made.shape, made.ndim, made.size(-1), made.dim(), made.device), True),
        (lambda made: made + 1, False),
        (lambda made: made.dtype, False),
        (lambda made: torch.nn.functional.linear(torch.ones(2, 4), made[:1]), False),
    ):
        with low(), watched([norm]):
            made = norm(torch.ones(2, 4))
            linear(made)
            read(made)
        assert rounded_by_readers(norm) == expected


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral"])
def test_the_same_numbers_with_less_kept(name: str) -> None:
    model = tiny(name).train()
    batch = pack(pairs(3))
    kept: dict[bool, set[tuple[int, int]]] = {}

    def run(watch: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if watch:
            assert seen(model)
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.zero_grad()
        with attention_of(model, NAME), lean_layers(model):
            with low(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                values = policy_logps(model, batch)
            values.sum().backward()
        kept[watch] = set(storages.items())
        return values.detach(), torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])

    plain, plain_gradient = run(False)
    ours, gradient = run(True)
    assert torch.equal(ours, plain)
    # Gradients of projections that read one norm now meet in 16 bits.
    assert float((gradient - plain_gradient).norm() / plain_gradient.norm()) < 1e-2
    if name in ("llama", "mistral"):
        assert sum(size for _, size in kept[True]) < sum(size for _, size in kept[False])


def test_rotation_by_hand() -> None:
    """A quarter turn takes (1, 2 | 3, 4) to (−3, −4 | 1, 2), and its gradient turns back."""
    states = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 1, 4)
    none, full = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    assert rotate(states, none, full, torch.float32).flatten().tolist() == [-3, -4, 1, 2]
    assert rotate_backward(states, none, full, torch.float32).flatten().tolist() == [3, 4, -1, -2]


def test_rotation_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    cos, sin = (torch.randn(1, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda part: Rotation.apply(part, cos, sin, torch.float64, EAGER), (states,))


def test_rotations_of_a_family_are_replaced_and_put_back() -> None:
    model, theirs = tiny("llama"), modeling_llama.apply_rotary_pos_emb
    with lean_rotations(model, OWN):
        ours = modeling_llama.apply_rotary_pos_emb
        assert ours is not theirs
        q, k = torch.randn(1, 4, 3, 6), torch.randn(1, 2, 3, 6)
        cos, sin = torch.randn(1, 3, 6), torch.randn(1, 3, 6)
        for one, other in zip(ours(q, k, cos, sin), theirs(q, k, cos, sin), strict=True):
            assert torch.equal(one, other)
        # What is asked for in another way goes to the family's own.
        for one, other in zip(ours(q, k, cos[0], sin[0], unsqueeze_dim=0), theirs(q, k, cos[0], sin[0], unsqueeze_dim=0), strict=True):
            assert torch.equal(one, other)
    assert modeling_llama.apply_rotary_pos_emb is theirs
    with lean_rotations(model, EAGER):
        assert modeling_llama.apply_rotary_pos_emb is theirs


def test_a_rotation_that_gives_another_dtype_is_left_alone() -> None:
    """OLMo's returns the dtype of the queries, also where cosines are float32."""
    assert _rotary._agrees(modeling_llama.apply_rotary_pos_emb)
    assert not _rotary._agrees(modeling_olmo2.apply_rotary_pos_emb)


def test_a_rotation_that_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return tuple(part * cos + torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2) * sin for part in (q, k))

    home = SimpleNamespace(apply_rotary_pos_emb=interleaved)
    monkeypatch.setattr(_rotary, "_homes", lambda model: [home])
    with lean_rotations(tiny("llama"), OWN):
        assert home.apply_rotary_pos_emb is interleaved


def test_steps_with_replaced_rotations_are_the_same() -> None:
    model = tiny("llama").train()

    def gradient(kernels: Kernels) -> torch.Tensor:
        model.zero_grad()
        with attention_of(model, NAME), lean_layers(model, kernels):
            policy_logps(model, pack(pairs(3))).sum().backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])

    torch.testing.assert_close(gradient(OWN), gradient(EAGER), rtol=1e-4, atol=1e-6)


def test_packed_attention_is_known_to_round() -> None:
    """What it does inside is not looked at; a rotation whose output goes nowhere else is found."""
    model = tiny("llama")
    theirs = modeling_llama.apply_rotary_pos_emb
    seen(model)
    assert rounded_by_readers(theirs)
    with torch.no_grad(), attention_of(model, "eager"), low(), watching(model):
        model(input_ids=torch.arange(5)[None], use_cache=False)
    assert not rounded_by_readers(theirs)
