"""`prepare`: a source and a tokenizer in, a folder of token rows out, in shards that survive a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from equipoise.core.errors import DataError
from equipoise.core.files import fingerprint, read_json, write_json
from equipoise.core.prints import PromptPrints
from equipoise.core.progress import bar
from equipoise.core.records import Record
from equipoise.core.runs import Run, run_stage
from equipoise.data._encode import Encoder
from equipoise.data._join import join
from equipoise.data.accounting import Accounting
from equipoise.data.load import source_fingerprint, stream
from equipoise.data.mixture import prints_of
from equipoise.data.rows import TokenRows
from equipoise.data.settings import PrepareSettings, TokeniseSettings
from equipoise.data.tokenise import BATCH, batches, tokenise_units
from equipoise.data.units import units

SHARD = 2 * BATCH
"""Units tokenised between two marks on disk: what a kill can cost, and what memory holds."""
PRINTS = "trained_on.npz"


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
    if isinstance(dataset, Iterator):
        dataset = list(dataset)  # it is read twice: fingerprinted, then tokenised
    inputs = source_fingerprint(settings.data, dataset) | {"tokenizer": tokenizer_fingerprint(tokenizer)}

    def work(folder: Path) -> Mapping[str, Any]:
        return _work(folder, settings, tokenizer, dataset)

    return run_stage(settings.output_dir, "prepare", settings.resolved(), inputs, work, overwrite, neutral=("dataset_num_proc",))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hex digits of what decides the ids a tokenizer gives: its rules, vocabulary, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    # Truncation and padding are the settings of the last call, not a property of the tokenizer.
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return fingerprint({"rules": rules, "special": special, "template": getattr(tokenizer, "chat_template", None)})


def _work(folder: Path, settings: PrepareSettings, tokenizer: Any, dataset: Any) -> dict[str, Any]:
    streamed = stream(settings.data, dataset)
    accounting, counted = Accounting(), Accounting()
    shards: list[Path] = []
    folder_of_shards = folder / "shards"
    made = units(streamed.records, settings.roles, settings.facts, accounting, spool=folder_of_shards / "units.jsonl")
    with bar("tokenising", None) as progress:
        asked = ((folder_of_shards / f"{number:06d}", some) for number, some in enumerate(batches(made, SHARD)))
        done: Iterator[tuple[Path, int, Accounting]]
        if settings.dataset_num_proc == 1:
            encoder = Encoder(tokenizer, settings.tokenise)
            done = ((shard, len(some), _shard(shard, some, encoder)) for shard, some in asked)
        else:
            done = _by_processes(asked, tokenizer, settings)
        for shard, size, found in done:
            counted.add(found)
            if (shard / "rows.json").is_file():
                shards.append(shard)
            progress.advance(size)
    accounting.add(counted)
    if not accounting.kept:
        raise DataError(f"No row is left after tokenising: {accounting.in_words()}.")
    joined = join(shards, folder / "rows")
    PromptPrints.join([shard / PRINTS for shard in shards], folder / PRINTS)
    write_json(folder / "accounting.json", {"schema_version": 1, "load": streamed.accounting.as_json(), "tokenise": accounting.as_json()})
    shutil.rmtree(folder_of_shards)
    return {"rows": joined.rows, "tokens": joined.tokens, "fingerprint": joined.fingerprint, "rows_in": streamed.accounting.rows_in}


def _by_processes(
    asked: Iterable[tuple[Path, list[Record]]], tokenizer: Any, settings: PrepareSettings
) -> Iterator[tuple[Path, int, Accounting]]:
    """Shards in their order, tokenised by several processes; this one reads. No more are under way than keep them busy."""
    Encoder(tokenizer, settings.tokenise)  # what a tokenizer cannot do is said here, not lost in another process
    processes = settings.dataset_num_proc
    # Started afresh: a process that has used the tokenizer's threads may not be forked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin, (tokenizer, settings.tokenise)) as pool:
        under_way: deque[tuple[Path, int, Future[Accounting]]] = deque()
        for shard, some in asked:
            under_way.append((shard, len(some), pool.submit(_in_a_process, shard, some)))
            if len(under_way) > 2 * processes:
                first, size, future = under_way.popleft()
                yield first, size, future.result()
        for shard, size, future in under_way:
            yield shard, size, future.result()


_encoder: Encoder | None = None


def _begin(tokenizer: Any, settings: TokeniseSettings) -> None:
    """A process's own encoder, which leaves the other cores to the other processes."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(tokenizer, settings)


def _in_a_process(shard: Path, made: list[Record]) -> Accounting:
    assert _encoder is not None
    return _shard(shard, made, _encoder)


def _shard(shard: Path, made: list[Record], encoder: Encoder) -> Accounting:
    """Tokenise one shard, unless it is there already. Its accounting is written last: without it the shard does not count."""
    mark = shard / "accounting.json"
    if mark.is_file():
        return Accounting.from_json(read_json(mark))
    accounting = Accounting()
    rows = [row for some in batches(made, BATCH) for row in tokenise_units(some, encoder, accounting)]
    if rows:  # an empty shard has nothing to say but its accounting
        kept = {row.id for row in rows}
        prints_of(unit for unit in made if unit.id in kept).save(shard / PRINTS)  # only prompts of rows are trained on
        TokenRows.of(rows).save(shard)
    write_json(mark, accounting.as_json())
    return accounting
