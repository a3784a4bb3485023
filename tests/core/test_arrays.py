"""Arrays written piece by piece are the arrays; texts come back as they were; a small set is a set."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.core.arrays import Seen, Texts, joined_cuts, pieces, print64, write_array
from equipoise.core.errors import DataError


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.bool_, np.float64, np.uint8])
@pytest.mark.parametrize("length", [0, 1, 9, 10, 1000])
def test_piece_by_piece_gives_the_bytes_of_np_save(kind: type, length: int) -> None:
    values = (np.arange(length) % 3).astype(kind)
    whole, streamed = io.BytesIO(), io.BytesIO()
    np.save(whole, values)
    write_array(streamed, kind, length, pieces(values, 7))
    assert streamed.getvalue() == whole.getvalue()


def test_another_length_than_announced_is_an_error() -> None:
    with pytest.raises(DataError, match="5 elements was announced, and 4 came"):
        write_array(io.BytesIO(), np.int32, 5, [np.zeros(4, dtype=np.int32)])


def test_cuts_of_parts_are_the_cuts_of_the_whole_also_with_an_empty_part() -> None:
    parts = [np.array(part) for part in ([0, 2, 2, 5], [0], [0, 1], [0])]
    assert np.concatenate(list(joined_cuts(parts))).tolist() == [0, 2, 2, 5, 6]
    assert [part.tolist() for part in joined_cuts([])] == [[0]]


@given(st.lists(st.text(st.characters(min_codepoint=0, max_codepoint=0x1F600))))
@settings(max_examples=60, deadline=None)
def test_texts_come_back_one_by_one_in_order_and_in_slices(texts: list[str]) -> None:
    packed = Texts.of([*texts, "half \ud800"])
    assert list(packed) == [packed[number] for number in range(len(packed))] == [*texts, "half \ud800"]
    assert packed[-1] == "half \ud800"
    assert packed[:2] == [*texts, "half \ud800"][:2]
    with pytest.raises(IndexError):
        packed[len(texts) + 1]


@given(st.lists(st.integers(0, 40) | st.integers(2**63, 2**64 - 1)))
@settings(max_examples=60, deadline=None)
def test_seen_is_a_set_also_after_its_runs_were_merged(values: list[int]) -> None:
    seen = Seen()
    seen.RECENT = 4  # type: ignore[misc]
    known: set[int] = set()
    for value in values:
        assert seen.add(value) == (value not in known)
        known.add(value)


def test_prints_of_texts_are_the_same_in_every_process() -> None:
    # b2sum -l 64 of "a", read from the low end.
    assert print64("a") == int.from_bytes(bytes.fromhex("40f89e395b66422f"), "little")
