"""Files that are either whole or absent, and fingerprints of what is in them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from equipoise.core.errors import DataError, EquipoiseError

_HALF = re.compile("[\ud800-\udfff]")


@contextmanager
def atomic(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of `path`; on success flush it to disk and rename it over `path`.

    A crash, a kill or a full disk leaves `path` as it was. Raises EquipoiseError naming the file when the disk fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        encoding = None if "b" in mode else "utf-8"
        with os.fdopen(handle, mode, encoding=encoding) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes private files; outputs should follow the user's umask like any other file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise EquipoiseError(f"Could not write {path}: {error.strerror or error}. Nothing was changed.") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def is_leftover(path: Path) -> bool:
    """Whether a file is what `atomic` leaves behind when it is killed while writing."""
    return path.name.startswith(".") and path.name.endswith(".part")


def write_text(path: str | Path, text: str) -> None:
    """Write a whole text file atomically."""
    with atomic(path) as stream:
        stream.write(text)


def json_text(value: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """A value as JSON that can be encoded: half a surrogate pair, which foreign text may hold, is escaped and reads back as it was.

    NaN is refused. default: what becomes of a value JSON has no word for; None: as our files write it.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=default or _plain)
    return _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def write_json(path: str | Path, value: Any) -> None:
    """Write one JSON value atomically, indented, keys in the given order. NaN is refused."""
    write_text(path, json_text(value, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Read one JSON file. Raises DataError with file, line and column."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, byte {error.start}: not valid UTF-8.") from error


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> int:
    """Write rows as JSON lines atomically. Returns how many."""
    count = 0
    with atomic(path) as stream:
        for row in rows:
            stream.write(json_text(row) + "\n")
            count += 1
    return count


def read_jsonl(path: str | Path, each: Callable[[Any], Any] = lambda row: row) -> list[Any]:
    """Read JSON lines written by us. Raises DataError with file and line. Blank lines are skipped.

    each: what to make of a row; a DataError it raises gets file and line.
    """
    rows = []
    try:
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    try:
                        rows.append(each(json.loads(line)))
                    except json.JSONDecodeError as error:
                        raise DataError(f"{path}, line {number}: not valid JSON ({error.msg}).") from error
                    except DataError as error:
                        raise DataError(f"{path}, line {number}: {error}") from error
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid UTF-8 ({error.reason}).") from error
    return rows


class JsonlAppender:
    """Appends JSON lines that survive a kill: every `add` ends in a flush, and a torn last line is cut on opening.

    Used where work is resumed item by item (generation, scoring). `rows` holds what was already there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Any] = []
        whole = 0
        if self.path.exists():
            for line in self.path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                try:
                    self.rows.append(json.loads(line))
                except ValueError:
                    break
                whole += len(line)
            with open(self.path, "r+b") as stream:
                stream.truncate(whole)
        self._stream = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)

    def add(self, rows: Iterable[Any]) -> None:
        """Append rows and flush them to disk."""
        try:
            for row in rows:
                self._stream.write(json_text(row) + "\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise EquipoiseError(f"Could not write {self.path}: {error.strerror or error}.") from error

    def close(self) -> None:
        """Close the file. What `add` could not write, and said so, fails here once more and is left."""
        with suppress(OSError):
            self._stream.close()

    def __enter__(self) -> JsonlAppender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fingerprint(value: Any, foreign: bool = False) -> str:
    """16 hex digits of the SHA-256 of a JSON value, whatever the order of its keys.

    foreign: what JSON does not know (times, bytes, …: the value is not ours) counts by how Python shows it, instead of being refused.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=_shown if foreign else _plain)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_fingerprint(path: str | Path) -> str:
    """16 hex digits of the SHA-256 of a file, or of a folder's files (names and contents; done marks left out).

    Raises DataError where there is nothing of this name.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    digest = hashlib.sha256()
    if path.is_dir():
        for child in sorted(item for item in path.rglob("*") if item.is_file() and item.name != "done.json"):
            digest.update(str(child.relative_to(path)).encode())
            digest.update(file_sha256(child).encode())
        return digest.hexdigest()[:16]
    return file_sha256(path)[:16]


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    """JSON for what our settings and results hold: paths, tuples, numpy scalars and arrays, pydantic models, mappings."""
    if isinstance(value, Path):
        return str(value)
    dump: Callable[..., Any] | None = getattr(value, "model_dump", None)
    if dump is not None:
        return dump(mode="json")
    if hasattr(value, "tolist"):  # an array, or a scalar of one
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _shown(value: Any) -> Any:
    """`_plain`, or else the value's `repr`, without the address that Python gives where a type has none of its own."""
    try:
        return _plain(value)
    except TypeError:
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
