"""Rotary positions as one kernel: what families compute as five operations over float32 copies of queries and keys.

They share one formula, `x · cos + rotate_half(x) · sin`, in a function `apply_rotary_pos_emb` of the module that holds their
attention. Within `lean_rotations` that function is ours, where ours gives the same bits on small random numbers. Only with
compiled kernels: one operation after the other there is nothing to win.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from equipoise.models._elementwise import EAGER, Kernels
from equipoise.models._readers import Watch, rounded_by_readers

Tensor = torch.Tensor
FUNCTION = "apply_rotary_pos_emb"


class Rotation(torch.autograd.Function):
    """x · cos + rotate_half(x) · sin."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, kernels: Kernels) -> Tensor:
        """states [B, H, S, D], cos and sin [B, S, D] → [B, H, S, D] in `dtype`, laid out as [B, S, H, D]."""
        ctx.save_for_backward(cos, sin)
        ctx.dtype, ctx.kernels = states.dtype, kernels
        return kernels.rotate(states.transpose(1, 2), cos, sin, dtype).transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        """∂/∂states."""
        given = gradients[0].transpose(1, 2)
        return ctx.kernels.rotate_backward(given, *ctx.saved_tensors, ctx.dtype).transpose(1, 2), None, None, None, None


@contextmanager
def lean_rotations(model: torch.nn.Module, kernels: Kernels) -> Iterator[None]:
    """Within this block rotary positions of this model's families are one kernel, where kernels are compiled."""
    with ExitStack() as stack:
        for home in _homes(model) if kernels is not EAGER else ():
            theirs = getattr(home, FUNCTION)
            if _agrees(theirs):
                stack.enter_context(_replaced(home, _ours(theirs, kernels)))
        yield


@contextmanager
def noted_rotations(model: torch.nn.Module, watch: Watch) -> Iterator[None]:
    """Within this block a watch follows what the families' own functions give."""
    with ExitStack() as stack:
        for home in _homes(model):
            stack.enter_context(_replaced(home, _noting(getattr(home, FUNCTION), watch)))
        yield


def _ours(theirs: Callable[..., Any], kernels: Kernels) -> Callable[..., Any]:
    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any) -> Any:
        plain = not rest and not more and q.ndim == k.ndim == 4 and cos.ndim == sin.ndim == 3 and cos.dtype == sin.dtype
        if not plain or cos.requires_grad or q.shape[3] != cos.shape[2] or q.dtype == torch.float64:
            return theirs(q, k, cos, sin, *rest, **more)
        dtype, kind = torch.promote_types(q.dtype, cos.dtype), q.device.type
        # On a CPU our attention computes in what it is given.
        if kind == "cuda" and torch.is_autocast_enabled(kind) and rounded_by_readers(theirs):
            dtype = torch.get_autocast_dtype(kind)
        return tuple(Rotation.apply(states, cos, sin, dtype, kernels) for states in (q, k))  # type: ignore[no-untyped-call]

    return rotated


def _noting(theirs: Callable[..., Any], watch: Watch) -> Callable[..., Any]:
    def noted(*inputs: Any, **more: Any) -> Any:
        made = theirs(*inputs, **more)
        watch.note(theirs, made if isinstance(made, tuple) else [made])
        return made

    return noted


def _homes(model: torch.nn.Module) -> list[ModuleType]:
    """The Python modules of this model's layers that have the function."""
    names = {type(module).__module__ for module in model.modules()}
    return [sys.modules[name] for name in sorted(names) if callable(getattr(sys.modules.get(name), FUNCTION, None))]


@contextmanager
def _replaced(home: Any, function: Callable[..., Any]) -> Iterator[None]:
    before = getattr(home, FUNCTION)
    setattr(home, FUNCTION, function)
    try:
        yield
    finally:
        setattr(home, FUNCTION, before)


@cache
def _agrees(theirs: Callable[..., Any]) -> bool:
    """Whether a family's function gives the very numbers of ours, dtype included, on small random ones of the dtypes that meet."""
    with _disable_current_modes(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for states, angles in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)):
            parts = [torch.randn(1, heads, 3, 6).to(states) for heads in (4, 2)]
            cos, sin = (torch.randn(1, 3, 6).to(angles) for _ in range(2))
            try:
                found, expected = _ours(theirs, EAGER)(*parts, cos, sin), theirs(*parts, cos, sin)
                if not all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(found, expected, strict=True)):
                    return False
            except Exception:  # a family's function may want anything else; it is left alone then
                return False
    return True
