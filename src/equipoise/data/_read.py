"""Rows from files, folders, the hub or memory, each with a name and a place people can find again."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from equipoise.core.errors import DataError, UsageError, nearest
from equipoise.data.settings import DataSettings

PEEKED = 20
"""Rows looked at to tell the columns and the format."""
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv")
SPLIT = re.compile(r"(train|test|validation|valid|dev)(?![a-z])")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as found. id: `<file stem>:<row number>`, from 1. where: file and line, for messages."""

    id: str
    where: str
    values: Mapping[str, Any]


def read(settings: DataSettings, dataset: Any = None) -> Iterator[Row]:
    """Rows of a source, columns renamed as asked.

    dataset: an in-memory `datasets.Dataset`, or any iterable of mappings; then `dataset_name` is not looked at.
    Raises DataError where something cannot be read (file and line), UsageError for bad settings or a missing package.
    """
    rows = _memory(dataset, settings) if dataset is not None else _named(settings)
    first = list(islice(rows, PEEKED))
    _check_renames(first, settings.columns)
    for row in chain(first, rows):
        yield Row(row.id, row.where, _renamed(row.values, settings.columns))


def is_local(name: str) -> bool:
    """Whether a name means a local path: it exists, or it is written like one."""
    return Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.lower().endswith(SUFFIXES)


def local_path(name: str) -> Path:
    """The local path of a name. Raises DataError naming the nearest neighbour where it does not exist."""
    path = Path(name).expanduser()
    if not path.exists():
        neighbours = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, neighbours) if 0 < len(neighbours) <= 50 else ""
        raise DataError(f"{name} does not exist.{hint}")
    return path


def stem_of(path: Path) -> str:
    """File name without its known suffix: `pairs.jsonl.gz` → `pairs`."""
    suffix = max((known for known in SUFFIXES if path.name.lower().endswith(known)), key=len, default="")
    return path.name[: len(path.name) - len(suffix)]


def files_of(folder: Path, split: str | None) -> list[Path]:
    """The data files of a folder, sorted; of one split only (its name starts the file's or is a parent's), or of 'all'.

    Where no split is asked for and the files are those of several, `train`'s only, as from the hub: test rows are not for training.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.lower().endswith(SUFFIXES))
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        raise DataError(f"{folder} holds no data files ({', '.join(SUFFIXES)}).")
    if split is None:
        splits = [_split_of(path.relative_to(folder)) for path in files]
        several = "train" in splits and len({*splits} - {None}) > 1
        return [path for path, own in zip(files, splits, strict=True) if own == "train"] if several else files
    if split == "all":
        return files
    chosen = [path for path in files if path.name.startswith(split) or split in path.relative_to(folder).parts[:-1]]
    if not chosen:
        raise DataError(f"{folder} holds no file of split {split!r}.{nearest(split, {stem_of(path) for path in files})}")
    return chosen


def _split_of(path: Path) -> str | None:
    """The split that a file's name, or else a folder's above it, begins with as a word; None where none does."""
    found = (SPLIT.match(part.lower()) for part in reversed(path.parts))
    return next((match[1] for match in found if match), None)


def _named(settings: DataSettings) -> Iterator[Row]:
    name, split = settings.dataset_name, settings.dataset_split
    if not is_local(name):
        return _memory(_hub(name, settings.dataset_config_name, split or "train"), settings, name.rsplit("/", 1)[-1])
    path = local_path(name)
    if settings.dataset_config_name is not None:
        raise UsageError(f"dataset_config_name={settings.dataset_config_name!r} is for hub data sets and 'starter'; {name} is local.")
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _memory(_saved(path, split), settings, path.name)
        return (row for file in files_of(path, split) for row in read_file(file, str(file.relative_to(path).parent / stem_of(file))))
    if split is not None:
        raise UsageError(f"dataset_split={split!r}: {name} is one file and has no splits. Use part=train, dev or test for ours.")
    return read_file(path, stem_of(path))


def read_file(path: Path, stem: str) -> Iterator[Row]:
    """Rows of one file, by its suffix."""
    name = path.name.lower()
    reader = next((reader for suffix, reader in READERS.items() if name.endswith(suffix)), None)
    if reader is None:
        raise DataError(f"{path}: cannot tell the file type. Known: {', '.join(SUFFIXES)}.")
    try:
        for number, (where, values) in enumerate(reader(path), 1):
            if not isinstance(values, Mapping):
                raise DataError(f"{path}, {where}: expected an object with named columns, found {kind_of(values)}.")
            yield Row(f"{stem}:{number}", f"{path}, {where}", values)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}). Fetch it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            text = _text(line, f"{path}, line {number}", first=number == 1)
            if text.strip():
                yield f"line {number}", _parse(text.rstrip("\r\n"), path, number)


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON array of rows, read whole; many published `.json` files are JSON lines, so those are taken too, line by line."""
    with _open(path) as stream:
        start = next((line.lstrip(b"\xef\xbb\xbf \t\r\n") for line in stream if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
    if start[:1] == b"{":
        yield from _json_lines(path)
        return
    with _open(path) as stream:
        text = _text(stream.read(), str(path), first=True)
    rows = _parse(text, path, 1) if text.strip() else []
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected an array of rows, found {kind_of(rows)}.")
    for number, row in enumerate(rows, 1):
        yield f"item {number}", row


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    # The csv module refuses fields above 128 KiB unless told otherwise; replies may be longer.
    csv.field_size_limit(sys.maxsize)
    try:
        with open(path, encoding="utf-8-sig", newline="", errors="strict") as stream:
            reader = csv.DictReader(stream, strict=True)
            for name, times in Counter(reader.fieldnames or ()).items():
                if name and times > 1:
                    raise DataError(f"{path}, line 1: {times} columns are called {name!r}; the reader would keep the last one only.")
            for row in reader:
                if None in row:
                    raise DataError(f"{path}, line {reader.line_num}: more cells than the {len(reader.fieldnames or ())} column names.")
                # A short line has no value there, which is missing, not an empty text.
                yield f"line {reader.line_num}", {name: value for name, value in row.items() if value is not None}
    except UnicodeDecodeError:
        _text(path.read_bytes(), str(path), first=True)  # the stream is decoded ahead of its lines; this says which one it is
        raise
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error}).") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError("Reading Parquet needs pyarrow: pip install 'equipoise[hub]'.") from error
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a valid Parquet file ({str(error).splitlines()[0]}).") from error


