from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise.core.errors import DataError, EquipoiseError, NumericsError
from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.batch import pack
from equipoise.models.logps import policy_logps
from equipoise.reference import build as build_module
from equipoise.reference.build import build, check
from equipoise.reference.key import Context, row_key
from equipoise.reference.store import ReferenceStore
from tests.tiny import pairs, tiny

register()
CPU = torch.device("cpu")
CONTEXT = Context("weights", "none", "float32", "packed/cpu")


def test_holds_what_a_forward_gives(tmp_path: Path) -> None:
    rows, model = pairs(6), tiny()
    with attention_of(model, NAME):
        cost = build(model, rows, ReferenceStore(tmp_path, CONTEXT), "packed", 50, CPU)
        with torch.no_grad():
            expected = policy_logps(model, pack(rows))
    assert cost["tokens"] == sum(row.tokens for row in rows)
    store = ReferenceStore(tmp_path, CONTEXT)
    number = 0
    for row in rows:
        for branch, values in zip(row.branches, store.get(row), strict=True):
            np.testing.assert_allclose(values, expected[number, : len(branch.ids)], atol=1e-5)
            number += 1


def test_a_second_build_computes_nothing(tmp_path: Path) -> None:
    rows, model = pairs(6), tiny()
    with attention_of(model, NAME):
        build(model, rows, ReferenceStore(tmp_path, CONTEXT), "packed", 50, CPU)
        assert build(model, rows, ReferenceStore(tmp_path, CONTEXT), "packed", 50, CPU) == {"tokens": 0, "seconds": 0.0}


def test_an_interrupted_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard that was written counts; only the rest is computed again."""
    rows, model = pairs(8), tiny()
    monkeypatch.setattr(build_module, "SECONDS_A_SHARD", 0.0)
    real, calls = build_module.reference_logps, []

    def failing(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(build_module, "reference_logps", failing)
    with attention_of(model, NAME), pytest.raises(KeyboardInterrupt):
        build(model, rows, ReferenceStore(tmp_path, CONTEXT), "packed", 1, CPU)
    assert len(ReferenceStore(tmp_path, CONTEXT).missing(rows)) == 5
    with attention_of(model, NAME):
        cost = build(model, rows, ReferenceStore(tmp_path, CONTEXT), "packed", 1, CPU)
    store = ReferenceStore(tmp_path, CONTEXT)
    assert store.missing(rows) == []
    assert 0 < cost["tokens"] < sum(row.tokens for row in rows)


def test_missing_rows_are_an_error_that_names_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Row row-0: its chosen reply has no reference"):
        ReferenceStore(tmp_path, CONTEXT).get(pairs(1)[0])


def test_the_key_is_what_the_numbers_depend_on() -> None:
    changed = [dataclasses.replace(CONTEXT, **{name: "other"}).name() for name in ("weights", "adapter", "dtype", "attention")]
    assert len({CONTEXT.name(), *changed}) == 5
    one, two = np.array([1, 2, 3], dtype=np.int32), np.array([4], dtype=np.int32)
    # Another cut of the same tokens is another key.
    assert row_key(one, two) != row_key(one[:2], np.array([3, 4], dtype=np.int32))
    assert row_key(one, two) == row_key(one.astype(np.int64).astype(np.int32), two.copy())


def test_a_damaged_store_is_caught(tmp_path: Path) -> None:
    rows, model = pairs(3), tiny()
    store = ReferenceStore(tmp_path, CONTEXT)
    with attention_of(model, NAME):
        build(model, rows, store, "packed", 50, CPU)
        assert check(model, rows, store, "packed", CPU) < 1e-5
        path = next(store.folder.glob("shard-*/values.npy"))
        values = np.load(path)
        np.save(path, values + 0.5)
        with pytest.raises(NumericsError, match=r"0\.5 nats a token off"):
            check(model, rows, ReferenceStore(tmp_path, CONTEXT), "packed", CPU)
        np.save(path, values[:-1])
        with pytest.raises(DataError, match="does not fit together"):
            ReferenceStore(tmp_path, CONTEXT)
        path.write_bytes(b"")
        with pytest.raises(DataError, match="Delete this folder"):
            ReferenceStore(tmp_path, CONTEXT)


def test_a_full_disk_leaves_no_half_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pairs(2)
    store = ReferenceStore(tmp_path, CONTEXT)
    values = [[np.zeros(len(branch.ids), dtype=np.float32) for branch in row.branches] for row in rows]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(EquipoiseError, match="No space left"):
            store.add(rows, values)
    assert len(ReferenceStore(tmp_path, CONTEXT)) == 0
    store.add(rows, values)
    assert len(ReferenceStore(tmp_path, CONTEXT)) == 4
