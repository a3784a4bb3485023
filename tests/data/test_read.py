"""Rows from every kind of file, and every way a file can be broken."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from equipoise.core.errors import DataError, UsageError
from equipoise.data._read import read
from equipoise.data.load import load
from equipoise.data.prompts import other_prompts
from equipoise.data.settings import DataSettings

PAIRS = [{"prompt": "a\u00e9?", "chosen": "yes\n\nindeed", "rejected": "no"}, {"prompt": "b?", "chosen": "1", "rejected": "2"}]
GOOD = b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n'


def rows(path: Path, **settings: Any) -> list[dict[str, Any]]:
    return [dict(row.values) for row in read(DataSettings(dataset_name=str(path), **settings))]


def write(path: Path, values: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(value) + "\n" for value in values)
    if path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".jsonl":
        path.write_text(lines, encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(values[0]))
            writer.writeheader()
            writer.writerows(values)
    else:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(values).to_parquet(str(path))
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.csv", "x.parquet"])
def test_every_file_type_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, PAIRS)
    assert rows(path) == PAIRS
    loaded = load(DataSettings(dataset_name=str(path)))
    assert [record.id for record in loaded.records] == ["x:1", "x:2"]
    assert loaded.records[0].replies[0].text == "yes\n\nindeed"


def test_json_lines_under_the_name_json_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD)
    assert len(rows(path)) == 2


def test_a_folder_gives_its_files_in_order_and_one_split_where_asked(tmp_path: Path) -> None:
    write(tmp_path / "train-0.jsonl", PAIRS[:1])
    write(tmp_path / "test" / "0.jsonl", PAIRS[1:])
    (tmp_path / ".hidden.jsonl").write_text("not data")
    assert rows(tmp_path, dataset_split="all") == [PAIRS[1], PAIRS[0]]
    assert rows(tmp_path) == [PAIRS[0]], "as from the hub"
    assert rows(tmp_path, dataset_split="test") == [PAIRS[1]]
    assert rows(tmp_path, dataset_split="train") == [PAIRS[0]]
    with pytest.raises(DataError, match="no file of split 'dev'"):
        rows(tmp_path, dataset_split="dev")
    whole = DataSettings(dataset_name=str(tmp_path), dataset_split="all")
    assert [record.id for record in load(whole).records] == ["test/0:1", "train-0:1"]


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["helpful/train.jsonl.gz", "helpful/test.jsonl.gz"], ["helpful/train.jsonl.gz"]),
        (["data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl"], ["data/train-00000-of-00001.jsonl"]),
        (["en/Train/0.jsonl", "en/dev/0.jsonl"], ["en/Train/0.jsonl"]),
        (["train_a.jsonl", "valid_a.jsonl", "notes.jsonl"], ["train_a.jsonl"]),
        (["train.jsonl", "notes.jsonl"], ["notes.jsonl", "train.jsonl"]),
        (["test.jsonl", "dev.jsonl"], ["dev.jsonl", "test.jsonl"]),
        (["train.jsonl", "testimonials.jsonl", "development.jsonl"], ["development.jsonl", "testimonials.jsonl", "train.jsonl"]),
        (["pairs.jsonl", "more/pairs.jsonl"], ["more/pairs.jsonl", "pairs.jsonl"]),
    ],
)
def test_a_folder_of_several_splits_gives_train_by_default(tmp_path: Path, names: list[str], read: list[str]) -> None:
    for name in names:
        write(tmp_path / name, [{"prompt": name, "chosen": "c", "rejected": "r"}])
    assert [row["prompt"] for row in rows(tmp_path)] == read
    # What is kept apart is kept apart from all of it.
    assert len(other_prompts(str(tmp_path))) == len(names)


def test_data_sets_in_memory_and_saved_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(PAIRS)
    assert [record.id for record in load(DataSettings(), dataset=made).records] == ["memory:1", "memory:2"]
    assert len(load(DataSettings(), dataset=PAIRS).records) == 2
    made.save_to_disk(str(tmp_path / "saved"))
    assert rows(tmp_path / "saved") == PAIRS
    splits = datasets.DatasetDict({"train": made, "test": made.select([1])})
    assert len(load(DataSettings(dataset_split="test"), dataset=splits).records) == 1
    assert len(load(DataSettings(dataset_split="all"), dataset=splits).records) == 3
    with pytest.raises(DataError, match=r"no split 'tets'. Did you mean 'test'"):
        load(DataSettings(dataset_split="tets"), dataset=splits)
    with pytest.raises(UsageError, match="found a number"):
        load(DataSettings(), dataset=3)
    with pytest.raises(DataError, match="memory, row 1: expected a mapping of columns, found text"):
        load(DataSettings(), dataset=["text"])


def test_a_hub_name_goes_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        if name == "some/absent":
            raise FileNotFoundError("Dataset 'some/absent' doesn't exist on the Hub\nmore")
        return PAIRS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    loaded = load(DataSettings(dataset_name="some/pairs", dataset_config_name="en"))
    assert asked == [("some/pairs", "en", "train")]
    assert [record.id for record in loaded.records] == ["pairs:1", "pairs:2"]
    with pytest.raises(DataError, match=r"'some/absent' is no local path.*split test\): Dataset 'some/absent' doesn't exist on the Hub$"):
        load(DataSettings(dataset_name="some/absent", dataset_split="test"))


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=re.escape("pip install 'equipoise[hub]'")):
        load(DataSettings(dataset_name="some/pairs"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", GOOD + b'{"prompt": "p", \n', r"x\.jsonl, line 2, column 17: not valid JSON"),
        ("x.jsonl", GOOD + b'{"prompt": "\xff"}\n', r"x\.jsonl, line 2, byte 13: not valid UTF-8"),
        ("x.jsonl", GOOD + b"\0\0\0\0\n", r"line 2.*not valid JSON.*NUL bytes"),
        ("x.jsonl", GOOD + b"[1, 2]\n", r"line 2: expected an object with named columns, found a list"),
        ("x.jsonl", b'{"prompt": ' + b"[" * 200_000 + b"\n", r"line 1: JSON nested too deeply|line 1, column"),
        ("x.jsonl", b'{"prompt": ' + b"1" * 5000 + b"}\n", r"line 1: a number too long to read"),
        ("x.jsonl", b"\n\n", r"holds no rows"),
        ("x.jsonl", b"", r"holds no rows"),
        ("x.json", b"[]", r"holds no rows"),
        ("x.json", b"", r"holds no rows"),
        ("x.json", b'[{"prompt": "p"},\n {"prompt": }]', r"x\.json, line 2, column 13: not valid JSON"),
        ("x.json", b'[{"prompt":\n "\xff"}]', r"x\.json, line 2, byte 15: not valid UTF-8"),
        ("x.json", b'"text"', r"expected an array of rows, found text"),
        ("x.jsonl.gz", b"not gzip", r"not a whole gzip file"),
        ("x.jsonl.gz", gzip.compress(GOOD * 500)[:-20], r"not a whole gzip file"),
        ("x.csv", b"prompt,chosen,rejected\np,c,r,too,many\n", r"line 2: more cells than the 3 column names"),
        ("x.csv", b"prompt,chosen,rejected\n" + b"p,c,r\n" * 5000 + b"p,c,\xff\n", r"x\.csv, line 5002, byte 30028: not valid UTF-8"),
        ("x.csv", b'prompt,chosen,rejected\np,"c,r\n', r"not valid CSV"),
        ("x.csv", b"prompt,chosen,chosen,,\np,c,r,,\n", r"x\.csv, line 1: 2 columns are called 'chosen'"),
        ("x.csv", b"prompt,chosen,rejected\n", r"holds no rows"),
        ("x.parquet", b"PAR1nonsense", r"not a valid Parquet file"),
        ("x.txt", b"text", r"cannot tell the file type. Known: \.jsonl"),
    ],
)
def test_broken_files_say_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(DataSettings(dataset_name=str(path)))


def test_a_path_that_is_not_there_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(DataError, match=r"does not exist. Did you mean 'pairs.jsonl'"):
        load(DataSettings(dataset_name=str(tmp_path / "piars.jsonl")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data files"):
        load(DataSettings(dataset_name=str(tmp_path / "empty")))
    with pytest.raises(UsageError, match="is one file and has no splits"):
        load(DataSettings(dataset_name=str(tmp_path / "pairs.jsonl"), dataset_split="train"))
    with pytest.raises(UsageError, match="is for hub data sets"):
        load(DataSettings(dataset_name=str(tmp_path / "pairs.jsonl"), dataset_config_name="en"))


def test_columns_are_renamed_before_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"question": "q", "good": "g", "bad": "b"}])
    settings = DataSettings(dataset_name=str(path), columns={"question": "prompt", "good": "chosen", "bad": "rejected"})
    assert load(settings).records[0].reply("rejected").text == "b"  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"no column 'qestion' to rename. Did you mean 'question'"):
        load(settings.model_copy(update={"columns": {"qestion": "prompt"}}))


@pytest.mark.parametrize("order", [("question", "prompt"), ("prompt", "question")])
def test_a_renamed_column_takes_the_place_of_one_already_called_so(order: tuple[str, str]) -> None:
    row = {name: name for name in order} | {"completion": "c"}
    (read_row,) = read(DataSettings(columns={"question": "prompt"}), [row])
    assert read_row.values == {"prompt": "question", "completion": "c"}
    (swapped,) = read(DataSettings(columns={"question": "prompt", "prompt": "question"}), [row])
    assert swapped.values == {"prompt": "question", "question": "prompt", "completion": "c"}
    with pytest.raises(UsageError, match="question and text to one prompt"):
        DataSettings.make({"columns": {"question": "prompt", "text": "prompt"}})


def test_a_renamed_column_may_be_absent_from_some_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "p", "completion": "c"}, {"prompt": "p", "answer": "d"}])
    assert [row["completion"] for row in rows(path, columns={"answer": "completion"})] == ["c", "d"]


def test_a_megabyte_in_one_cell_is_read(tmp_path: Path) -> None:
    long = "word " * 250_000
    for name in ("x.csv", "x.jsonl"):
        path = write(tmp_path / name, [{"prompt": long, "chosen": "c", "rejected": "r"}])
        assert len(load(DataSettings(dataset_name=str(path))).records[0].prompt[0].content) == 1_250_000
