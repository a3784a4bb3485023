"""Packed attention row by row with torch's CPU kernel, as one step of autograd: what a CPU trains with.

Plain autograd keeps every piece that a kernel was called on: key and value heads repeated for each query head of their
group, and each reply's copy of the prompt's keys and values. Those are made again in the backward pass here; what is kept
is what the layer had anyway. Gradients are written where they belong, with no zero-filled tensor for each slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Piece:
    """Neighbouring queries that are served by one call: positions start … end, which see `prompt` keys from `first`, then themselves.

    bias: additive mask [end - start, keys]; None: plainly causal.
    """

    first: int
    prompt: int
    start: int
    end: int
    bias: Tensor | None

    def of(self, part: Tensor) -> Tensor:
        """Keys or values [1, H, S, D] as these queries see them."""
        own = part[:, :, self.start : self.end]
        return torch.cat([part[:, :, self.first : self.first + self.prompt], own], dim=2) if self.prompt else own


def usable(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the kernel serves these tensors: it has no dropout, and one head size."""
    return (
        query.device.type == "cpu"
        and dropout == 0.0
        and query.shape[3] == value.shape[3]
        and query.dtype == key.dtype == value.dtype
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
    )


class RowAttention(torch.autograd.Function):
    """Attention of one layer over packed rows."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, calls: Sequence[Piece], scaling: float | None) -> Tensor:
        """query [1, H, S, D], key and value [1, H_kv, S, D] → [1, S, H, D]."""
        output = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        keys, values, sums = _repeated(key, query), _repeated(value, query), []
        for call in calls:
            part, total = _forward(
                query[:, :, call.start : call.end],
                call.of(keys),
                call.of(values),
                is_causal=call.bias is None,
                attn_mask=call.bias,
                scale=scaling,
            )
            output[:, call.start : call.end] = part.transpose(1, 2)
            sums.append(total)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.calls, ctx.scaling = calls, scaling
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients with respect to query, key and value."""
        query, key, value, output, *sums = ctx.saved_tensors
        keys, values = _repeated(key, query), _repeated(value, query)
        given, output = gradients[0].transpose(1, 2), output.transpose(1, 2)
        to_query, to_keys, to_values = (torch.empty_like(part) for part in (query, keys, values))
        for call, total in zip(ctx.calls, sums, strict=True):
            own = slice(call.start, call.end)
            found = _backward(
                given[:, :, own],
                query[:, :, own],
                call.of(keys),
                call.of(values),
                output[:, :, own],
                total,
                0.0,
                call.bias is None,
                attn_mask=call.bias,
                scale=ctx.scaling,
            )
            to_query[:, :, own] = found[0]
            for target, part in ((to_keys, found[1]), (to_values, found[2])):
                target[:, :, own] = part[:, :, call.prompt :]
                if call.prompt:
                    target[:, :, call.first : call.first + call.prompt] += part[:, :, : call.prompt]
        return to_query, _summed(to_keys, key), _summed(to_values, value), None, None


def _repeated(part: Tensor, query: Tensor) -> Tensor:
    """[1, H_kv, S, D] → [1, H, S, D]: each head once for every query head of its group."""
    groups = query.shape[1] // part.shape[1]
    return part.repeat_interleave(groups, dim=1) if groups > 1 else part


def _summed(gradient: Tensor, part: Tensor) -> Tensor:
    """[1, H, S, D] → [1, H_kv, S, D]: the gradient of `_repeated`."""
    groups = gradient.shape[1] // part.shape[1]
    return gradient.view(1, part.shape[1], groups, *part.shape[2:]).sum(2) if groups > 1 else gradient
