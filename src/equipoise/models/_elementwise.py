"""What `layers` computes outside matrix products, as plain functions of tensors: run one operation after the other, or compiled.

Compiled, each is one kernel that reads its inputs once and writes its outputs once, with shapes left open, so that
micro-batches of every size share it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.functional import silu

from equipoise.core.errors import UsageError
from equipoise.models._compile import with_open_shapes

Tensor = torch.Tensor


def norm(hidden: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """weight · (x / √(mean x² + ε)) [..., H] and 1/√(mean x² + ε) [..., 1], in float32 and rounded to x's dtype before the weight."""
    wide = hidden.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    normed = (wide * scale).to(hidden.dtype)
    return normed.mul_(weight) if normed.dtype == weight.dtype else weight * normed, scale


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


class Kernels(NamedTuple):
    """The four functions, in one of their two forms."""

    norm: Callable[..., tuple[Tensor, Tensor]] = norm
    norm_backward: Callable[..., tuple[Tensor, Tensor | None]] = norm_backward
    gate: Callable[..., Tensor] = gate
    gate_backward: Callable[..., tuple[Tensor, Tensor]] = gate_backward


EAGER = Kernels()


@cache
def compiled(device: torch.device) -> Kernels:
    """The compiled ones, tried once on this device. Raises UsageError where nothing can be compiled for it."""
    kernels = Kernels(*map(with_open_shapes, EAGER))
    hidden, weight = torch.ones(3, 8, device=device), torch.ones(8, device=device)
    try:
        scale = kernels.norm(hidden, weight, 1e-6)[1]
        kernels.norm_backward(hidden, hidden, weight, scale, True)
        kernels.gate_backward(hidden, hidden, kernels.gate(hidden, hidden))
    except Exception as error:  # a compiler fails in many ways, and all have the same answer
        needs = "a C++ compiler" if device.type == "cpu" else "Triton"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise UsageError(
            f"torch_compile=true: nothing could be compiled for {device.type}, which needs {needs} "
            f"({type(error).__name__}: {reason}). Install it, or leave torch_compile out."
        ) from error
    return kernels
