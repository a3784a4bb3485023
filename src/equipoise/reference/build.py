"""Fill the reference store: one forward pass over the rows it lacks, longest first, a shard every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from equipoise.core.errors import NumericsError
from equipoise.core.progress import bar
from equipoise.data.plan import MicroBatch, Planner
from equipoise.data.rows import TokenRow
from equipoise.models.batch import Form, pack
from equipoise.models.layers import rounded_once
from equipoise.models.logps import evaluating, policy_logps
from equipoise.reference.store import ReferenceStore, Values

SECONDS_A_SHARD = 20.0


def reference_logps(
    model: Any,
    rows: Sequence[TokenRow],
    form: Form,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[list[Values]]:
    """Log-probs of every reply token of some rows under `model`, in eval mode and without gradient. float32 [T] each, nats."""
    batch = pack(rows, form).to(device)
    with evaluating(model), torch.no_grad(), autocast():
        values = policy_logps(model, batch).float().cpu().numpy()
    result: list[list[Values]] = []
    number = 0
    for row in rows:
        replies = [values[number + index, : len(branch.ids)].copy() for index, branch in enumerate(row.branches)]
        if not all(np.isfinite(reply).all() for reply in replies):
            raise NumericsError(f"Row {row.id}: the reference model gives log-probs that are not finite.")
        result.append(replies)
        number += len(row.branches)
    return result


def levelled(mine: Sequence[MicroBatch], idle: MicroBatch) -> list[MicroBatch]:
    """This rank's micro-batches, filled up with idle ones to as many as the rank with most has. Every rank must call it.

    Forward passes of a sharded model are collective, and DDP's broadcast buffers: a rank that ran fewer would leave the
    others waiting.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(mine)
    counts: list[int] = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(counts, len(mine))
    return [*mine, *[idle] * (max(counts) - len(mine))]


def build(
    model: Any,
    rows: Sequence[TokenRow],
    store: ReferenceStore,
    form: Form,
    token_budget: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    rank: int = 0,
    world_size: int = 1,
    title: str = "reference",
) -> dict[str, float]:
    """Compute what the store lacks of these rows (this rank's share). A kill loses at most one shard's work.

    Returns:
        `tokens` run through the model and `seconds` it took; both 0 where the store had everything.
    """
    lacking = [rows[index] for index in store.missing(rows)]
    if not lacking:
        return {"tokens": 0, "seconds": 0.0}
    lengths = tuple((len(row.prompt), tuple(len(branch.ids) for branch in row.branches)) for row in lacking)
    planner = Planner((lengths,), world_size, token_budget, shared=form == "packed", padded=form == "padded", world_size=world_size)
    start = last = time.monotonic()
    waiting: list[TokenRow] = []
    values: list[list[Values]] = []
    tokens = 0
    with bar(title, len(lacking) / world_size) as progress, rounded_once(model, device):
        mine = planner.all_rows(0, rank)
        for micro in mine if world_size == 1 else levelled(mine, MicroBatch(0, (0,), idle=True)):
            chosen = [lacking[index] for index in micro.rows]
            computed = reference_logps(model, chosen, form, device, autocast)
            if micro.idle:
                continue
            values += computed
            waiting += chosen
            tokens += sum(row.tokens for row in chosen)
            progress.advance(len(chosen))
            if time.monotonic() - last > SECONDS_A_SHARD:
                store.add(waiting, values)
                waiting, values, last = [], [], time.monotonic()
    store.add(waiting, values)
    return {"tokens": tokens, "seconds": round(time.monotonic() - start, 3)}


def check(
    model: Any,
    rows: Sequence[TokenRow],
    store: ReferenceStore,
    form: Form,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    tolerance: float = 1e-3,
) -> float:
    """Compute a few stored rows again and compare. Returns the mean difference a token [nats]: in bfloat16 single tokens scatter.

    Raises NumericsError where it exceeds the tolerance: the store was damaged, or the numerics changed without a new number.
    """
    fresh = [new for replies in reference_logps(model, rows, form, device, autocast) for new in replies]
    stored = [old for row in rows for old in store.get(row)]
    off = float(np.abs(np.concatenate(fresh) - np.concatenate(stored)).mean())
    if not off <= tolerance:
        raise NumericsError(
            f"The reference store {store.folder} is {off:.2g} nats a token off the reference model on rows "
            f"{', '.join(row.id for row in rows)} (allowed {tolerance:.2g}). Delete that folder and run again."
        )
    return off
