"""`prepare`: finished once, resumed after a kill with the same bytes, never half done."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise.core.errors import DataError, EquipoiseError, StageError
from equipoise.core.prints import PromptPrints
from equipoise.data import prepare as prepare_module
from equipoise.data.prepare import prepare, tokenizer_fingerprint
from equipoise.data.rows import TokenRows
from equipoise.data.settings import DataSettings, PrepareSettings, TokeniseSettings

Make = Callable[..., Any]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"w{at % 50} w{at // 50}", "chosen": f"w{at % 7} w1", "rejected": "w2 " * (1 + at % 9)} for at in range(300)]
    rows[10]["chosen"] = ""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(source: Path, folder: Path, **tokenise: Any) -> PrepareSettings:
    return PrepareSettings(data=DataSettings(dataset_name=str(source)), tokenise=TokeniseSettings(**tokenise), output_dir=str(folder))


def bytes_of(folder: Path) -> dict[str, bytes]:
    kept = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ("done.json", "settings.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def test_a_stage_folder_holds_rows_accounting_and_prints(source: Path, tmp_path: Path, word_tokenizer: Make) -> None:
    run = prepare(asked(source, tmp_path / "out", max_length=12), word_tokenizer())
    rows = TokenRows.load(tmp_path / "out" / "rows")
    assert run.results == {"rows": len(rows), "tokens": sum(row.tokens for row in rows), "fingerprint": rows.fingerprint(), "rows_in": 300}
    accounting = json.loads((tmp_path / "out" / "accounting.json").read_text())
    assert accounting["load"]["dropped"] == {"empty reply": {"count": 1, "rows": ["pairs:11"]}}
    # 2 + 2 + 1 prompt tokens, at most 9 + 1 of the reply; of 12, replies of 9 words leave 2, too few for 4 and a word.
    assert accounting["tokenise"]["dropped"]["a reply is too long for max_length"]["count"] == sum(
        at % 9 in (7, 8) for at in range(300) if at != 10
    )
    assert accounting["tokenise"]["rows_in"] == 299
    prints = PromptPrints.load(tmp_path / "out" / "trained_on.npz")
    assert len(prints) == len(rows)
    assert not (tmp_path / "out" / "shards").exists()
    assert prepare(asked(source, tmp_path / "out", max_length=12), word_tokenizer()).skipped


def test_rows_in_memory_may_hold_anything_and_come_once(tmp_path: Path, word_tokenizer: Make) -> None:
    rows = [{"prompt": f"w{at}", "chosen": "w1", "rejected": "w2", "made": datetime(2024, 1, 1 + at)} for at in range(5)]
    settings = PrepareSettings(output_dir=str(tmp_path / "out"))
    run = prepare(settings, word_tokenizer(), dataset=(row for row in rows))
    assert (run.results["rows"], run.skipped) == (5, False)
    assert prepare(settings, word_tokenizer(), dataset=rows).skipped


def test_other_settings_tokenizers_or_data_are_other_work(source: Path, tmp_path: Path, word_tokenizer: Make) -> None:
    folder = tmp_path / "out"
    prepare(asked(source, folder), word_tokenizer())
    with pytest.raises(StageError, match="tokenise"):
        prepare(asked(source, folder, max_length=9), word_tokenizer())
    with pytest.raises(StageError, match="input tokenizer"):
        prepare(asked(source, folder), word_tokenizer(bos=True))
    source.write_text(source.read_text().replace('"w0 w0"', '"w0 w1"'))
    with pytest.raises(StageError, match="input data"):
        prepare(asked(source, folder), word_tokenizer())
    assert not prepare(asked(source, folder), word_tokenizer(), overwrite=True).skipped


def test_the_tokenizer_s_fingerprint_is_of_its_rules_not_of_its_last_call(word_tokenizer: Make) -> None:
    tokenizer = word_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["w1 w2"], truncation=True, max_length=1)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(word_tokenizer(template="{{ messages }}")) != before


def test_nothing_left_is_an_error_and_not_done(source: Path, tmp_path: Path, word_tokenizer: Make) -> None:
    with pytest.raises(DataError, match="No row is left after tokenising: 299 of 299 rows dropped"):
        prepare(asked(source, tmp_path / "out", max_length=4), word_tokenizer())
    assert not (tmp_path / "out" / "done.json").exists()


def test_a_full_disk_leaves_nothing_that_is_taken_for_done(
    source: Path, tmp_path: Path, word_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(asked(source, tmp_path / "good"), word_tokenizer())
    written = 0
    save = np.save

    def full(*arguments: Any, **keywords: Any) -> None:
        nonlocal written
        written += 1
        if written > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments, **keywords)

    monkeypatch.setattr(prepare_module, "SHARD", 100)
    with monkeypatch.context() as broken:
        broken.setattr(np, "save", full)
        with pytest.raises(EquipoiseError, match="No space left on device"):
            prepare(asked(source, tmp_path / "out"), word_tokenizer())
    assert not (tmp_path / "out" / "done.json").exists()
    assert not list((tmp_path / "out").rglob("*.part"))
    prepare(asked(source, tmp_path / "out"), word_tokenizer())
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "good")


def test_finished_shards_are_not_made_again(source: Path, tmp_path: Path, word_tokenizer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "SHARD", 100)
    calls: list[str] = []
    whole = prepare_module.tokenise_units

    def stopping(made: Any, *rest: Any) -> Any:
        calls.append(made[0].id)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(made, *rest)

    monkeypatch.setattr(prepare_module, "tokenise_units", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare(asked(source, tmp_path / "out"), word_tokenizer())
    prepare(asked(source, tmp_path / "out"), word_tokenizer())
    assert calls == ["pairs:1", "pairs:102", "pairs:202", "pairs:202"]


def test_several_processes_give_the_same_bytes(source: Path, tmp_path: Path, word_tokenizer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """More shards than are under way at once; some done before, by one process."""
    monkeypatch.setattr(prepare_module, "SHARD", 40)
    prepare(asked(source, tmp_path / "one", max_length=12), word_tokenizer())
    whole = prepare_module.tokenise_units
    calls: list[int] = []

    def stopping(made: Any, *rest: Any) -> Any:
        calls.append(len(made))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(made, *rest)

    wanted = asked(source, tmp_path / "two", max_length=12)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "tokenise_units", stopping)
        with pytest.raises(KeyboardInterrupt):
            prepare(wanted, word_tokenizer())
    several = prepare(wanted.model_copy(update={"dataset_num_proc": 2}), word_tokenizer())
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")
    assert prepare(wanted, word_tokenizer()).results == several.results


def test_an_error_in_a_process_is_said_as_in_one(source: Path, tmp_path: Path, word_tokenizer: Make) -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = tokenizer.bos_token = None
    said = []
    for processes in (1, 2):
        wanted = asked(source, tmp_path / str(processes), learn="all").model_copy(update={"dataset_num_proc": processes})
        with pytest.raises(DataError) as caught:
            prepare(wanted, tokenizer)
        said.append(str(caught.value))
    assert said[0] == said[1]


WORKER = """
import sys, time
from transformers import AutoTokenizer
from equipoise.data import prepare as module
from equipoise.data.settings import DataSettings, PrepareSettings
module.SHARD = 20
slow, source, tokenizer, folder = float(sys.argv[1]), *sys.argv[2:]
whole = module.tokenise_units
def slowly(*arguments):
    time.sleep(slow)
    return whole(*arguments)
module.tokenise_units = slowly
module.prepare(PrepareSettings(data=DataSettings(dataset_name=source), output_dir=folder), AutoTokenizer.from_pretrained(tokenizer))
"""


def test_kill_9_while_tokenising_and_the_next_run_ends_with_the_same_bytes(source: Path, tmp_path: Path, word_tokenizer: Make) -> None:
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    folder = tmp_path / "out"

    def command(slow: float, out: Path) -> list[str]:
        return [sys.executable, "-c", WORKER, str(slow), str(source), str(tmp_path / "tokenizer"), str(out)]

    process = subprocess.Popen(command(0.3, folder))
    deadline = time.monotonic() + 120
    while len(list(folder.glob("shards/*/accounting.json"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("shards/*/accounting.json")}
    assert 3 <= len(finished) < 15
    assert not (folder / "done.json").exists()
    assert not (folder / "rows" / "rows.json").exists()
    # The next run, in another process, goes on; an uninterrupted one gives the same.
    subprocess.run(command(0.0, folder), check=True)
    subprocess.run(command(0.0, tmp_path / "whole"), check=True)
    assert (folder / "done.json").is_file()
    assert bytes_of(folder) == bytes_of(tmp_path / "whole")
