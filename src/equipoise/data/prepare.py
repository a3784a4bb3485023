"""`prepare`: a source and a tokenizer in, a folder of token rows out, in shards that survive a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from equipoise.core.errors import DataError
from equipoise.core.files import fingerprint, read_json, write_json
from equipoise.core.progress import bar
from equipoise.core.records import Record
from equipoise.core.runs import Run, run_stage
from equipoise.data._encode import Encoder
from equipoise.data.accounting import Accounting
from equipoise.data.load import load, source_fingerprint
from equipoise.data.mixture import prints_of
from equipoise.data.rows import TokenRows
from equipoise.data.settings import PrepareSettings
from equipoise.data.tokenise import BATCH, tokenise_units
from equipoise.data.units import units

SHARD = 2 * BATCH
"""Units tokenised between two marks on disk: what a kill can cost."""


def prepare(settings: PrepareSettings, tokenizer: Any, dataset: Any = None, overwrite: bool = False) -> Run:
    """Write `rows/`, `accounting.json` and `trained_on.npz` into `output_dir`; nothing to do where they are there.

    Args:
        settings: source, limits, roles, output folder.
        tokenizer: the tokenizer of `settings.model_name_or_path`, loaded (as `models.load.load_tokenizer` does).
        dataset: an in-memory data set, instead of the source named in the settings.
        overwrite: start afresh where the folder holds something else.

    An interrupted call leaves finished shards behind; the next one goes on after them and ends with the same bytes.
    Raises DataError where no row is left, and what `load`, `units` and `run_stage` raise.
    """
    inputs = source_fingerprint(settings.data, dataset) | {"tokenizer": tokenizer_fingerprint(tokenizer)}

    def work(folder: Path) -> Mapping[str, Any]:
        return _work(folder, settings, tokenizer, dataset)

    return run_stage(settings.output_dir, "prepare", settings.resolved(), inputs, work, overwrite)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hex digits of what decides the ids a tokenizer gives: its rules, vocabulary, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    # Truncation and padding are the settings of the last call, not a property of the tokenizer.
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return fingerprint({"rules": rules, "special": special, "template": getattr(tokenizer, "chat_template", None)})


def _work(folder: Path, settings: PrepareSettings, tokenizer: Any, dataset: Any) -> dict[str, Any]:
    loaded = load(settings.data, dataset)
    accounting = Accounting()
    made = units(loaded.records, settings.roles, settings.facts, accounting)
    encoder = Encoder(tokenizer, settings.tokenise)
    shards = []
    with bar("tokenising", len(made)) as progress:
        for start in range(0, len(made), SHARD):
            shard = folder / "shards" / f"{start // SHARD:06d}"
            accounting.add(_shard(shard, made[start : start + SHARD], encoder))
            shards.append(shard)
            progress.advance(min(SHARD, len(made) - start))
    if not accounting.kept:
        raise DataError(f"No row is left after tokenising: {accounting.in_words()}.")
    rows = TokenRows.of(chain.from_iterable(TokenRows.load(shard) for shard in shards if (shard / "rows.json").is_file()))
    rows.save(folder / "rows")
    write_json(folder / "accounting.json", {"schema_version": 1, "load": loaded.accounting.as_json(), "tokenise": accounting.as_json()})
    prints_of(_kept(made, rows.ids)).save(folder / "trained_on.npz")
    shutil.rmtree(folder / "shards")
    tokens = sum(prompt + sum(replies) for prompt, replies in rows.lengths())
    return {"rows": len(rows), "tokens": tokens, "fingerprint": rows.fingerprint(), "rows_in": loaded.accounting.rows_in}


def _shard(shard: Path, made: list[Record], encoder: Encoder) -> Accounting:
    """Tokenise one shard, unless it is there already. Its accounting is written last: without it the shard does not count."""
    mark = shard / "accounting.json"
    if mark.is_file():
        return Accounting.from_json(read_json(mark))
    accounting = Accounting()
    rows = [row for start in range(0, len(made), BATCH) for row in tokenise_units(made[start : start + BATCH], encoder, accounting)]
    if rows:  # an empty array cannot be memory-mapped, and an empty shard has nothing to say but its accounting
        TokenRows.of(rows).save(shard)
    write_json(mark, accounting.as_json())
    return accounting


def _kept(made: Iterable[Record], ids: Iterable[str]) -> list[Record]:
    """The units that became rows: only their prompts are trained on."""
    wanted = set(ids)
    return [unit for unit in made if unit.id in wanted]
