"""LoRA layers that add their part to the base layer's output where it lies.

PEFT computes base + (x Aᵀ Bᵀ) · scaling as three tensors of the output's size, and as many again in the backward pass, for every
adapted layer. Ours are products with the rank as their inner or outer size, and nothing of the output's size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from equipoise.models._elementwise import forward_dtype

Tensor = torch.Tensor


class AddLora(torch.autograd.Function):
    """output + scaling · x Aᵀ Bᵀ, in the place of output."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, hidden: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        """output [S, O] and hidden [S, I] of one dtype, down (A) [r, I] and up (B) [O, r] of any → output."""
        ctx.mark_dirty(output)
        low_down, low_up = down.to(hidden.dtype), up.to(hidden.dtype)
        inner = torch.mm(hidden, low_down.t())
        torch.addmm(output, inner, low_up.t(), alpha=scaling, out=output)
        ctx.save_for_backward(hidden, inner, low_down, low_up)
        ctx.scaling, ctx.dtypes = scaling, (down.dtype, up.dtype)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients with respect to output, hidden, A and B."""
        hidden, inner, down, up = ctx.saved_tensors
        (given,) = gradients
        _, needs_hidden, needs_down, needs_up, _ = ctx.needs_input_grad
        to_inner = torch.mm(given, up).mul_(ctx.scaling)
        to_hidden = torch.mm(to_inner, down) if needs_hidden else None
        to_down = torch.mm(to_inner.t(), hidden).to(ctx.dtypes[0]) if needs_down else None
        to_up = torch.mm(given.t(), inner).mul_(ctx.scaling).to(ctx.dtypes[1]) if needs_up else None
        return given, to_hidden, to_down, to_up, None


def is_lora(module: torch.nn.Module) -> bool:
    """Whether a module is PEFT's adapted linear layer; its 4-bit and other kinds are classes of their own."""
    peft = sys.modules.get("peft.tuners.lora.layer")  # without it no layer is adapted
    return peft is not None and type(module) is peft.Linear


def lora(module: Any, hidden: Tensor, *more: Any, **options: Any) -> Tensor:
    """What PEFT's layer gives, by `AddLora` where it is plain LoRA."""
    name = None if more or options else _adapter(module, hidden)
    if name is None:
        return type(module).forward(module, hidden, *more, **options)
    # As a matrix: of a batch, a base layer with a bias gives a view, and writing into a view costs autograd copies.
    rows = hidden.flatten(0, -2)
    output, inputs = module.base_layer(rows), module.lora_dropout[name](rows).to(forward_dtype(hidden))
    weights = module.lora_A[name].weight, module.lora_B[name].weight
    with torch.autocast(hidden.device.type, enabled=False):
        added = AddLora.apply(output, inputs, *weights, module.scaling[name])  # type: ignore[no-untyped-call]
    return added.view(*hidden.shape[:-1], added.shape[-1])


def lora_trial(_: torch.nn.Module) -> list[tuple[Any, Tensor, Callable[[Tensor], Tensor]]]:
    """A small layer under an adapter that is not zero."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    settings = LoraConfig(r=2, lora_alpha=3, init_lora_weights=False)
    layer = Linear(torch.nn.Linear(4, 6), "trial", settings, r=2, lora_alpha=3, init_lora_weights=False)
    return [(layer, torch.randn(3, 4), partial(lora, layer))]


def _adapter(module: Any, hidden: Tensor) -> str | None:
    """The one adapter at work, where it is plain LoRA on a plain layer in one dtype; None for all that is left to PEFT."""
    names = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or hidden.ndim < 2 or len(names) != 1 or names[0] in module.lora_variant:
        return None
    base, *parts = module.base_layer, module.lora_A[names[0]], module.lora_B[names[0]]
    if any(type(part) is not torch.nn.Linear for part in (base, *parts)) or any(part.bias is not None for part in parts):
        return None
    if base._forward_hooks or base._backward_hooks or base._backward_pre_hooks:
        return None  # who hooks into the base layer may keep its output, which would be written over
    mixed = any(part.weight.dtype != hidden.dtype for part in parts)
    return None if mixed and not torch.is_autocast_enabled(hidden.device.type) else names[0]
