"""Packed attention as one call of torch's variable-length flash kernel: what a CUDA device runs in 16 bits.

A segment of queries is a prompt with its first reply, or a further reply; segments follow each other in the sequence as
they are. The keys of a further reply are its prompt's and its own, laid beside each other: then every segment is causal from
its last query and last key backwards, which is what the kernel does, windows included. So prompts' keys and values are copied
once for each further reply (they are narrow where heads are grouped, and made again in the backward pass), and no mask is read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from equipoise.models._dense import trusted
from equipoise.models._elementwise import forward_dtype
from equipoise.models.batch import Span, to_device

Tensor = torch.Tensor
LARGEST_HEAD = 256
_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


@dataclass(frozen=True)
class Shared:
    """Which positions keys are of, where prompts are shared and so seen more than once.

    gathered: int64 [K], the position of each key. own: int64 [S], which key is a position's own. copies, copied: int64 [C], the
    keys that are copies of a prompt's, and the positions they are of.
    """

    gathered: Tensor
    own: Tensor
    copies: Tensor
    copied: Tensor


@dataclass(frozen=True)
class Layout:
    """Where segments of queries and of keys begin: int32 [segments + 1] each. most_queries, most_keys: of one segment.

    shared: None where no prompt is, and keys are the positions themselves.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int
    shared: Shared | None


def layout(rows: Sequence[Span], device: torch.device) -> Layout:
    """The layout of some rows, made on the host and copied without waiting for the device."""
    queries, prompts, gathered = [], [], []
    for row in rows:
        first = row.prompt + row.branches[0]
        queries += [first, *row.branches[1:]]
        prompts += [0] + [row.prompt] * (len(row.branches) - 1)
        at = row.start + first
        gathered.append(np.arange(row.start, at))
        for reply in row.branches[1:]:
            gathered += [np.arange(row.start, row.start + row.prompt), np.arange(at, at + reply)]
            at += reply
    keys = [reply + prompt for reply, prompt in zip(queries, prompts, strict=True)]

    def starts(lengths: Sequence[int]) -> Tensor:
        return to_device(torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)), device)

    whole = starts(queries), starts(keys), max(queries), max(keys)
    if not any(prompts):
        return Layout(*whole, None)
    positions = np.concatenate(gathered)
    # Within a segment the prompt's copy comes first, and every position is a key of its own exactly once.
    is_copy = np.concatenate([np.arange(size) < prompt for size, prompt in zip(keys, prompts, strict=True)])
    indices = positions, np.flatnonzero(~is_copy), np.flatnonzero(is_copy), positions[is_copy]
    return Layout(*whole, Shared(*(to_device(torch.from_numpy(index), device) for index in indices)))


class VarlenAttention(torch.autograd.Function):
    """Attention of one layer over packed rows."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: Layout, window: int | None, scaling: float | None) -> Tensor:
        """query [1, H, S, D], key and value [1, H_kv, S, D] → [1, S, H, D]. window: positions a token sees back, itself included."""
        options = {"scale": scaling, "window_size_left": -1 if window is None else window - 1, "window_size_right": -1}
        kept = query, key, value
        query, key, value = _flat(query), _seen(key, rows), _seen(value, rows)
        output, sums, state, unused, _ = _forward(
            query, key, value, rows.queries, rows.keys, rows.most_queries, rows.most_keys, 0.0, True, False, **options
        )
        ctx.save_for_backward(*kept, output, sums, state, unused)
        ctx.rows, ctx.options = rows, options
        return output[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        """Gradients with respect to query, key and value."""
        query, key, value, output, sums, state, unused = ctx.saved_tensors
        rows = ctx.rows
        given = gradients[0][0].contiguous(), _flat(query), _seen(key, rows), _seen(value, rows), output, sums
        segments = rows.queries, rows.keys, rows.most_queries, rows.most_keys
        to_query, to_key, to_value = _backward(*given, *segments, 0.0, True, state, unused, **ctx.options)
        return _heads_first(to_query), _gathered_back(to_key, rows), _gathered_back(to_value, rows), None, None, None


def attend(query: Tensor, key: Tensor, value: Tensor, rows: Layout, window: int | None, scaling: float | None) -> Tensor:
    """Attention of one layer. query [1, H, S, D], key and value [1, H_kv, S, D] → [1, S, H, D], in what autocast asks for."""
    dtype = forward_dtype(value)
    return VarlenAttention.apply(query.to(dtype), key.to(dtype), value.to(dtype), rows, window, scaling)  # type: ignore[no-untyped-call]


def usable(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the kernel serves these tensors: on a CUDA device, in 16 bits, no dropout, and its trial run was right."""
    if query.device.type != "cuda" or dropout > 0:
        return False
    dtype, heads, size = forward_dtype(value), query.shape[1], query.shape[3]
    if dtype not in (torch.bfloat16, torch.float16) or size != value.shape[3] or size > LARGEST_HEAD or size % 8:
        return False
    return works(heads, key.shape[1], size, dtype, query.device)


@functools.cache
def works(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel's trial run was right."""

    def trial(query: Tensor, key: Tensor, value: Tensor, rows: Sequence[Span], window: int | None) -> Tensor:
        return attend(query, key, value, layout(rows, device), window, None)

    return trusted("The variable-length kernel", trial, heads, kv_heads, head_dim, dtype, device)


def _flat(part: Tensor) -> Tensor:
    """[1, H, S, D] → [S, H, D], the last dimension without gaps."""
    part = part[0].transpose(0, 1)
    return part if part.stride(2) == 1 else part.contiguous()


def _heads_first(part: Tensor) -> Tensor:
    return part.transpose(0, 1)[None]


def _seen(part: Tensor, rows: Layout) -> Tensor:
    """[1, H_kv, S, D] → [K, H_kv, D]: keys or values as the segments see them."""
    flat = _flat(part)
    return flat if rows.shared is None else flat.index_select(0, rows.shared.gathered)


def _gathered_back(gradient: Tensor, rows: Layout) -> Tensor:
    """[K, H_kv, D] → [1, H_kv, S, D]: the gradient of `_seen`. With two replies a prompt at most two parts meet, in any order the same."""
    shared = rows.shared
    if shared is None:
        return _heads_first(gradient)
    whole = gradient.index_select(0, shared.own)
    return _heads_first(whole.index_add_(0, shared.copied, gradient.index_select(0, shared.copies)))
