"""Packed attention row by row on a CPU: plain matrix products over blocks of queries, as one step of autograd.

A block of queries sees one run of keys, so its scores are one product and keys beyond the block's last query are not touched.
Query heads that share a key head are rows of the same product, and nothing is repeated for them. Only queries, keys and values
are kept for the backward pass, which makes the shares again. Scores and softmax are float32, as in torch's own kernel; beside it
this took a tenth less time in float32 and a third less in bfloat16 (two cores with AVX-512, 500 positions, heads of 64).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from equipoise.models._elementwise import forward_dtype, wide_dtype
from equipoise.models.batch import Span

Tensor = torch.Tensor
BLOCK = 128
"""Queries in one product: more waste more of the square above the diagonal, fewer are slow products."""


@dataclass(frozen=True)
class Block:
    """Queries start … end of a packed sequence, which see keys low … high of their piece.

    bias: [queries, n], added to the scores of the last n of those keys, which not every query sees.
    """

    start: int
    end: int
    low: int
    high: int
    bias: Tensor


@dataclass(frozen=True)
class Piece:
    """Neighbouring queries start … end that see `prompt` keys from `first` on, then themselves: a row's first reply with its
    prompt (`prompt` is 0), or a further reply.
    """

    first: int
    prompt: int
    start: int
    end: int
    blocks: tuple[Block, ...]

    def of(self, part: Tensor) -> Tensor:
        """Keys or values [H, S, D] as these queries see them."""
        own = part[:, self.start : self.end]
        return torch.cat([part[:, self.first : self.first + self.prompt], own], dim=1) if self.prompt else own

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add the gradient [H, P + T, D] of what `of` gave to [H, S, D]."""
        total[:, self.first : self.first + self.prompt] += part[:, : self.prompt]
        total[:, self.start : self.end] += part[:, self.prompt :]


