"""What layers and the head compute outside matrix products, as functions of tensors: run one operation after the other, or compiled.

Compiled, each is a kernel or two that read their inputs once or twice and write their outputs once, with shapes left open,
so that micro-batches of every size share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.functional import silu

from equipoise.core.errors import UsageError
from equipoise.core.progress import say
from equipoise.models._compile import with_open_shapes

Tensor = torch.Tensor


def norm(hidden: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """weight · (x / √(mean x² + ε)) [..., H] and 1/√(mean x² + ε) [..., 1], in float32 and rounded to x's dtype before the weight.

    dtype: what the result is rounded to; None: what comes of x's and the weight's.
    """
    wide = hidden.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    normed = (wide * scale).to(hidden.dtype)
    output = normed.mul_(weight) if normed.dtype == weight.dtype else weight * normed
    return output if dtype is None else output.to(dtype), scale


def norm_backward(gradient: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor, wants_weight: bool) -> tuple[Tensor, Tensor | None]:
    """With n = x·scale and g = ∂·weight: ∂/∂x = scale · (g − n · mean(g n)), ∂/∂weight = Σ_rows ∂ n."""
    wide = gradient.float()
    normed = hidden.float() * scale
    to_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype) if wants_weight else None
    inner = wide * weight
    share = (inner * normed).mean(-1, keepdim=True)
    return inner.addcmul_(normed, share, value=-1).mul_(scale).to(hidden.dtype), to_weight


def gate(gates: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, [..., F]."""
    return silu(gates).mul_(up)


def gate_backward(gradient: Tensor, gates: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """∂/∂gate and ∂/∂up, [..., F] each."""
    return torch.ops.aten.silu_backward(gradient * up, gates), silu(gates).mul_(gradient)


def rotate(states: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """x · cos + (−x₂, x₁) · sin over the two halves of the last dimension. [B, S, H, D], twice [B, S, D] → [B, S, H, D]."""
    half = states.shape[-1] // 2
    turned = torch.cat((-states[..., half:], states[..., :half]), -1)
    return (states * cos[:, :, None] + turned * sin[:, :, None]).to(dtype)


def rotate_backward(gradient: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """∂/∂x = ∂ · cos + (s₂, −s₁) with s = ∂ · sin, rounded once."""
    half, wide = gradient.shape[-1] // 2, gradient.to(wide_dtype(gradient.dtype))
    back = wide * sin[:, :, None]
    return (wide * cos[:, :, None] + torch.cat((back[..., half:], -back[..., :half]), -1)).to(dtype)


def exponentials(logits: Tensor, target: Tensor, top: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Turns logits [C, V] into e = exp(logits − max) where they are. Returns logit[target] − max, max, and Σe, [C] each.

    Widened before anything is subtracted, so that 16-bit logits are rounded once, when e is put down. top: max, where known.
    """
    wide = logits.to(wide_dtype(logits.dtype))
    top = wide.amax(1) if top is None else top
    picked = wide.gather(1, target[:, None])[:, 0] - top
    total = wide.sub_(top[:, None]).exp_().sum(1)
    if logits.dtype != wide.dtype:
        logits.copy_(wide)
    return picked, top, total


def forward_dtype(read: Tensor) -> torch.dtype:
    """The dtype a product that reads this tensor is computed in: autocast's where it is on, else the tensor's own."""
    kind = read.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else read.dtype


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a log-softmax is computed in: float32, or float64 for float64 numbers."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Kernels(NamedTuple):
    """The functions, in one of their two forms."""

    norm: Callable[..., tuple[Tensor, Tensor]] = norm
    norm_backward: Callable[..., tuple[Tensor, Tensor | None]] = norm_backward
    gate: Callable[..., Tensor] = gate
    gate_backward: Callable[..., tuple[Tensor, Tensor]] = gate_backward
    rotate: Callable[..., Tensor] = rotate
    rotate_backward: Callable[..., Tensor] = rotate_backward
    exponentials: Callable[..., tuple[Tensor, Tensor, Tensor]] = exponentials


EAGER = Kernels()
TOLERANCE = 1e-4
"""How far a compiled function may be from its twin, on numbers of order 1 in float32."""
_current: ContextVar[Kernels] = ContextVar("equipoise_kernels", default=EAGER)


@contextmanager
def computing_with(kernels: Kernels) -> Iterator[None]:
    """Forward passes inside this block, and their backward passes wherever they run, compute with these."""
    token = _current.set(kernels)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Kernels:
    """What this forward pass computes with."""
    return _current.get()


def kernels_for(device: torch.device, wanted: bool | None) -> Kernels:
    """Compiled ones or not; None: on a GPU, and where they cannot be had it says so. Raises UsageError where True cannot be met."""
    if wanted is None and device.type == "cuda":
        try:
            return compiled(device)
        except UsageError as error:
            say(f"norms, gates, rotations and softmax run one operation after the other, which is slower: {error.__cause__}")
    return compiled(device) if wanted else EAGER


@cache
def compiled(device: torch.device) -> Kernels:
    """The compiled ones, tried once on this device. Raises UsageError where nothing can be compiled for it, or comes out wrong."""
    kernels = Kernels(*map(with_open_shapes, EAGER))
    try:
        for name, ours, exact in zip(Kernels._fields, _trial(kernels, device), _trial(EAGER, device), strict=True):
            off = max(float((one - other).abs().max()) for one, other in zip(ours, exact, strict=True))
            if not off <= TOLERANCE:
                raise ArithmeticError(f"{name} is {off:.2g} off")
    except Exception as error:  # a compiler fails in many ways, and all have the same answer
        needs = "a C++ compiler" if device.type == "cpu" else "Triton"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise UsageError(
            f"torch_compile=true: compiled kernels cannot be used on {device.type} ({type(error).__name__}: {reason}). "
            f"They need {needs}; leave torch_compile out where that does not help."
        ) from error
    return kernels


def _trial(kernels: Kernels, device: torch.device) -> list[tuple[Tensor, ...]]:
    """What each of the functions gives for small random numbers of order 1, in the order of their names.

    In float32 alone, since each dtype would be compiled for, which a start would wait for: the start check runs the others forward.
    """
    one = (torch.rand(3, 5, 8, generator=torch.Generator().manual_seed(0)) - 0.5).to(device)
    other, weight, logits, target = one.flip(0), one[0, 0], one[0].clone(), torch.arange(5, device=device)
    turned = one.view(3, 5, 2, 4), one[..., :4], one[..., 4:], one.dtype
    normed = kernels.norm(one, weight, 1e-2, None)
    back = kernels.norm_backward(other, one, weight, normed[1], True)
    return [
        normed,
        tuple(part for part in back if part is not None),
        (kernels.gate(one, other),),
        kernels.gate_backward(one, other, other),
        (kernels.rotate(*turned),),
        (kernels.rotate_backward(*turned),),
        (*kernels.exponentials(logits, target, None), logits),
    ]
