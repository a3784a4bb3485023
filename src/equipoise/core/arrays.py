"""Arrays that may be larger than memory: written and read piece by piece, texts among them, and a small set of prints."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from equipoise.core.errors import DataError

PIECE = 1 << 18
"""Elements handled at once."""


def pieces(values: NDArray[Any], size: int = PIECE) -> Iterator[NDArray[Any]]:
    """An array in pieces of at most `size` elements."""
    return (values[start : start + size] for start in range(0, len(values), size))


def write_array(stream: IO[bytes], dtype: Any, length: int, parts: Iterable[NDArray[Any]]) -> None:
    """Write a `.npy` array [length] part by part: the bytes `np.save` gives for the whole, which is never held.

    Raises DataError where the parts hold another number of elements than was announced.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(stream, header)
    written = 0
    for part in parts:
        stream.write(np.asarray(part, dtype=dtype).tobytes())
        written += len(part)
    if written != length:
        raise DataError(f"An array of {length} elements was announced, and {written} came.")


def joined_cuts(parts: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """Cuts of ragged arrays as cuts of all of them end to end: each moved by what stands before it, the zero only once."""
    before = 0
    yield np.zeros(1, dtype=np.int64)
    for part in parts:
        yield part[1:] + before
        before += int(part[-1])


class Texts(Sequence[str]):
    """Texts as UTF-8 bytes uint8 end to end, cut by `starts` int64 [texts + 1]; in memory or memory-mapped."""

    def __init__(self, values: NDArray[np.uint8], starts: NDArray[np.int64]) -> None:
        self.values, self.starts = values, starts

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Pack texts."""
        # Ids come from other people's files, where half a surrogate pair may stand; it is written and read back as it is.
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        starts = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(item) for item in encoded], out=starts[1:])
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.values[int(self.starts[index]) : int(self.starts[index + 1])].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), PIECE):
            cuts = np.asarray(self.starts[first : first + PIECE + 1])
            held = self.values[int(cuts[0]) : int(cuts[-1])].tobytes()
            places = (cuts - cuts[0]).tolist()
            for start, end in pairwise(places):
                yield held[start:end].decode("utf-8", "surrogatepass")


def print64(text: str) -> int:
    """64 bits of a text's BLAKE2b, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Seen:
    """Which 64-bit numbers were added before, at 8 bytes each: sorted runs, merged when the next is as long.

    A Python set takes about ten times as much.
    """

    RECENT = 1 << 15

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._runs: list[array[int]] = []

    def add(self, value: int) -> bool:
        """Add a number; whether it is new."""
        if value in self._recent or any(_holds(run, value) for run in self._runs):
            return False
        self._recent.add(value)
        if len(self._recent) >= self.RECENT:
            self._settle()
        return True

    def _settle(self) -> None:
        run = np.sort(np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent)))
        self._recent.clear()
        while self._runs and len(self._runs[-1]) <= len(run):
            run = np.sort(np.concatenate([np.frombuffer(self._runs.pop(), dtype=np.uint64), run]), kind="stable")
        self._runs.append(array("Q", run.tobytes()))


def _holds(run: array[int], value: int) -> bool:
    place = bisect_left(run, value)
    return place < len(run) and run[place] == value