def pieces(rows: Sequence[Span], window: int | None, dtype: torch.dtype) -> tuple[Piece, ...]:
    """The rows cut into pieces and blocks. window: positions a token sees back, itself included. dtype: that of the scores."""
    made, biases = [], {}

    def piece(first: int, prompt: int, start: int, end: int) -> Piece:
        count = -(-(end - start) // BLOCK)
        cuts = [round((end - start) * number / count) for number in range(count + 1)]
        blocks = []
        for left, right in pairwise(cuts):
            position, high = prompt + left, prompt + right
            low = 0 if window is None else max(0, position - window + 1)
            # Where a window ends inside the block, every key is seen by some queries only.
            cut = window is not None and high - low > window
            key = (right - left, high - low if cut else right - left)
            if key not in biases:
                distance = torch.arange(key[0])[:, None] + (key[1] - key[0]) - torch.arange(key[1])
                seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
                biases[key] = torch.zeros(key, dtype=dtype).masked_fill_(~seen, -torch.inf)
            blocks.append(Block(start + left, start + right, low, high, biases[key]))
        return Piece(first, prompt, start, end, tuple(blocks))

    for row in rows:
        end = row.start + row.prompt + row.branches[0]
        made.append(piece(row.start, 0, row.start, end))
        for reply in row.branches[1:]:
            made.append(piece(row.start, row.prompt, end, end + reply))
            end += reply
    return tuple(made)


def usable(query: Tensor, dropout: float) -> bool:
    """Whether a layer is served: on a CPU, without dropout."""
    return query.device.type == "cpu" and dropout == 0.0


def attend(query: Tensor, key: Tensor, value: Tensor, cut: Sequence[Piece], scaling: float | None) -> Tensor:
    """[1, H, S, D], [1, H_kv, S, D], [1, H_kv, S, E] → [1, S, H, E]. Under autocast in its dtype."""
    dtype = forward_dtype(value)
    with torch.autocast("cpu", enabled=False):
        return RowAttention.apply(query.to(dtype), key.to(dtype), value.to(dtype), cut, scaling)  # type: ignore[no-untyped-call]


class RowAttention(torch.autograd.Function):
    """Attention of one layer over packed rows."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, cut: Sequence[Piece], scaling: float | None) -> Tensor:
        """query [1, H, S, D], key [1, H_kv, S, D] and value [1, H_kv, S, E] → [1, S, H, E]. scaling: None is 1/√D."""
        ctx.cut, ctx.scaling = cut, query.shape[3] ** -0.5 if scaling is None else scaling
        ctx.save_for_backward(query, key, value)
        heads, output = len(key[0]), query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        scaled, target = key[0].to(wide_dtype(key.dtype)) * ctx.scaling, output[0].transpose(0, 1)
        for piece in cut:
            keys, values = piece.of(scaled), piece.of(value[0])
            for block in piece.blocks:
                shares = _shares(_grouped(query, block, heads), keys, block)
                found = torch.bmm(shares.to(value.dtype), values[:, block.low : block.high])
                target[:, block.start : block.end] = found.view(query.shape[1], -1, value.shape[3])
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients with respect to query, key and value. With shares p and ∂p = ∂ vᵀ, ∂scores = p · (∂p − Σ p ∂p).

        In 16 bits ∂p is rounded before its mean is taken off, so what all values have in common is taken off them first.
        """
        query, key, value = ctx.saved_tensors
        heads, given = len(key[0]), gradients[0].transpose(1, 2)
        scaled = key[0].to(wide_dtype(key.dtype)) * ctx.scaling
        wide = scaled.dtype
        to_query = torch.empty_like(query)
        to_key, to_value = (torch.zeros(part.shape[1:], dtype=wide) for part in (key, value))
        for piece in ctx.cut:
            keys, values = piece.of(scaled), _centred(piece.of(value[0]), wide)
            low_keys = keys.to(key.dtype)
            key_part, value_part = torch.zeros_like(keys), torch.zeros(values.shape, dtype=wide)
            for block in piece.blocks:
                seen = slice(block.low, block.high)
                queries, outer = _grouped(query, block, heads), _grouped(given, block, heads)
                shares = _shares(queries, keys, block)
                to_shares = torch.bmm(outer, values[:, seen].transpose(1, 2)).to(wide)
                to_scores = torch._softmax_backward_data(to_shares, shares, -1, wide).to(query.dtype)
                _add_product(value_part[:, seen], shares.to(value.dtype).transpose(1, 2), outer)
                _add_product(key_part[:, seen], to_scores.transpose(1, 2), queries)
                found = torch.bmm(to_scores, low_keys[:, seen])
                to_query[0, :, block.start : block.end] = found.view(query.shape[1], -1, query.shape[3])
            piece.add(to_key, key_part)
            piece.add(to_value, value_part)
        return to_query, to_key.mul_(ctx.scaling)[None].to(key.dtype), to_value[None].to(value.dtype), None, None


def _grouped(part: Tensor, block: Block, heads: int) -> Tensor:
    """A block of [1, H, S, D] as [H_kv, H/H_kv · queries, D]: the query heads of a group one below the other."""
    return part[0, :, block.start : block.end].reshape(heads, -1, part.shape[3])


def _shares(queries: Tensor, keys: Tensor, block: Block) -> Tensor:
    """Softmax of the scores over the keys a block sees, in the keys' dtype: [H_kv, R, D], [H_kv, N, D] → [H_kv, R, high - low]."""
    scores = torch.bmm(queries.to(keys.dtype), keys[:, block.low : block.high].transpose(1, 2))
    rows, width = block.bias.shape
    scores.view(len(scores), -1, rows, scores.shape[2])[..., scores.shape[2] - width :].add_(block.bias)
    return torch.softmax(scores, -1)


def _centred(values: Tensor, wide: torch.dtype) -> Tensor:
    """Values [H, N, E] less their mean over N where they are narrower: ∂scores are the same, and less of them is rounded away."""
    if values.dtype == wide:
        return values
    widened = values.to(wide)
    return widened.sub_(widened.mean(1, keepdim=True)).to(values.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product of matrices, unrounded where they are as wide as the total."""
    if total.dtype == left.dtype:
        torch.baddbmm(total, left, right, out=total)
    else:
        total += torch.bmm(left, right)
