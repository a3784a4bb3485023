"""LoRA layers that add their part to the base layer's output where it lies.

PEFT computes base + (x Aᵀ Bᵀ) · scaling as three tensors of the output's size, and as many again in the backward pass, for every
adapted layer. Ours are products with the rank as their inner or outer size, and nothing of the output's size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

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


def lora_forward(module: torch.nn.Module) -> Callable[..., Tensor] | None:
    """The forward that can take the place of an adapted linear layer's; None where there is none."""
    peft = sys.modules.get("peft.tuners.lora.layer")  # without it no layer is adapted
    if peft is None or type(module) is not peft.Linear or not _agrees():
        return None
    return partial(_forward, module)


def _forward(module: Any, hidden: Tensor, *more: Any, **options: Any) -> Tensor:
    names = [name for name in module.active_adapters if name in module.lora_A]
    plain = hidden.ndim > 1 and not (more or options or module.disable_adapters or module.merged)
    plain = plain and len(names) == 1 and names[0] not in module.lora_variant
    base, dtype = module.base_layer, hidden.dtype
    if plain:
        parts = module.lora_A[names[0]], module.lora_B[names[0]]
        plain = all(type(part) is torch.nn.Linear for part in (base, *parts)) and all(part.bias is None for part in parts)
        # Who hooks into the base layer may keep its output, which is written over here.
        plain = plain and not (base._forward_hooks or base._backward_hooks or base._backward_pre_hooks)
        if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(hidden.device.type)
        else:
            plain = plain and all(part.weight.dtype == dtype for part in parts)
    if not plain:
        return type(module).forward(module, hidden, *more, **options)
    # As a matrix: of a batch, a base layer with a bias gives a view, and writing into a view costs autograd copies.
    rows = hidden.flatten(0, -2)
    output, inputs = base(rows), module.lora_dropout[names[0]](rows).to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        added = AddLora.apply(output, inputs, *(part.weight for part in parts), module.scaling[names[0]])  # type: ignore[no-untyped-call]
    return added.view(*hidden.shape[:-1], added.shape[-1])


@cache
def _agrees() -> bool:
    """Whether PEFT's layer computes what ours does, on small random weights."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    with _disable_current_modes(), torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        try:
            settings = LoraConfig(r=2, lora_alpha=3, init_lora_weights=False)
            layer = Linear(torch.nn.Linear(4, 6), "trial", settings, r=2, lora_alpha=3, init_lora_weights=False)
            hidden = torch.randn(3, 4)
            return torch.allclose(_forward(layer, hidden), type(layer).forward(layer, hidden), rtol=1e-5, atol=1e-6)
        except Exception:  # another version's layer may want anything else; it is left alone then
            return False
