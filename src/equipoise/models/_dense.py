"""Packed attention written down: which keys a query sees, and plain attention by that rule. Kernels are tried against it.

Every query sees at most two runs of neighbouring keys: a part of its row's prompt, and its own reply (or prompt) up to
itself. Three bounds a query say which; a window only moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from equipoise.core.progress import say
from equipoise.models.batch import Span

Tensor = torch.Tensor
# Largest error allowed in a trial, as a share of the largest value.
FLOAT32_TOLERANCE, LOW_TOLERANCE = 1e-4, 3e-2
TRIAL = (Span(0, 70, (60, 41)), Span(171, 1, (90,)))
TRIAL_WINDOWS = (None, 50)


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


def dense(query: Tensor, key: Tensor, value: Tensor, rows: Sequence[Span], window: int | None, scaling: float | None) -> Tensor:
    """Attention under a dense mask: slow, needs S² memory, and plain torch. [1, H, S, D], twice [1, H_kv, S, D] → [1, S, H, D]."""
    first, end, own = torch.from_numpy(key_bounds(rows, window)).to(query.device)[:, :, None]
    index = torch.arange(query.shape[2], device=query.device)
    allowed = ((index >= first) & (index < end)) | ((index >= own) & (index <= index[:, None]))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    return (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value).transpose(1, 2)


Attend = Callable[[Tensor, Tensor, Tensor, Sequence[Span], int | None], Tensor]


def trusted(name: str, attend: Attend, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Run a kernel forward and backward once and compare with plain attention. Says why where it cannot be used.

    attend: (query, key, value, rows, window) → output, as `dense`. Kernels are compiled or chosen per shape and dtype and may
    refuse (head sizes, too little shared memory), some only in the backward pass; found here, a run starts on another path
    instead of failing.
    """
    try:
        off = max(_error(attend, window, heads, kv_heads, head_dim, dtype, device) for window in TRIAL_WINDOWS)
        allowed = FLOAT32_TOLERANCE if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else LOW_TOLERANCE
        problem = None if off <= allowed else f"it is {off:.2g} off (allowed {allowed:.2g})"
    except Exception as error:  # kernels fail in many ways, and all have the same answer
        problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    if problem is not None:
        say(f"{name} cannot serve {heads} heads of {head_dim} in {dtype} ({problem}); attention takes another way")
    return problem is None


def _error(attend: Attend, window: int | None, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> float:
    """Largest error of output and gradients, as a share of the largest value."""
    generator = torch.Generator().manual_seed(0)
    size = sum(row.length for row in TRIAL)
    shapes = [(1, count, size, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    results = []
    # The trial may be asked for inside a training forward, or one on shapes: it must not touch that graph's autocast,
    # checkpoint hooks or modes.
    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(_same, _same),
    ):
        query, key, value, cotangent = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        for exact in (False, True):
            inputs = [part.detach().to(torch.float64 if exact else dtype).requires_grad_() for part in (query, key, value)]
            one, two, three = inputs
            output = dense(one, two, three, TRIAL, window, None) if exact else attend(one, two, three, TRIAL, window)
            gradients = torch.autograd.grad(output, inputs, cotangent.transpose(1, 2).to(output.dtype))
            results.append([output.detach().double(), *(part.double() for part in gradients)])
        return max(float((ours - exact).abs().max() / exact.abs().max()) for ours, exact in zip(*results, strict=True))


def _same(value: Tensor) -> Tensor:
    return value
