"""Shards of token rows to one folder, array by array: no row becomes an object, and memory holds one shard's array."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.core.arrays import Seen, Texts, joined_cuts, print64, write_array
from equipoise.core.errors import DataError
from equipoise.core.files import atomic, write_json
from equipoise.data.rows import fingerprint_start, hashed, header_of, read_header


@dataclass(frozen=True)
class Joined:
    """What was written: rows, tokens, and the fingerprint that `TokenRows.fingerprint` gives."""

    rows: int
    tokens: int
    fingerprint: str


def join(shards: Sequence[Path], folder: Path) -> Joined:
    """Write the rows of all shards, in order, as `TokenRows.of` of them all and `save` would, byte for byte.

    Raises DataError for a doubled id.
    """
    parts = [_Part.of(shard) for shard in shards]
    roles = sorted({name for part in parts for name in part.roles})
    marks = sorted({name for part in parts for name in part.marks})
    facts = sorted({name for part in parts for name in part.facts})
    rows, segments, tokens = (sum(getattr(part, name) for part in parts) for name in ("rows", "segments", "tokens"))
    _check_ids(parts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").unlink(missing_ok=True)
    columns: dict[str, tuple[Any, int, Iterator[NDArray[Any]]]] = {
        "tokens": (np.int32, tokens, (part.array("tokens") for part in parts)),
        "starts": (np.int64, segments + 1, joined_cuts(part.array("starts") for part in parts)),
        "segments": (np.int64, rows + 1, joined_cuts(part.array("segments") for part in parts)),
        "roles": (np.int8, segments, (part.renumbered(roles) for part in parts)),
    }
    for name in marks:
        columns[f"mark-{name}"] = (np.bool_, tokens, map(partial(_Part.mark, name=name), parts))
    for name in facts:
        columns[f"fact-{name}"] = (np.float64, segments, map(partial(_Part.fact, name=name), parts))
    columns["ids"] = (np.uint8, sum(part.id_bytes for part in parts), (part.array("ids") for part in parts))
    columns["id-starts"] = (np.int64, rows + 1, joined_cuts(part.array("id-starts") for part in parts))
    digest = fingerprint_start(roles)
    for name, (dtype, length, values) in columns.items():
        with atomic(folder / f"{name}.npy", "wb") as stream:
            write_array(stream, dtype, length, hashed(digest, name, values))
    write_json(folder / "rows.json", header_of(roles, marks, facts))
    return Joined(rows, tokens, digest.hexdigest()[:16])


@dataclass(frozen=True, slots=True)
class _Part:
    """A saved shard: its sizes and names. Arrays are read when asked for, never mapped: mapped pages would count as memory."""

    folder: Path
    rows: int
    segments: int
    tokens: int
    id_bytes: int
    roles: tuple[str, ...]
    marks: tuple[str, ...]
    facts: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path) -> _Part:
        header = read_header(folder)
        rows, segments, tokens, id_bytes = (_length(folder / f"{name}.npy") for name in ("segments", "starts", "tokens", "ids"))
        return cls(folder, rows - 1, segments - 1, tokens, id_bytes, *(tuple(header[name]) for name in ("roles", "marks", "facts")))

    def array(self, name: str) -> NDArray[Any]:
        values: NDArray[Any] = np.load(self.folder / f"{name}.npy", allow_pickle=False)
        return values

    def ids(self) -> Texts:
        return Texts(self.array("ids"), self.array("id-starts"))

    def renumbered(self, roles: Sequence[str]) -> NDArray[np.int8]:
        """Roles as numbers of the whole's names; -1 (a prompt) stays."""
        numbers = np.asarray([*(roles.index(name) for name in self.roles), -1], dtype=np.int8)
        return numbers[self.array("roles")]

    def mark(self, name: str) -> NDArray[np.bool_]:
        return self.array(f"mark-{name}") if name in self.marks else np.zeros(self.tokens, dtype=bool)

    def fact(self, name: str) -> NDArray[np.float64]:
        return self.array(f"fact-{name}") if name in self.facts else np.full(self.segments, np.nan)


def _check_ids(parts: Sequence[_Part]) -> None:
    """Raise DataError for an id that stands twice. Equal prints of different ids are told apart by the ids themselves."""
    seen = Seen()
    suspects = {name for part in parts for name in part.ids() if not seen.add(print64(name))}
    if suspects:
        times = dict.fromkeys(suspects, 0)
        for name in (name for part in parts for name in part.ids() if name in suspects):
            times[name] += 1
            if times[name] > 1:
                raise DataError(f"Row id {name!r} stands twice.")


def _length(path: Path) -> int:
    """Elements of a saved array, from its header."""
    with open(path, "rb") as stream:
        np.lib.format.read_magic(stream)
        shape: tuple[int, ...] = np.lib.format.read_array_header_1_0(stream)[0]
    return shape[0]
