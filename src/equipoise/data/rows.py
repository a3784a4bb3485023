"""Token rows: a prompt once, and its K branches. In memory a list; on disk flat, memory-mapped arrays."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from equipoise.core.arrays import Texts, pieces
from equipoise.core.errors import DataError
from equipoise.core.files import atomic, read_json, write_json

Ids = NDArray[np.int32]
Flags = NDArray[np.bool_]
SCHEMA_VERSION = 2


@dataclass(frozen=True, slots=True)
class Branch:
    """One reply as tokens.

    ids: int32 [T], T ≥ 1, the end-of-sequence token included where the reply ended by itself.
    marks: name → bool [T]; `learn` says which tokens the objective sees.
    facts: name → float; NaN is missing.
    """

    role: str
    ids: Ids
    marks: Mapping[str, Flags]
    facts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or len(self.ids) == 0:
            raise DataError(f"A {self.role} branch needs at least one token, found shape {self.ids.shape}.")
        for name, mark in self.marks.items():
            if mark.shape != self.ids.shape:
                raise DataError(f"Mark {name!r} has shape {mark.shape}, its branch {self.ids.shape}.")
        if "learn" not in self.marks:
            raise DataError(f"A {self.role} branch has no `learn` mark.")


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One unit of training: prompt int32 [P], P ≥ 1, and its branches, which all continue the same prompt."""

    id: str
    prompt: Ids
    branches: tuple[Branch, ...]

    def __post_init__(self) -> None:
        if self.prompt.ndim != 1 or len(self.prompt) == 0:
            raise DataError(f"Row {self.id}: the prompt needs at least one token (use BOS for all-token SFT).")
        if not self.branches:
            raise DataError(f"Row {self.id}: no reply.")

    @property
    def tokens(self) -> int:
        """Unique tokens: the prompt once plus every branch."""
        return len(self.prompt) + sum(len(branch.ids) for branch in self.branches)


