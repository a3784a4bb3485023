"""Packed batches: rows of one prompt and K replies, laid end to end in one sequence of S positions.

    ids        [ p p p p a a a b b | p p a a a a b b b ]
    positions  [ 0 1 2 3 4 5 6 4 5 | 0 1 2 3 4 5 2 3 4 ]

A reply attends to its own prompt and to itself, never to its siblings. The token before a reply's first one is the
prompt's last: it predicts the first token of every reply, so it is a source K times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch

from equipoise.core.records import REPLY_ROLES
from equipoise.data.rows import TokenRow

Tensor = torch.Tensor
Form = Literal["packed", "separate", "padded"]


@dataclass(frozen=True, slots=True)
class Span:
    """Where one row lies in the packed sequence: its first position, prompt length, and the length of each reply."""

    start: int
    prompt: int
    branches: tuple[int, ...]

    @property
    def length(self) -> int:
        """Positions the row takes."""
        return self.prompt + sum(self.branches)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch on its way through the model.

    ids, positions: int64 [1, S], or [N, L] in the padded form.
    rows: how the sequence is cut (empty in the padded form). padding: bool [N, L], padded form only.
    segments: int64 like ids, 0 prompt and 1 reply (encoders with token types).
    source, target, branch, offset: int64 [R]; position whose logits predict, token predicted, and where its
    log-prob goes in [N, T]. source indexes the flattened ids.
    unit, role: int64 [N]; mask: bool [N, T], the `learn` marks; marks: bool [N, T] by name, the others.
    facts: float64 [N] by name.
    sides: role → int64 [U], the branch of each unit with it; only roles that every unit has once, with tokens to learn.
    """

    ids: Tensor
    positions: Tensor
    rows: tuple[Span, ...]
    padding: Tensor | None
    segments: Tensor
    source: Tensor
    target: Tensor
    branch: Tensor
    offset: Tensor
    unit: Tensor
    role: Tensor
    mask: Tensor
    marks: Mapping[str, Tensor]
    facts: Mapping[str, Tensor]
    sides: Mapping[str, Tensor]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            field.name: to_device(value, device) for field in fields(self) if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        for name in ("marks", "facts", "sides"):
            moved[name] = {key: to_device(value, device) for key, value in getattr(self, name).items()}
        return replace(self, **moved)

    @property
    def tokens(self) -> int:
        """Positions the model runs on, padding included."""
        return self.ids.numel()


def to_device(value: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on another device; to a GPU from pinned memory, so that the copy does not hold up the host."""
    if torch.device(device).type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def pack(rows: Sequence[TokenRow], form: Form = "packed", pad_id: int = 0) -> PackedBatch:
    """Lay rows out as one micro-batch.

    form: `packed` shares each prompt among its replies; `separate` gives every reply a prompt of its own in the same
    packed sequence; `padded` stacks prompt + reply rows, right-padded, for models whose attention is not ours to choose.
    """
    pieces: list[tuple[np.ndarray, list[np.ndarray]]] = []
    for row in rows:
        replies = [branch.ids for branch in row.branches]
        if form == "packed":
            pieces.append((row.prompt, replies))
        else:
            pieces.extend((row.prompt, [reply]) for reply in replies)
    width = max(len(prompt) + len(replies[0]) for prompt, replies in pieces) if form == "padded" else 0

    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[np.ndarray] = []
    spans: list[Span] = []
    source: list[np.ndarray] = []
    start = 0
    for prompt, replies in pieces:
        size = len(prompt)
        ids.append(prompt)
        positions.append(np.arange(size))
        segments.append(np.zeros(size, dtype=np.int64))
        at = start + size
        for reply in replies:
            ids.append(reply)
            positions.append(np.arange(size, size + len(reply)))
            segments.append(np.ones(len(reply), dtype=np.int64))
            source.append(np.concatenate([[start + size - 1], np.arange(at, at + len(reply) - 1)]))
            at += len(reply)
        spans.append(Span(start, size, tuple(len(reply) for reply in replies)))
        if form == "padded":
            gap = start + width - at
            ids.append(np.full(gap, pad_id))
            # Positions go on through the padding: no two equal ones, so nothing takes it for a packed sequence.
            positions.append(np.arange(width - gap, width))
            segments.append(np.zeros(gap, dtype=np.int64))
            at = start + width
        start = at

    shape = (len(pieces), width) if form == "padded" else (1, start)
    lengths = np.array([span.length for span in spans])
    return PackedBatch(
        ids=_tensor(np.concatenate(ids)).view(shape),
        positions=_tensor(np.concatenate(positions)).view(shape),
        rows=() if form == "padded" else tuple(spans),
        padding=torch.from_numpy(np.arange(width)[None, :] < lengths[:, None]) if form == "padded" else None,
        segments=_tensor(np.concatenate(segments)).view(shape),
        source=_tensor(np.concatenate(source)),
        **_branches(rows),
    )


def _branches(rows: Sequence[TokenRow]) -> dict[str, Any]:
    """The fields that know replies, not positions: the same for every form."""
    branches = [branch for row in rows for branch in row.branches]
    counts = [len(branch.ids) for branch in branches]
    others = sorted({name for branch in branches for name in branch.marks} - {"learn"})
    marks = {name: np.zeros((len(branches), max(counts)), dtype=bool) for name in ("learn", *others)}
    for index, branch in enumerate(branches):
        for name, mark in branch.marks.items():
            marks[name][index, : counts[index]] = mark
    names = sorted({name for branch in branches for name in branch.facts})
    return {
        "target": _tensor(np.concatenate([branch.ids for branch in branches])),
        "branch": _tensor(np.repeat(np.arange(len(branches)), counts)),
        "offset": _tensor(np.concatenate([np.arange(count) for count in counts])),
        "unit": _tensor(np.repeat(np.arange(len(rows)), [len(row.branches) for row in rows])),
        "role": _tensor(np.array([REPLY_ROLES.index(branch.role) for branch in branches])),
        "mask": torch.from_numpy(marks["learn"]),
        "marks": {name: torch.from_numpy(marks[name]) for name in others},
        "sides": {role: side for role in {branch.role for branch in branches} if (side := _side(rows, role)) is not None},
        "facts": {name: torch.tensor([branch.facts.get(name, np.nan) for branch in branches], dtype=torch.float64) for name in names},
    }


def _side(rows: Sequence[TokenRow], role: str) -> Tensor | None:
    """[U] branch numbers of this role; None where a row has it not exactly once, or with nothing to learn."""
    found, first = [], 0
    for row in rows:
        mine = [number for number, branch in enumerate(row.branches) if branch.role == role]
        if len(mine) != 1 or not row.branches[mine[0]].marks["learn"].any():
            return None
        found.append(first + mine[0])
        first += len(row.branches)
    return _tensor(np.array(found))


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
