"""From what a run names to rows: several sources of one stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from equipoise.core.files import write_jsonl
from equipoise.objectives._load import build
from equipoise.training._rows import Rows, make_streams
from equipoise.training.settings import TrainSettings
from tests.tiny import preference_dicts, tokenizer


def made(data: Any) -> Rows:
    settings = TrainSettings.make({"model_name_or_path": "unread", "streams": [{"data": data, "objective": {"name": "dpo"}}]})
    train, _ = make_streams(settings, [build({"name": "dpo"})], tokenizer(), None, None)
    return train[0]


def hh_like(folder: Path, seed: int) -> dict[str, Any]:
    """A folder whose one file is called train, as each of HH-RLHF's is."""
    write_jsonl(folder / "train.jsonl", preference_dicts(3, seed=seed))
    return {"dataset_name": str(folder / "train.jsonl")}


def test_sources_whose_files_share_a_name(tmp_path: Path) -> None:
    helpful, harmless = hh_like(tmp_path / "helpful-base", 0), hh_like(tmp_path / "harmless-base", 1)
    rows = made([helpful, harmless])
    assert rows.packed().ids == [f"{source}/train:{line}" for source in (0, 1) for line in (1, 2, 3)]
    # Told apart by their ids only: tokens are those of each source alone, whose own ids stay what they were.
    alone = [made(source).rows for source in (helpful, harmless)]
    assert [row.prompt.tolist() for row in rows.rows] == [row.prompt.tolist() for part in alone for row in part]
    assert alone[0][0].id == "train:1" == made([helpful]).rows[0].id


def test_a_source_listed_twice_weighs_twice(tmp_path: Path) -> None:
    source = hh_like(tmp_path, 0)
    rows = made([source, source]).packed()
    assert rows.ids == [f"{position}/train:{line}" for position in (0, 1) for line in (1, 2, 3)]
    assert rows[0].prompt.tolist() == rows[3].prompt.tolist()
