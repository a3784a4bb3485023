"""Packed attention as one FlexAttention kernel over the whole sequence: what a CUDA device runs.

Every query may see at most two runs of neighbouring keys: a part of its row's prompt, and its own reply (or prompt) up to
itself. Three bounds a query say which; a window only moves them. From the bounds come the mask rule inside the kernel and
the table of 128 × 128 blocks that it skips, runs in full, or masks. Both are made once per micro-batch, on the device,
without waiting for it, and serve every layer, the backward pass and recomputation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from equipoise.core.progress import say
from equipoise.models._compile import with_open_shapes
from equipoise.models.batch import Span

Tensor = torch.Tensor
BLOCK = 128
# Largest error allowed by the trial run, as a share of the largest value.
FLOAT32_TOLERANCE, LOW_TOLERANCE = 1e-4, 3e-2
TRIAL = (Span(0, 70, (60, 41)), Span(171, 1, (90,)))


def key_bounds(rows: Sequence[Span], window: int | None) -> np.ndarray:
    """Which keys each query sees: int32 [3, S], with query q seeing key k where first ≤ k < end or own ≤ k ≤ q.

    [0] and [1]: first and end of its part of the prompt (0, 0: none, the query is itself in the prompt). [2]: own.
    window: positions a token sees back, itself included; None: all.
    """
    bounds = np.zeros((3, sum(row.length for row in rows)), dtype=np.int32)
    for row in rows:
        end = row.start + row.prompt
        bounds[2, row.start : end] = row.start
        at = end
        for reply in row.branches:
            bounds[0, at : at + reply] = row.start
            bounds[1, at : at + reply] = end
            bounds[2, at : at + reply] = at
            if window is not None:
                positions = np.arange(row.prompt, row.prompt + reply)
                bounds[0, at : at + reply] = row.start + np.clip(positions - window + 1, 0, row.prompt)
            at += reply
    if window is not None:
        np.maximum(bounds[2], np.arange(bounds.shape[1]) - window + 1, out=bounds[2])
    return bounds


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
    query, key, value = _one_dtype(query, key, value)
    output = _compiled()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=key.shape[1] != query.shape[1])
    return output.transpose(1, 2).contiguous()


def usable(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the kernel serves these tensors: on a CUDA device, longer than a block, no dropout, and its trial run was right."""
    if query.device.type != "cuda" or dropout > 0 or query.shape[2] <= BLOCK or key.shape[3] != value.shape[3]:
        return False
    query, key, value = _one_dtype(query, key, value)
    return works(query.shape[1], key.shape[1], query.shape[3], query.dtype, query.device)


@functools.cache
def works(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Run the kernel forward and backward once and compare with plain attention. Says why where it cannot be used.

    Triton compiles per shape and dtype and may refuse (head sizes below 16, too little shared memory for wide float32
    heads), some of it only in the backward pass; found here, a run starts on the row-by-row path instead of failing.
    """
    try:
        off = _trial(heads, kv_heads, head_dim, dtype, device)
        allowed = FLOAT32_TOLERANCE if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else LOW_TOLERANCE
        problem = None if off <= allowed else f"it is {off:.2g} off (allowed {allowed:.2g})"
    except Exception as error:  # a compiler fails in many ways, and all have the same answer
        problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    if problem is not None:
        say(f"FlexAttention cannot serve {heads} heads of {head_dim} in {dtype} ({problem}); attention runs row by row")
    return problem is None


def _trial(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> float:
    """Largest error of output and gradients, as a share of the largest value, against attention under a dense mask."""
    generator = torch.Generator().manual_seed(0)
    size = sum(row.length for row in TRIAL)
    shapes = [(1, count, size, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    query, key, value, cotangent = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    mask = block_mask(TRIAL, None, device)
    results = []
    # The trial may be asked for inside a training forward: it must not touch that graph's autocast or checkpoint hooks.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(_same, _same),
    ):
        for exact in (False, True):
            inputs = [part.detach().to(torch.float64 if exact else dtype).requires_grad_() for part in (query, key, value)]
            output = (dense if exact else attend)(inputs[0], inputs[1], inputs[2], mask, None)
            gradients = torch.autograd.grad(output, inputs, cotangent.transpose(1, 2).to(output.dtype))
            results.append([output.detach().double(), *(part.double() for part in gradients)])
    return max(float((ours - exact).abs().max() / exact.abs().max()) for ours, exact in zip(*results, strict=True))


def dense(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None) -> Tensor:
    """The same attention with a dense mask from the same rule: slow, needs S² memory, and plain torch."""
    index = torch.arange(query.shape[2], device=query.device)
    allowed = mask.mask_mod(index, index, index[:, None], index[None, :])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    return (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@functools.cache
def _compiled() -> Any:
    return with_open_shapes(flex_attention)


def _one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast the dtype it asks for (norms on queries and keys leave float32 ones), else the value's."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


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


def _same(value: Tensor) -> Tensor:
    return value
