"""KTO's other replies: each unit gets the reply of another one, whose prompt is of another cluster."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.core.arrays import print64
from equipoise.core.errors import DataError, EquipoiseError
from equipoise.core.records import Record, Reply, messages_from
from equipoise.data.mixture import cluster


def with_mismatched(units: Iterable[Record], spool: Path | None = None) -> Iterator[Record]:
    """Each unit with the reply of another one beside its own: a rotation, the same every time.

    Good and bad replies rotate among themselves, so that over the data set every reply serves about once. The partner of
    the last unit may be the first, so everything is read once before the first unit can be given: into the file `spool`,
    and memory holds about 40 bytes a unit, or, without one, into a list.
    Raises DataError where all units answer one prompt.
    """
    clusters, labels = array("Q"), array("b")
    with ExitStack() as stack:
        made: list[Record] | _Spool = [] if spool is None else stack.enter_context(_Spool(spool))
        for unit in units:
            made.append(unit)
            clusters.append(print64(cluster(unit.first_turn)))
            labels.append({True: 1, False: 0, None: -1}[unit.replies[0].label])
        for index, other in enumerate(partners(np.frombuffer(clusters, dtype=np.uint64), np.frombuffer(labels, dtype=np.int8))):
            unit = made[index]
            yield replace(unit, replies=(unit.replies[0], replace(made[int(other)].replies[0], role="mismatched")))


def partners(clusters: NDArray[np.uint64], labels: NDArray[np.int8]) -> NDArray[np.int64]:
    """Of each unit the next one with its label and another cluster, round and round; int64 [units].

    Where all of one label answer one prompt, they borrow from everybody. Raises DataError where there is one cluster only.
    """
    if len(np.unique(clusters)) < 2:
        raise DataError("KTO needs replies to other prompts, and all rows share one prompt.")
    partner = np.zeros(len(clusters), dtype=np.int64)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        order = own
        if (clusters[own] == clusters[own[0]]).all():
            order = np.concatenate([own, np.flatnonzero(labels != label)])
        ring = clusters[order]
        # Runs of one cluster, on the ring: the partner is where the next run begins.
        begins = np.flatnonzero(ring != np.roll(ring, 1))
        place = np.searchsorted(begins, np.arange(len(own)), side="right") % len(begins)
        partner[own] = order[begins[place]]
    return partner


class _Spool:
    """Units in a file of JSON lines, written one after the other and then read by number; 8 bytes each in memory."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._stream = open(path, "w+b")  # noqa: SIM115 (closed on exit)
        self._starts, self._end = array("q"), 0

    def append(self, unit: Record) -> None:
        replies = [[reply.text, reply.role, reply.source, dict(reply.scores), reply.safe, reply.label] for reply in unit.replies]
        value = {"id": unit.id, "prompt": [turn.as_dict() for turn in unit.prompt], "replies": replies}
        self._starts.append(self._end)
        try:
            self._end += self._stream.write(json.dumps(value).encode() + b"\n")
        except OSError as error:
            raise EquipoiseError(f"Could not write {self._path}: {error.strerror or error}.") from error

    def __getitem__(self, index: int) -> Record:
        self._stream.seek(self._starts[index])
        value: dict[str, Any] = json.loads(self._stream.readline())
        return Record(value["id"], messages_from(value["prompt"]), tuple(Reply(*reply) for reply in value["replies"]))

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
