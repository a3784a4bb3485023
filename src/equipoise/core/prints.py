"""Fingerprints of prompts, without their text: which prompts of one set stand, exactly or nearly, in another.

They travel with everything trained (`trained_on.npz`), so that a judge and a policy can be shown to be independent
of the test prompts, and of each other, without shipping the data. They hold no text, but are no secret either: whoever
hashes a dictionary can find the words of short prompts.

*Exact* means equal after folding: Unicode NFKC, lower case, punctuation, white space and role markers
(`Human:`, `Assistant:`, …) gone. *Near* means that at least the share `near` of the shorter text's word-3-grams stands
in the other (containment: it is never below the Jaccard similarity, so it also finds a conversation carried on and a
prompt put into a template; A. Broder, "On the resemblance and containment of documents", 1997). Where the shorter
text has fewer than 12 words, the Jaccard similarity of the word sets counts instead (and none is near a text of 24
words or more): one changed word spoils three of its few 3-grams, and a short question stands inside many longer
texts. Similarities are computed in full, by a sparse
product over the shingles both sides know, not estimated.
"""

from __future__ import annotations

import re
import unicodedata
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from equipoise.core.arrays import joined_cuts, print64, write_array
from equipoise.core.errors import DataError, UsageError
from equipoise.core.files import atomic
from equipoise.core.records import Message

SCHEMA_VERSION = 1
SHORT = 12
"""Below so many words a text is compared by its words instead of its word-3-grams."""

_CELLS = 4_000_000  # most (row, row) cells looked at in one go: keeps memory flat at some tens of megabytes
_ROLE = re.compile(r"^\s*(?:human|user|assistant|system|ai)\s*:", re.IGNORECASE | re.MULTILINE)
# Scripts written without spaces are cut into characters; everything else into runs of letters and digits.
_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_ASCII_WORD = re.compile(r"[a-z0-9]+")
_AT_ONCE = 2000  # prompts hashed in one go
_FIELDS = {
    "exact": np.uint64,
    "words": np.int32,
    "word_starts": np.int64,
    "word_values": np.uint32,
    "gram_starts": np.int64,
    "gram_values": np.uint32,
}


@dataclass(frozen=True, slots=True)
class Overlap:
    """One prompt of a set that stands in another set: where in each, how, and how similar (1.0 for `exact`)."""

    index: int
    other_index: int
    kind: Literal["exact", "near"]
    similarity: float


def conversation_text(messages: Iterable[Message]) -> str:
    """The text of a conversation as prints see it: the turns' contents, system turns left out.

    A system prompt that every row shares would make all rows look alike, and is no test prompt.
    """
    return "\n\n".join(message.content for message in messages if message.role != "system")


def fold(text: str) -> list[str]:
    """The words of a text after folding case, punctuation, white space and role markers."""
    if text.isascii():  # the same words, by a simpler pattern
        return _ASCII_WORD.findall(_ROLE.sub("\n", text).lower())
    return _WORD.findall(unicodedata.normalize("NFKC", _ROLE.sub("\n", text)).casefold())