class TokenRows(Sequence[TokenRow]):
    """A sequence of token rows over flat arrays, in memory or memory-mapped from a folder.

    Layout: `tokens` int32 holds each row's prompt, then its branches; `starts` int64 [segments + 1] cuts it;
    `segments` int64 [rows + 1] says which segments a row owns (its first is the prompt); `roles` one name per
    segment as an index into `role_names`; `learn` (and any other mark) bool over `tokens`; `facts` float64
    [segments] per name, NaN where missing; `ids` the row ids, as UTF-8 end to end. On disk one `.npy` file each, and
    `rows.json` with the names, written last (docs/contracts.md).
    """

    def __init__(
        self,
        tokens: Ids,
        starts: NDArray[np.int64],
        segments: NDArray[np.int64],
        roles: NDArray[np.int8],
        role_names: Sequence[str],
        marks: Mapping[str, Flags],
        facts: Mapping[str, NDArray[np.float64]],
        ids: Texts,
    ) -> None:
        self._tokens, self._starts, self._segments, self._roles = tokens, starts, segments, roles
        self._role_names, self._marks, self._facts, self._ids = tuple(role_names), dict(marks), dict(facts), ids

    @classmethod
    def of(cls, rows: Iterable[TokenRow]) -> TokenRows:
        """Pack rows into flat arrays. Raises DataError for a doubled id."""
        rows = list(rows)
        ids = [row.id for row in rows]
        if len(set(ids)) != len(ids):
            doubled = Counter(ids).most_common(1)[0][0]
            raise DataError(f"Row id {doubled!r} stands twice.")
        role_names = sorted({branch.role for row in rows for branch in row.branches})
        mark_names = sorted({name for row in rows for branch in row.branches for name in branch.marks})
        fact_names = sorted({name for row in rows for branch in row.branches for name in branch.facts})
        pieces: list[Ids] = []
        roles: list[int] = []
        segments = [0]
        marks: dict[str, list[Flags]] = {name: [] for name in mark_names}
        facts: dict[str, list[float]] = {name: [] for name in fact_names}
        for row in rows:
            pieces.append(row.prompt)
            roles.append(-1)
            for name in mark_names:
                marks[name].append(np.zeros(len(row.prompt), dtype=bool))
            for name in fact_names:
                facts[name].append(np.nan)
            for branch in row.branches:
                pieces.append(branch.ids)
                roles.append(role_names.index(branch.role))
                for name in mark_names:
                    marks[name].append(branch.marks.get(name, np.zeros(len(branch.ids), dtype=bool)))
                for name in fact_names:
                    facts[name].append(float(branch.facts.get(name, np.nan)))
            segments.append(len(pieces))
        starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces], dtype=np.int64)]).astype(np.int64)
        return cls(
            tokens=np.concatenate(pieces).astype(np.int32) if pieces else np.zeros(0, dtype=np.int32),
            starts=starts,
            segments=np.asarray(segments, dtype=np.int64),
            roles=np.asarray(roles, dtype=np.int8),
            role_names=role_names,
            marks={name: np.concatenate(values) if values else np.zeros(0, dtype=bool) for name, values in marks.items()},
            facts={name: np.asarray(values, dtype=np.float64) for name, values in facts.items()},
            ids=Texts.of(ids),
        )

    def save(self, folder: str | Path) -> None:
        """Write the arrays as `.npy` files and `rows.json` last: a folder without `rows.json` is not a set of rows."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.json").unlink(missing_ok=True)
        for name, value in self._columns().items():
            with atomic(folder / f"{name}.npy", "wb") as stream:
                np.save(stream, value, allow_pickle=False)
        write_json(folder / "rows.json", header_of(self._role_names, self._marks, self._facts))

    @classmethod
    def load(cls, folder: str | Path) -> TokenRows:
        """Memory-map a saved folder. Raises DataError where it is incomplete."""
        folder = Path(folder)
        if not (folder / "rows.json").is_file():
            raise DataError(f"{folder} holds no finished token rows (no rows.json). Run `equipoise data prepare` again.")
        header = read_header(folder)

        def array(name: str) -> NDArray[Any]:
            loaded: NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            return loaded

        return cls(
            tokens=array("tokens"),
            starts=array("starts"),
            segments=array("segments"),
            roles=array("roles"),
            role_names=header["roles"],
            marks={name: array(f"mark-{name}") for name in header["marks"]},
            facts={name: array(f"fact-{name}") for name in header["facts"]},
            ids=Texts(array("ids"), array("id-starts")),
        )

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenRow]: ...
    def __getitem__(self, index: int | slice) -> TokenRow | list[TokenRow]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        first, last = int(self._segments[index]), int(self._segments[index + 1])
        branches = []
        for segment in range(first + 1, last):
            cut = slice(int(self._starts[segment]), int(self._starts[segment + 1]))
            facts = {name: float(values[segment]) for name, values in self._facts.items() if not np.isnan(values[segment])}
            marks = {name: np.asarray(values[cut]) for name, values in self._marks.items()}
            role = self._role_names[int(self._roles[segment])]
            branches.append(Branch(role, np.asarray(self._tokens[cut]), marks, facts))
        prompt = np.asarray(self._tokens[int(self._starts[first]) : int(self._starts[first + 1])])
        return TokenRow(self._ids[index], prompt, tuple(branches))

    def __iter__(self) -> Iterator[TokenRow]:
        return (self[index] for index in range(len(self)))

    @property
    def ids(self) -> list[str]:
        """Row ids, in order."""
        return list(self._ids)

    def lengths(self) -> list[tuple[int, tuple[int, ...]]]:
        """(P, (T1..TK)) of every row, without touching the tokens: what planning needs."""
        sizes, cuts = np.diff(self._starts).tolist(), self._segments.tolist()
        return [(sizes[first], tuple(sizes[first + 1 : last])) for first, last in pairwise(cuts)]

    def fingerprint(self) -> str:
        """16 hex digits of the content: ids, tokens, cuts, roles, marks and facts."""
        digest = fingerprint_start(self._role_names)
        for name, values in self._columns().items():
            for _ in hashed(digest, name, pieces(values)):
                pass
        return digest.hexdigest()[:16]

    def _columns(self) -> dict[str, NDArray[Any]]:
        """File name → array, in the order they are written and hashed in."""
        arrays: dict[str, NDArray[Any]] = {"tokens": self._tokens, "starts": self._starts, "segments": self._segments, "roles": self._roles}
        arrays |= {f"mark-{name}": value for name, value in self._marks.items()}
        arrays |= {f"fact-{name}": value for name, value in self._facts.items()}
        return arrays | {"ids": self._ids.values, "id-starts": self._ids.starts}


def header_of(roles: Iterable[str], marks: Iterable[str], facts: Iterable[str]) -> dict[str, Any]:
    """What `rows.json` holds: the names, in the order of their numbers and files."""
    return {"schema_version": SCHEMA_VERSION, "roles": list(roles), "marks": list(marks), "facts": list(facts)}


def read_header(folder: Path) -> dict[str, Any]:
    """`rows.json` of a folder. Raises DataError for another format."""
    header: dict[str, Any] = read_json(folder / "rows.json")
    if header.get("schema_version") != SCHEMA_VERSION:
        raise DataError(f"{folder} was written with format {header.get('schema_version')}; this version reads {SCHEMA_VERSION}.")
    return header


def fingerprint_start(roles: Sequence[str]) -> Any:
    """The digest of a fingerprint with the role names in it; the arrays follow, in the order of their files."""
    return hashlib.sha256(json.dumps(list(roles)).encode())


def hashed(digest: Any, name: str, parts: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """The parts of an array as they come, taken into the digest under its file's name."""
    digest.update(name.encode())
    for part in parts:
        digest.update(part.tobytes())
        yield part
