"""Streams: rows with the objective that reads them, scored through the model one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from equipoise.core.errors import DataError, UsageError
from equipoise.data.marks import with_marks
from equipoise.data.plan import MicroBatch
from equipoise.data.rows import TokenRow, TokenRows
from equipoise.models.attention import NAME, attention_of
from equipoise.models.batch import Form, PackedBatch, pack, to_device
from equipoise.models.logps import policy_logps, scores
from equipoise.objectives._base import Objective, Scored
from equipoise.reference.store import ReferenceStore

Tensor = torch.Tensor


@dataclass
class Stream:
    """Rows, the objective that reads them, and this stream's weight in the step's loss.

    counts: float64 [rows], what each row adds to the step's divisor. store: where stored references come from.
    """

    name: str
    rows: Sequence[TokenRow]
    objective: Objective
    weight: float = 1.0
    store: ReferenceStore | None = None
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
    if needs.stats:
        raise UsageError(
            f"{type(stream.objective).__name__} asks for {', '.join(sorted(needs.stats))}, which this engine does not compute."
        )
    for row, count in zip(stream.rows, stream.counts, strict=True):
        roles = [branch.role for branch in row.branches]
        for role in needs.roles:
            if role not in roles or (not needs.many and roles.count(role) != 1):
                raise DataError(f"Row {row.id}: {type(stream.objective).__name__} needs exactly one {role!r} reply, found roles {roles}.")
        if needs.many and len(roles) < 2:
            raise DataError(f"Row {row.id}: {type(stream.objective).__name__} needs at least two replies, found one.")
        if not np.isfinite(count) or count <= 0:
            raise DataError(f"Row {row.id}: nothing to learn (its learn mask is empty). Drop the row.")


def _count(objective: Objective, row: TokenRow) -> float:
    marks = {branch.role: branch.marks["learn"] for branch in row.branches}
    facts = {name: value for branch in row.branches for name, value in branch.facts.items()}
    return objective.count(marks, facts)


@dataclass
class Forward:
    """How a micro-batch goes through the model.

    form: layout of the rows. autocast: context for the forward pass. reference: context in which the model in hand is the
    reference (adapter off), for objectives whose reference is live. pad_id fills the padded form.
    """

    form: Form
    device: torch.device
    pad_id: int = 0
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    live_reference: Callable[[], AbstractContextManager[Any]] | None = None

    def scored(self, model: Any, stream: Stream, rows: Sequence[int]) -> tuple[Scored, PackedBatch]:
        """Log-probs (or scores) of some rows of a stream, with their reference. policy, reference, mask: [N, T]."""
        needs = stream.objective.needs
        chosen = [with_marks(stream.rows[row], needs.marks) for row in rows]
        batch = pack(chosen, self.form, self.pad_id).to(self.device)
        policy = score = reference = None
        with self.autocast():
            if needs.readout == "score":
                score = scores(model, batch)
            else:
                policy = policy_logps(model, batch)
        if needs.reference == "stored":
            reference = self._stored(stream, chosen, batch)
        elif needs.reference == "live":
            if self.live_reference is None:
                raise UsageError(f"{type(stream.objective).__name__} needs a live reference; train with use_peft=true.")
            with self.live_reference(), torch.no_grad(), self.autocast():
                reference = policy_logps(model, batch)
        return (
            Scored(
                policy=policy,
                reference=reference,
                mask=batch.mask,
                unit=batch.unit,
                role=batch.role,
                marks=batch.marks,
                score=score,
                facts=batch.facts,
                sides=batch.sides,
            ),
            batch,
        )

    @contextmanager
    def attention(self, model: Any) -> Iterator[None]:
        """The attention this form runs under; the model's own outside the block."""
        with nullcontext() if self.form == "padded" else attention_of(model, NAME):
            yield

    def _stored(self, stream: Stream, rows: Sequence[TokenRow], batch: PackedBatch) -> Tensor:
        if stream.store is None:
            raise UsageError(f"Stream {stream.name} needs reference log-probs and has no store.")
        values = np.zeros(batch.mask.shape, dtype=np.float32)
        number = 0
        for row in rows:
            for reply in stream.store.get(row):
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
        marks={name: value for name in parts[0].marks if (value := stack([part.marks.get(name) for part in parts])) is not None},
        score=stack([part.score for part in parts]),
        facts={name: torch.cat([part.facts.get(name, nothing[len(part.mask)].to(part.mask.device)) for part in parts]) for name in names},
    )


def detached(scored: Scored) -> Scored:
    """The same values without their graph."""
    return replace(
        scored,
        policy=None if scored.policy is None else scored.policy.detach(),
        score=None if scored.score is None else scored.score.detach(),
    )


def row_names(stream: Stream, micro: MicroBatch) -> str:
    """Ids of a micro-batch's rows, for messages."""
    names = [stream.rows[row].id for row in micro.rows]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