@dataclass(frozen=True)
class PromptPrints:
    """Fingerprints of N prompts, in the order given.

    exact: uint64 [N], hash of the folded text. words: int32 [N], its number of words (0: nothing to compare).
    word_values, gram_values: uint32, sorted distinct hashes of words and word-3-grams, row after row, cut by
    word_starts and gram_starts (int64 [N + 1]). A row holds words up to 2 × SHORT words, 3-grams from SHORT words on.
    """

    exact: NDArray[np.uint64]
    words: NDArray[np.int32]
    word_starts: NDArray[np.int64]
    word_values: NDArray[np.uint32]
    gram_starts: NDArray[np.int64]
    gram_values: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.exact)

    @classmethod
    def of(cls, prompts: Iterable[str]) -> PromptPrints:
        """Prints of prompts (whole conversations as text; see `conversation_text`)."""
        prompts, known = iter(prompts), _Hashes()
        parts = []
        while some := list(islice(prompts, _AT_ONCE)):
            parts.append(cls._of(some, known))
        return parts[0] if len(parts) == 1 else cls.merge(parts) if parts else cls._of([], known)

    @classmethod
    def _of(cls, prompts: Sequence[str], known: _Hashes) -> PromptPrints:
        exact, counts, flat = array("Q"), array("i"), array("Q")
        for prompt in prompts:
            folded = fold(prompt)
            exact.append(print64(" ".join(folded)))
            counts.append(len(folded))
            flat.extend(map(known.__getitem__, folded))
        hashes, sizes = np.array(flat, dtype=np.uint64), np.array(counts, dtype=np.int32)
        row = np.repeat(np.arange(len(sizes)), sizes)
        few = sizes[row] < 2 * SHORT
        inside = (row[2:] == row[:-2]) & (sizes[row[2:]] >= SHORT)
        grams = _three_grams(hashes)[inside]
        return cls(
            np.array(exact, dtype=np.uint64),
            sizes,
            *_distinct(row[few], hashes[few], len(sizes)),
            *_distinct(row[2:][inside], grams, len(sizes)),
        )

    @classmethod
    def merge(cls, parts: Iterable[PromptPrints]) -> PromptPrints:
        """One set of prints holding all of `parts`, in order. No parts: the empty set."""
        parts = list(parts)
        if not parts:
            return cls.of([])
        return cls(
            exact=np.concatenate([part.exact for part in parts]),
            words=np.concatenate([part.words for part in parts]),
            word_starts=np.concatenate(list(joined_cuts(part.word_starts for part in parts))),
            word_values=np.concatenate([part.word_values for part in parts]),
            gram_starts=np.concatenate(list(joined_cuts(part.gram_starts for part in parts))),
            gram_values=np.concatenate([part.gram_values for part in parts]),
        )

    @staticmethod
    def join(parts: Sequence[Path], path: str | Path) -> None:
        """Write saved prints as one file, in order: what `merge` of them and `save` would write, one array of one part in memory."""
        lengths = {name: sum(len(part) for part in _arrays(parts, name)) for name in _FIELDS}
        with atomic(path, "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name in ("schema_version", *_FIELDS):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    if name == "schema_version":
                        np.save(member, np.int64(SCHEMA_VERSION))
                    elif name.endswith("_starts"):
                        write_array(member, np.int64, lengths[name] - len(parts) + 1, joined_cuts(_arrays(parts, name)))
                    else:
                        write_array(member, _FIELDS[name], lengths[name], _arrays(parts, name))

    def save(self, path: str | Path) -> None:
        """Write one `.npz` file atomically; the same prints give the same bytes."""
        with atomic(path, "wb") as stream:
            np.savez(stream, schema_version=np.int64(SCHEMA_VERSION), **{name: getattr(self, name) for name in _FIELDS})

    @classmethod
    def load(cls, path: str | Path) -> PromptPrints:
        """Read a saved file. Raises DataError where it is absent, damaged or something else."""
        try:
            with np.load(path, allow_pickle=False) as data:
                version = int(data["schema_version"])
                arrays = {name: data[name] for name in _FIELDS}
        except FileNotFoundError as error:
            raise DataError(f"{path} does not exist.") from error
        except (KeyError, ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} holds no prompt fingerprints, or is damaged ({error}).") from error
        if version != SCHEMA_VERSION:
            raise DataError(f"{path} was written with format {version}; this version reads {SCHEMA_VERSION}.")
        prints = cls(**arrays)
        rows = len(prints.exact)
        if not (len(prints.words) == rows and len(prints.word_starts) == len(prints.gram_starts) == rows + 1):
            raise DataError(f"{path} is damaged: its arrays do not fit together.")
        return prints

    def shared_with(self, other: PromptPrints, near: float = 0.8) -> list[Overlap]:
        """The prompts of this set that stand in `other`, by index; for each its best match (the earliest of equals).

        near: similarity (see the module's text) from which a prompt counts as near, 0.5 to 1. Prompts without a word
        match nothing.
        Raises UsageError for `near` out of range.
        """
        if not 0.5 <= near <= 1.0:
            raise UsageError(f"near must lie between 0.5 and 1, found {near}.")
        found = self._exact_in(other)
        rest = np.asarray([index for index in range(len(self)) if index not in found and self.words[index]], dtype=np.int64)
        for matches in (self._near_in(other, near, rest, "word"), self._near_in(other, near, rest, "gram")):
            for match in matches:
                best = found.get(match.index)
                if best is None or (match.similarity, -match.other_index) > (best.similarity, -best.other_index):
                    found[match.index] = match
        return [found[index] for index in sorted(found)]

    def _exact_in(self, other: PromptPrints) -> dict[int, Overlap]:
        values, first = np.unique(other.exact, return_index=True)
        if not len(values):
            return {}
        place = np.minimum(np.searchsorted(values, self.exact), len(values) - 1)
        hits = np.flatnonzero((values[place] == self.exact) & (self.words > 0))
        return {int(index): Overlap(int(index), int(first[place[index]]), "exact", 1.0) for index in hits}

    def _near_in(self, other: PromptPrints, near: float, rows: NDArray[np.int64], kind: Literal["word", "gram"]) -> list[Overlap]:
        """The best near match of each of `rows`, by words or by 3-grams."""
        mine, theirs = self._shingles(kind), other._shingles(kind)
        vocabulary = np.intersect1d(mine.values, theirs.values)
        if not len(vocabulary) or not len(rows):
            return []
        left, right = mine.matrix(vocabulary), theirs.matrix(vocabulary).T.tocsr()
        matches = []
        step = max(1, _CELLS // max(1, len(other)))
        for start in range(0, len(rows), step):
            chunk = rows[start : start + step]
            common = (left[chunk] @ right).tocoo()
            row, column = chunk[common.coords[0]], common.coords[1]
            sizes, other_sizes = mine.sizes[row], theirs.sizes[column]
            if kind == "word":
                similarity = common.data / (sizes + other_sizes - common.data)
                keep = (similarity >= near) & (np.minimum(self.words[row], other.words[column]) < SHORT)
            else:
                similarity = common.data / np.minimum(sizes, other_sizes)
                keep = similarity >= near
            matches += _best(row[keep], column[keep], similarity[keep])
        return matches

    def _shingles(self, kind: Literal["word", "gram"]) -> _Shingles:
        return _Shingles(self.word_values, self.word_starts) if kind == "word" else _Shingles(self.gram_values, self.gram_starts)


@dataclass(frozen=True)
class _Shingles:
    """Ragged rows of sorted distinct shingle hashes."""

    values: NDArray[np.uint32]
    starts: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    def matrix(self, vocabulary: NDArray[np.uint32]) -> Any:
        """Sparse [rows, vocabulary], 1 where the row holds the shingle; shingles outside the vocabulary are left out."""
        from scipy.sparse import csr_array

        place = np.minimum(np.searchsorted(vocabulary, self.values), len(vocabulary) - 1)
        known = vocabulary[place] == self.values
        cuts = np.concatenate([[0], np.cumsum(known)])[self.starts]
        ones = np.ones(int(known.sum()), dtype=np.int32)
        return csr_array((ones, place[known], cuts), shape=(len(self.starts) - 1, len(vocabulary)))


class _Hashes(dict[str, int]):
    """Word → hash, made once."""

    def __missing__(self, word: str) -> int:
        self[word] = made = print64(word)
        return made


def _best(row: NDArray[Any], column: NDArray[Any], similarity: NDArray[Any]) -> list[Overlap]:
    """Of every row the most similar column, the earliest of equals."""
    order = np.lexsort((column, -similarity, row))
    _, first = np.unique(row[order], return_index=True)
    return [Overlap(int(row[index]), int(column[index]), "near", float(similarity[index])) for index in order[first]]


def _three_grams(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hashes of all runs of three words: [W] → [W - 2]. Multiplication by odd constants, modulo 2^64, keeps the order of words."""
    with np.errstate(over="ignore"):
        mixed = hashes[:-2] * np.uint64(0x9E3779B97F4A7C15) + hashes[1:-1] * np.uint64(0xC2B2AE3D27D4EB4F) + hashes[2:]
        return (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)


def _distinct(row: NDArray[np.int64], hashes: NDArray[np.uint64], rows: int) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Each row's sorted distinct upper halves as (starts, values): 32 bits are plenty for a similarity, and halve the file."""
    keys = np.unique((row.astype(np.uint64) << np.uint64(32)) | (hashes >> np.uint64(32)))
    starts = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=rows), out=starts[1:])
    return starts, keys.astype(np.uint32)


def _arrays(paths: Iterable[Path], name: str) -> Iterator[NDArray[Any]]:
    """One array of each of some saved files."""
    for path in paths:
        with np.load(path, allow_pickle=False) as data:
            yield data[name]
