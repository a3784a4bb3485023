"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from equipoise.core import files
from equipoise.core.errors import DataError, EquipoiseError


@pytest.fixture
def full_disk(monkeypatch):
    """Every flush to disk fails as it does on a full one."""

    def fail(_handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fail)


def test_atomic_replaces_the_whole_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    files.write_text(path, "old, and longer than the new one")
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert [item.name for item in path.parent.iterdir()] == ["a.txt"]


def test_atomic_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_full_disk_leaves_the_old_file_and_says_which(tmp_path, monkeypatch, request):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    request.getfixturevalue("full_disk")
    with pytest.raises(EquipoiseError, match=r"a\.json.*No space left.*Nothing was changed"):
        files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.usefixtures("full_disk")
def test_full_disk_makes_no_new_file(tmp_path):
    with pytest.raises(EquipoiseError):
        files.write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_atomic_passes_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def rows():
        yield {"half": 1}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        files.write_jsonl(path, rows())
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_nan_never_reaches_a_json_file(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_half_a_surrogate_pair_is_written_and_reads_back_as_it_was(tmp_path):
    """Foreign replies may hold it; other text stays readable in the file."""
    row = {"id": "é", "text": "a \ud83d b \udc00 \U0001f600", "\udfff": ["\ud800"]}
    files.write_json(tmp_path / "a.json", row)
    assert files.read_json(tmp_path / "a.json") == row
    files.write_jsonl(tmp_path / "a.jsonl", [row, {"id": 1}])
    assert files.read_jsonl(tmp_path / "a.jsonl") == [row, {"id": 1}]
    with files.JsonlAppender(tmp_path / "b.jsonl") as appender:
        appender.add([row])
    written = (tmp_path / "b.jsonl").read_text(encoding="utf-8")
    assert "\\ud83d b" in written
    assert "\U0001f600" in written
    assert "é" in written
    with files.JsonlAppender(tmp_path / "b.jsonl") as appender:
        assert appender.rows == [row]


def test_read_json_names_file_line_and_column(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('{"a": 1,\n "b": }')
    with pytest.raises(DataError, match=r"bad\.json, line 2, column 7"):
        files.read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match=r"byte 7: not valid UTF-8"):
        files.read_json(path)
    with pytest.raises(DataError, match=r"does not exist"):
        files.read_json(tmp_path / "none.json")


def test_read_jsonl_names_the_line_and_skips_blank_ones(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": \n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 4"):
        files.read_jsonl(path)
    path.write_bytes('{"a": 1}\n'.encode("utf-16"))
    with pytest.raises(DataError, match=r"rows\.jsonl: not valid UTF-8"):
        files.read_jsonl(path)
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert files.read_jsonl(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("torn", ['{"id": 2, "te', '{"id": 2}', '{"id": 2, "te\n'])
def test_appender_cuts_a_torn_last_line(tmp_path, torn):
    """A line without its newline, or one that is no JSON, was not finished: it is cut, and work goes on after the last whole one."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 0}\n{"id": 1}\n' + torn)
    with files.JsonlAppender(path) as appender:
        assert appender.rows == [{"id": 0}, {"id": 1}]
        appender.add([{"id": 2}])
    assert path.read_text() == '{"id": 0}\n{"id": 1}\n{"id": 2}\n'


WRITER = """
import sys
from equipoise.core.files import JsonlAppender
with JsonlAppender(sys.argv[1]) as appender:
    number = len(appender.rows)
    while True:
        appender.add([{"id": number, "text": "x" * 5000}])
        print(number, flush=True)
        number += 1
"""


def test_appender_survives_kill_9_in_mid_write(tmp_path):
    """Every row that was reported as added is there after SIGKILL, each whole, and nothing else."""
    path = tmp_path / "rows.jsonl"
    reported = -1
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(20):
            reported = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split()
        writer.wait()
        reported = int(rest[-1]) if rest else reported
        with files.JsonlAppender(path) as appender:
            ids = [row["id"] for row in appender.rows]
        assert ids == list(range(len(ids)))
        assert len(ids) >= reported + 1
    assert reported >= 59


def test_appender_says_when_the_disk_is_full(tmp_path, full_disk):
    with files.JsonlAppender(tmp_path / "rows.jsonl") as appender, pytest.raises(EquipoiseError, match=r"rows\.jsonl.*No space left"):
        appender.add([{"a": 1}])


def test_leaving_the_appender_does_not_hide_what_a_full_disk_made_of_a_write(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, limits[1]))
    try:
        with (
            pytest.raises(EquipoiseError, match=r"Could not write .*rows\.jsonl"),
            files.JsonlAppender(tmp_path / "rows.jsonl") as appender,
        ):
            appender.add([{"a": "a row of more than four bytes"}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_fingerprint_ignores_the_order_of_keys_and_nothing_else():
    assert files.fingerprint({"a": 1, "b": [1, 2]}) == files.fingerprint({"b": [1, 2], "a": 1})
    assert files.fingerprint({"a": [1, 2]}) != files.fingerprint({"a": [2, 1]})
    assert files.fingerprint({"a": 1}) != files.fingerprint({"a": 1.5})
    # sha256 of the two bytes {}, from any other tool: 44136fa355b3678a…
    assert files.fingerprint({}) == "44136fa355b3678a"
    assert files.fingerprint({"a": np.int64(3), "b": {2, 1}}) == files.fingerprint({"a": 3, "b": [1, 2]})


def test_file_fingerprint_of_a_folder_sees_names_and_contents_but_not_the_done_mark(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    first = files.file_fingerprint(tmp_path)
    (tmp_path / "done.json").write_text("{}")
    assert files.file_fingerprint(tmp_path) == first
    (tmp_path / "a").rename(tmp_path / "b")
    assert files.file_fingerprint(tmp_path) != first
    # FIPS 180-2's example: SHA-256 of "abc".
    assert files.file_sha256(tmp_path / "b") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(DataError, match=r"nothing does not exist\.$"):
        files.file_fingerprint(tmp_path / "nothing")


def test_a_row_that_is_not_what_it_should_be_is_found_by_its_line(tmp_path):
    def halved(row):
        if row["n"] % 2:
            raise DataError("Odd.")
        return row["n"] // 2

    files.write_text(tmp_path / "rows.jsonl", '{"n": 2}\n\n{"n": 4}\n')
    assert files.read_jsonl(tmp_path / "rows.jsonl", halved) == [1, 2]
    files.write_text(tmp_path / "rows.jsonl", '{"n": 2}\n\n{"n": 3}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: Odd\."):
        files.read_jsonl(tmp_path / "rows.jsonl", halved)
