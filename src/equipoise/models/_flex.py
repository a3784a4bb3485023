"""Packed attention as one FlexAttention kernel over the whole sequence: what a CUDA device runs in float32.

From the bounds of the keys that a query sees (`_dense.key_bounds`) come the mask rule inside the kernel and the table of
128 × 128 blocks that it skips, runs in full, or masks. Both are made once per micro-batch, on the device, without waiting for
it, and serve every layer, the backward pass and recomputation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from equipoise.models._compile import with_open_shapes
from equipoise.models._dense import key_bounds, trusted
from equipoise.models._elementwise import forward_dtype
from equipoise.models.batch import Span

Tensor = torch.Tensor
BLOCK = 128


def block_mask(rows: Sequence[Span], window: int | None, device: torch.device) -> BlockMask:
    """The mask of some rows in FlexAttention's form, made on the device without waiting for it."""
    host = torch.from_numpy(key_bounds(rows, window))
    if device.type == "cuda":
        host = host.pin_memory()
    # Separate tensors: as parts of one, their shared shape would be compared with the table's, and recompiled for.
    first, end, own = (bound.clone() for bound in host.to(device, non_blocking=True))

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ((key >= first[query]) & (key < end[query])) | ((key >= own[query]) & (key <= query))

    size = host.shape[1]
    pairs = _seen_pairs(first, end, own)
    full = pairs == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_listed((pairs > 0) & ~full), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(size, size)
    )


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None) -> Tensor:
    """Attention of one layer. query [1, H, S, D], key and value [1, H_kv, S, D] → [1, S, H, D], in value's dtype."""
    dtype = forward_dtype(value)
    output = _compiled()(
        query.to(dtype), key.to(dtype), value.to(dtype), block_mask=mask, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    return output.transpose(1, 2).contiguous()


def usable(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the kernel serves these tensors: on a CUDA device, longer than a block, no dropout, and its trial run was right."""
    if isinstance(query, FakeTensor):  # where only shapes are run, nothing is to be compiled
        return False
    if query.device.type != "cuda" or dropout > 0 or query.shape[2] <= BLOCK or key.shape[3] != value.shape[3]:
        return False
    return works(query.shape[1], key.shape[1], query.shape[3], forward_dtype(value), query.device)


@functools.cache
def works(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel's trial run was right."""

    def trial(query: Tensor, key: Tensor, value: Tensor, rows: Sequence[Span], window: int | None) -> Tensor:
        return attend(query, key, value, block_mask(rows, window, device), None)

    return trusted("FlexAttention", trial, heads, kv_heads, head_dim, dtype, device)


@functools.cache
def _compiled() -> Any:
    return with_open_shapes(flex_attention)


def _seen_pairs(first: Tensor, end: Tensor, own: Tensor) -> Tensor:
    """[S/128, S/128], rounded up: how many (query, key) pairs of each block are seen."""
    size = first.shape[0]
    blocks = -(-size // BLOCK)
    starts = torch.arange(blocks, device=first.device) * BLOCK
    after = torch.arange(1, size + 1, device=first.device)

    def overlap(start: Tensor, stop: Tensor) -> Tensor:
        return (torch.minimum(stop[:, None], starts + BLOCK) - torch.maximum(start[:, None], starts)).clamp_(min=0)

    seen = overlap(first, end) + overlap(own, after)
    return torch.nn.functional.pad(seen, (0, 0, 0, blocks * BLOCK - size)).view(blocks, BLOCK, blocks).sum(1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, and which, first ones first: int32 [1, 1, n] and [1, 1, n, n]."""
    order = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], order.int()[None, None]
