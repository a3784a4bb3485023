"""Streams: rows with the objective that reads them, scored through the model one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from equipoise.core.errors import DataError, UsageError, nearest
from equipoise.data.marks import with_marks
from equipoise.data.plan import MicroBatch
from equipoise.data.rows import TokenRow, TokenRows
from equipoise.models._elementwise import EAGER, Kernels
from equipoise.models.attention import NAME, attention_of
from equipoise.models.batch import Form, PackedBatch, pack, to_device
from equipoise.models.logps import policy_logps, policy_statistics, scores
from equipoise.objectives._base import STATS, Objective, Scored
from equipoise.reference.live import LiveReference
from equipoise.reference.mixture import Mixture
from equipoise.reference.store import ReferenceStore

Tensor = torch.Tensor


@dataclass
class Stream:
    """Rows, the objective that reads them, and this stream's weight in the step's loss.

    counts: float64 [rows], what each row adds to the step's divisor. store: where its reference is read; None: it has none, or
    a live one.
    """

    name: str
    rows: Sequence[TokenRow]
    objective: Objective
    weight: float = 1.0
    store: ReferenceStore | Mixture | None = None
    counts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.array([_count(self.objective, row) for row in self.rows], dtype=np.float64)

    @property
    def lengths(self) -> list[tuple[int, tuple[int, ...]]]:
        """(P, (T1..TK)) of every row."""
        if isinstance(self.rows, TokenRows):
            return self.rows.lengths()
        return [(len(row.prompt), tuple(len(branch.ids) for branch in row.branches)) for row in self.rows]


def check_stream(stream: Stream) -> None:
    """Raise UsageError or DataError where the rows are not what the objective needs."""
    needs = stream.objective.needs
    unknown = sorted(needs.stats - STATS.keys())
    if unknown:
        raise UsageError(f"{type(stream.objective).__name__} asks for the statistic {unknown[0]!r}.{nearest(unknown[0], STATS)}")
    if needs.stats and (needs.coupled or needs.readout == "score"):
        raise UsageError(f"{type(stream.objective).__name__}: statistics go with log-probs, and with objectives that are not coupled.")
    for row, count in zip(stream.rows, stream.counts, strict=True):
        roles = [branch.role for branch in row.branches]
        for role in needs.roles:
            if role not in roles or (not needs.many and roles.count(role) != 1):
                raise DataError(f"Row {row.id}: {type(stream.objective).__name__} needs exactly one {role!r} reply, found roles {roles}.")
        if needs.many and len(roles) < 2:
            raise DataError(f"Row {row.id}: {type(stream.objective).__name__} needs at least two replies, found one.")
        reads = [branch for branch in row.branches if branch.role in needs.roles] if needs.readout == "logps" else []
        if not np.isfinite(count) or count <= 0 or not all(branch.marks["learn"].any() for branch in reads):
            raise DataError(f"Row {row.id}: nothing to learn (the learn mask of a reply is empty). Drop the row.")


def _count(objective: Objective, row: TokenRow) -> float:
    marks = {branch.role: branch.marks["learn"] for branch in row.branches}
    facts = {name: value for branch in row.branches for name, value in branch.facts.items()}
    return objective.count(marks, facts)


@dataclass
class Forward:
    """How a micro-batch goes through the model.

    form: layout of the rows. autocast: context for the forward pass. pad_id fills the padded form. live: the reference of
    streams that have no store. kernels: what norms, gates, rotations and the head's softmax compute with.
    """

    form: Form
    device: torch.device
    pad_id: int = 0
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    live: LiveReference | None = None
    kernels: Kernels = EAGER

    def scored(self, model: Any, stream: Stream, rows: Sequence[int]) -> Scored:
        """Log-probs (or scores) of some rows of a stream, with their reference and statistics. policy, reference, mask: [N, T]."""
        needs = stream.objective.needs
        chosen = [with_marks(stream.rows[row], needs.marks) for row in rows]
        batch = pack(chosen, self.form, self.pad_id).to(self.device)
        policy = score = reference = logits = None
        stats: dict[str, Tensor] = {}
        if stream.store is not None:
            reference = self._stored(stream.store, chosen, batch)
        elif needs.reference != "none":
            if self.live is None:
                raise UsageError(f"Stream {stream.name} needs a reference and has neither a store nor a live one.")
            with self.autocast():
                reference, logits = self.live.read(model, batch, logits="kl_ref" in needs.stats)
        with self.autocast():
            if needs.readout == "score":
                score = scores(model, batch)
            elif needs.stats:
                policy, stats = policy_statistics(model, batch, sorted(needs.stats), logits)
            else:
                policy = policy_logps(model, batch)
        return Scored(
            policy=policy,
            reference=reference,
            mask=batch.mask,
            unit=batch.unit,
            role=batch.role,
            stats=stats,
            marks=batch.marks,
            score=score,
            facts=batch.facts,
            sides=batch.sides,
        )

    @contextmanager
    def attention(self, model: Any) -> Iterator[None]:
        """The attention this form runs under; the model's own outside the block."""
        with nullcontext() if self.form == "padded" else attention_of(model, NAME):
            yield

    def _stored(self, store: ReferenceStore | Mixture, rows: Sequence[TokenRow], batch: PackedBatch) -> Tensor:
        values = np.zeros(batch.mask.shape, dtype=np.float32)
        number = 0
        for row in rows:
            for reply in store.get(row):
                values[number, : len(reply)] = reply
                number += 1
        return to_device(torch.from_numpy(values), self.device)


def join(parts: Sequence[Scored]) -> Scored:
    """One view of several: units renumbered, [N, T] padded to the longest. Values keep their gradient."""
    width = max(part.mask.shape[1] for part in parts)
    firsts = np.cumsum([0, *(part.units for part in parts)])

    def stack(values: list[Tensor | None]) -> Tensor | None:
        given = [value for value in values if value is not None]
        if len(given) != len(values):
            return None
        return torch.cat([torch.nn.functional.pad(value, (0, width - value.shape[1])) if value.ndim == 2 else value for value in given])

    mask = stack([part.mask for part in parts])
    assert mask is not None
    names = {name for part in parts for name in part.facts}
    nothing = {len(part.mask): torch.full((len(part.mask),), torch.nan, dtype=torch.float64) for part in parts}
    return Scored(
        policy=stack([part.policy for part in parts]),
        reference=stack([part.reference for part in parts]),
        mask=mask,
        unit=torch.cat([part.unit + int(first) for part, first in zip(parts, firsts, strict=False)]),
        role=torch.cat([part.role for part in parts]),
        stats={name: value for name in parts[0].stats if (value := stack([part.stats[name] for part in parts])) is not None},
        marks={name: value for name in parts[0].marks if (value := stack([part.marks.get(name) for part in parts])) is not None},
        score=stack([part.score for part in parts]),
        facts={name: torch.cat([part.facts.get(name, nothing[len(part.mask)].to(part.mask.device)) for part in parts]) for name in names},
    )


def detached(scored: Scored) -> Scored:
    """The same values without their graph."""
    return replace(
        scored,
        policy=None if scored.policy is None else scored.policy.detach(),
        stats={name: value.detach() for name, value in scored.stats.items()},
        score=None if scored.score is None else scored.score.detach(),
    )


def row_names(stream: Stream, micro: MicroBatch) -> str:
    """Ids of a micro-batch's rows, for messages."""
    names = [stream.rows[row].id for row in micro.rows]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