READERS = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json_array,
    ".json.gz": _json_array,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _text(raw: bytes, where: str, first: bool) -> str:
    """UTF-8, or a DataError with the line and byte."""
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        place = where if ", line" in where else f"{where}, line {line}"
        raise DataError(f"{place}, byte {error.start + 1}: not valid UTF-8. Save the file as UTF-8.") from error


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = " The file holds NUL bytes: it was probably not written to its end." if "\0" in text else ""
        place = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise DataError(f"{place}: not valid JSON ({error.msg}).{hint}") from error
    except ValueError as error:
        raise DataError(f"{path}, line {line}: a number too long to read.") from error
    except RecursionError as error:
        raise DataError(f"{path}, line {line}: JSON nested too deeply to be a row.") from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UsageError("Reading from the hub needs the datasets package: pip install 'equipoise[hub]'.") from error
    return datasets


def _hub(name: str, config: str | None, split: str) -> Any:
    """A hub data set. Every failure (no network, no such set, configuration or split) becomes one readable line."""
    datasets = _datasets()
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises its own, huggingface_hub's, requests' and plain ones
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"{name!r} is no local path, and the hub data set could not be loaded (configuration {config}, split {split}): {reason}"
        ) from error


def _saved(path: Path, split: str | None) -> Any:
    """A data set written by `save_to_disk`."""
    return _one_split(_datasets().load_from_disk(str(path)), split, str(path))


def _one_split(dataset: Any, split: str | None, name: str) -> Any:
    if not isinstance(dataset, Mapping):
        return dataset
    if split == "all":
        return chain.from_iterable(dataset.values())
    wanted = split or "train"
    if wanted not in dataset:
        raise DataError(f"{name} has no split {wanted!r}.{nearest(wanted, dataset)}")
    return dataset[wanted]


def _memory(dataset: Any, settings: DataSettings, stem: str = "memory") -> Iterator[Row]:
    """Rows of an in-memory data set: anything that gives mappings when iterated over."""
    if not isinstance(dataset, Iterable):
        raise UsageError(f"A data set in memory must give rows when iterated over; found {kind_of(dataset)}.")
    for number, values in enumerate(_one_split(dataset, settings.dataset_split, stem), 1):
        if not isinstance(values, Mapping):
            raise DataError(f"{stem}, row {number}: expected a mapping of columns, found {kind_of(values)}.")
        yield Row(f"{stem}:{number}", f"{stem}, row {number}", values)


def _check_renames(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Every column to rename must stand in one of the first rows: JSON lines may leave out what they have no value for."""
    found = {str(name) for row in rows for name in row.values}
    missing = [name for name in columns if name not in found]
    if rows and missing:
        raise DataError(f"{rows[0].where}: no column {missing[0]!r} to rename.{nearest(missing[0], found)}")


def _renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """Values under their new names; a column that already had such a name makes room, wherever it stands."""
    renamed = {columns[name]: value for name, value in values.items() if name in columns}
    return {name: value for name, value in values.items() if name not in columns and name not in renamed} | renamed


def kind_of(value: Any) -> str:
    """A value's type in words."""
    words = {"list": "a list", "str": "text", "int": "a number", "float": "a number", "bool": "true or false", "NoneType": "null"}
    return words.get(type(value).__name__, f"a {type(value).__name__}")
