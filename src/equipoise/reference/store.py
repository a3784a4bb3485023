"""The reference store: log-probs of all reply tokens under a fixed model, on disk, memory-mapped, written as it goes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.core.errors import DataError, EquipoiseError
from equipoise.core.files import write_json
from equipoise.data.rows import TokenRow
from equipoise.reference.key import NUMERICS, Context, row_key

Values = NDArray[np.float32]


class ReferenceStore:
    """All entries of one context, in `<root>/<context>/shard-*/{keys,starts,values}.npy`.

    A shard is written into a temporary folder and renamed, so it is whole or absent; a build that was killed keeps
    every shard it had written. Several processes may add at once.
    """

    def __init__(self, root: str | Path, context: Context) -> None:
        self.folder = Path(root) / context.name()
        self.context = context
        self._index: dict[bytes, tuple[Values, int, int]] = {}
        self._read: set[str] = set()
        self.reload()

    def reload(self) -> None:
        """Read shards that were added since, by this process or another."""
        for shard in sorted(self.folder.glob("shard-*")):
            if shard.name in self._read:
                continue
            try:
                keys, starts, values = (
                    np.load(shard / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("keys", "starts", "values")
                )
            except (OSError, ValueError, EOFError) as error:  # EOFError: an empty file
                raise DataError(f"{shard} cannot be read ({error}). Delete this folder; its entries are computed again.") from error
            if len(starts) != len(keys) + 1 or starts[-1] != len(values):
                raise DataError(f"{shard} does not fit together. Delete this folder; its entries are computed again.")
            for number in range(len(keys)):
                self._index[keys[number].tobytes()] = (values, int(starts[number]), int(starts[number + 1]))
            self._read.add(shard.name)

    def __len__(self) -> int:
        return len(self._index)

    def missing(self, rows: Sequence[TokenRow]) -> list[int]:
        """Indices of the rows with at least one reply that is not stored."""
        return [
            number for number, row in enumerate(rows) if any(row_key(row.prompt, branch.ids) not in self._index for branch in row.branches)
        ]

    def get(self, row: TokenRow) -> list[Values]:
        """Log-probs of each reply of a row, float32 [T] nats. Raises DataError naming the row where one is missing."""
        found = []
        for branch in row.branches:
            entry = self._index.get(row_key(row.prompt, branch.ids))
            if entry is None:
                raise DataError(
                    f"Row {row.id}: its {branch.role} reply has no reference log-probs in {self.folder}. Build the store first."
                )
            values, start, end = entry
            if end - start != len(branch.ids):
                raise DataError(f"Row {row.id}: stored {end - start} log-probs for {len(branch.ids)} tokens in {self.folder}.")
            found.append(values[start:end])
        return found

    def add(self, rows: Sequence[TokenRow], logps: Sequence[Sequence[Values]]) -> None:
        """Write the log-probs of some rows as one shard. Raises EquipoiseError when the disk fails, leaving no half shard."""
        entries = {
            row_key(row.prompt, branch.ids): np.asarray(values, dtype=np.float32)
            for row, replies in zip(rows, logps, strict=True)
            for branch, values in zip(row.branches, replies, strict=True)
        }
        if not entries:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "context.json").exists():
            write_json(self.folder / "context.json", asdict(self.context) | {"numerics": NUMERICS})
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=".part-"))
        starts = np.concatenate([[0], np.cumsum([len(values) for values in entries.values()])]).astype(np.int64)
        arrays: dict[str, NDArray[Any]] = {
            "keys": np.frombuffer(b"".join(entries), dtype=np.uint8).reshape(-1, 16),
            "starts": starts,
            "values": np.concatenate(list(entries.values())),
        }
        try:
            for name, array in arrays.items():
                with open(temporary / f"{name}.npy", "wb") as stream:
                    np.save(stream, array, allow_pickle=False)
                    stream.flush()
                    os.fsync(stream.fileno())
            os.rename(temporary, self.folder / f"shard-{temporary.name.removeprefix('.part-')}")
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise EquipoiseError(f"Could not write the reference store in {self.folder}: {error.strerror or error}.") from error
        self.reload()
