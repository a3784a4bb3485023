"""Joining shards array by array, and streaming on the way there, change no byte and take no more memory for more rows."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise.core.errors import DataError
from equipoise.core.prints import PromptPrints
from equipoise.core.records import Message, Record, Reply
from equipoise.data import prepare as prepare_module
from equipoise.data._join import join
from equipoise.data._mismatched import partners, with_mismatched
from equipoise.data.load import load, stream
from equipoise.data.mixture import cluster, prints_of
from equipoise.data.prepare import prepare
from equipoise.data.rows import Branch, TokenRow, TokenRows
from equipoise.data.settings import DataSettings, PrepareSettings, TokeniseSettings
from equipoise.data.tokenise import tokenise

Make = Callable[..., Any]


def token_row(name: str, *replies: tuple[str, int, dict[str, float]], marks: tuple[str, ...] = ("learn",)) -> TokenRow:
    branches = [
        Branch(role, np.arange(size, dtype=np.int32), {mark: np.arange(size) % 2 == 0 for mark in marks}, facts)
        for role, size, facts in replies
    ]
    return TokenRow(name, np.arange(3, dtype=np.int32), tuple(branches))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_with_different_roles_marks_and_facts_join_to_what_packing_all_rows_gives(tmp_path: Path) -> None:
    shards = [
        [token_row("a", ("rejected", 2, {"safe": 1.0}), ("gold", 1, {})), token_row("ü:2", ("rejected", 4, {}))],
        [token_row("c", ("chosen", 1, {"score": 0.5}), ("rejected", 2, {}), marks=("credit", "learn"))],
        [token_row("d", ("gold", 5, {"safe": 0.0, "score": 2.0}))],
    ]
    folders = [tmp_path / str(number) for number in range(3)]
    for rows, folder in zip(shards, folders, strict=True):
        TokenRows.of(rows).save(folder)
    joined = join(folders, tmp_path / "joined")
    whole = TokenRows.of(row for rows in shards for row in rows)
    whole.save(tmp_path / "whole")
    assert files(tmp_path / "joined") == files(tmp_path / "whole")
    assert (joined.rows, joined.tokens, joined.fingerprint) == (4, 12 + 15, whole.fingerprint())
    with pytest.raises(DataError, match="'c' stands twice"):
        join([folders[1], folders[0], folders[1]], tmp_path / "twice")


def test_the_fingerprint_is_of_the_role_names_and_every_array_under_its_file_name() -> None:
    rows = TokenRows.of([token_row("a", ("rejected", 2, {"safe": 1.0})), token_row('"é"', ("gold", 3, {}))])
    digest = hashlib.sha256(b'["gold", "rejected"]')
    for name, values in {
        "tokens": np.array([0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2], dtype=np.int32),
        "starts": np.array([0, 3, 5, 8, 11]),
        "segments": np.array([0, 2, 4]),
        "roles": np.array([-1, 1, -1, 0], dtype=np.int8),
        "mark-learn": np.array([0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1], dtype=bool),
        "fact-safe": np.array([np.nan, 1.0, np.nan, np.nan]),
        "ids": np.frombuffer('a"é"'.encode(), dtype=np.uint8),
        "id-starts": np.array([0, 1, 5]),
    }.items():
        digest.update(name.encode() + values.tobytes())
    assert rows.fingerprint() == digest.hexdigest()[:16]


def test_rows_of_another_format_are_refused(tmp_path: Path) -> None:
    rows = TokenRows.of([token_row("a", ("gold", 2, {}))])
    rows.save(tmp_path)
    header = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps(header | {"schema_version": 3}))
    with pytest.raises(DataError, match="written with format 3"):
        TokenRows.load(tmp_path)


@pytest.mark.parametrize("roles", [("chosen", "rejected"), ("sample", "mismatched"), ("gold",)])
def test_prepare_writes_what_tokenising_all_at_once_gives(
    roles: tuple[str, ...], tmp_path: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "SHARD", 17)
    tokeniser = TokeniseSettings(max_length=250)
    run = prepare(PrepareSettings(tokenise=tokeniser, roles=roles, output_dir=str(tmp_path / "out")), byte_tokenizer)
    records = load(DataSettings()).records
    rows, accounting = tokenise(records, byte_tokenizer, tokeniser, roles)
    rows.save(tmp_path / "rows")
    assert len(rows) > 3 * 17
    assert accounting.dropped
    assert files(tmp_path / "out" / "rows") == files(tmp_path / "rows")
    assert run.results["fingerprint"] == rows.fingerprint()
    assert json.loads((tmp_path / "out" / "accounting.json").read_text())["tokenise"] == accounting.as_json()
    prompts = {record.id: record for record in records}
    prints_of(prompts[name.removesuffix("/chosen").removesuffix("/rejected")] for name in rows.ids).save(tmp_path / "prints.npz")
    assert (tmp_path / "out" / "trained_on.npz").read_bytes() == (tmp_path / "prints.npz").read_bytes()


def unit(number: int, prompt: int, label: bool | None) -> Record:
    scores = {"helpful": number / 3}
    return Record(f"u{number}", (Message("user", f"question {prompt}"),), (Reply(f"é {number}", "sample", "s", scores, True, label),))


def plain_partner(units: list[Record], index: int) -> int:
    """One step after the other round the ring of the same label, or of everybody where that label has one prompt."""
    clusters = [cluster(one.first_turn) for one in units]
    order = [at for at, one in enumerate(units) if one.replies[0].label is units[index].replies[0].label]
    if len({clusters[at] for at in order}) < 2:
        order += [at for at in range(len(units)) if at not in order]
    place = order.index(index)
    return next(at for at in order[place + 1 :] + order[:place] if clusters[at] != clusters[index])


@pytest.mark.parametrize("seed", range(8))
def test_mismatched_partners_are_those_of_a_plain_search_also_through_a_file(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    units = [
        unit(at, int(random.integers(1 + seed)) + (at == 0), [True, False, None][int(random.integers(1 + seed % 3))]) for at in range(40)
    ]
    expected = [plain_partner(units, at) for at in range(len(units))]
    paired = list(with_mismatched(units))
    assert [one.replies[1].text for one in paired] == [f"é {at}" for at in expected]
    assert [one.replies[0] for one in paired] == [one.replies[0] for one in units]
    assert list(with_mismatched(iter(units), tmp_path / "spool" / "units.jsonl")) == paired


def test_one_prompt_has_no_mismatched_replies() -> None:
    with pytest.raises(DataError, match="share one prompt"):
        partners(np.zeros(3, dtype=np.uint64), np.zeros(3, dtype=np.int8))


def test_streaming_gives_the_records_of_load_and_reads_no_further_than_asked() -> None:
    rows = [{"id": f"r{at % 90}", "prompt": f"question {at % 70}", "chosen": "yes", "rejected": "no"} for at in range(300)]
    rows[5]["chosen"] = ""
    settings = DataSettings(part="train", max_rows=100)
    loaded, streamed = load(settings, rows), stream(settings, rows)
    assert list(streamed.records) == loaded.records
    assert streamed.accounting == loaded.accounting
    assert loaded.accounting.notes == {"ids that stood twice were numbered": 300 - 90 - 1}
    taken = 0

    def counting() -> Iterator[dict[str, Any]]:
        nonlocal taken
        for row in rows:
            taken += 1
            yield row

    records = stream(DataSettings(), counting()).records
    next(records)
    assert taken <= 21


def test_four_times_the_rows_take_no_more_memory(tmp_path: Path, word_tokenizer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "SHARD", 100)
    peaks = {}
    for rows in (500, 2000):
        path = tmp_path / f"{rows}.jsonl"
        with path.open("w") as lines:
            for at in range(rows):
                texts = {"prompt": f"{at} " + "w1 " * 60, "chosen": "w2 " * 60, "rejected": "w3 " * 60}
                lines.write(json.dumps(texts) + "\n")
        settings = PrepareSettings(data=DataSettings(dataset_name=str(path)), output_dir=str(tmp_path / f"out-{rows}"))
        tokenizer = word_tokenizer()
        tracemalloc.start()
        try:
            prepare(settings, tokenizer)
            peaks[rows] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(PromptPrints.load(tmp_path / f"out-{rows}" / "trained_on.npz")) == rows
    # Holding the rows would take 1.5 kB each (records, tokens and marks); ids in a set take about 100 bytes until they are settled.
    assert (peaks[2000] - peaks[500]) / 1500 < 300
