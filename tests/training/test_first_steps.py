"""What somebody new does first: data by its name, a recipe with a slip in it, a run that loses rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from equipoise.core.files import read_json
from equipoise.training.fit import fit
from tests.tiny import preference_dicts, recipe


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A file of preference pairs."""
    path = tmp_path / "dpo.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in preference_dicts()), encoding="utf-8")
    return path


def test_data_is_given_by_its_name_as_in_the_settings(base: Path, pairs: Path, tmp_path: Path) -> None:
    run = fit(recipe(base, tmp_path / "named", max_steps=1, streams=[{"data": {"max_rows": 8}}]), train_dataset=str(pairs))
    named = {"dataset_name": str(pairs), "max_rows": 8}
    assert read_json(run.folder / "accounting.json")["main"]["train"][-1]["kept"] == 8
    assert fit(recipe(base, tmp_path / "named", max_steps=1, streams=[{"data": named}])).skipped


def test_dev_rows_given_by_name_are_all_of_them(base: Path, pairs: Path, tmp_path: Path) -> None:
    settings = recipe(base, tmp_path / "out", max_steps=1, streams=[{"data": {"part": "train"}}])
    run = fit(settings, train_dataset=pairs, eval_dataset=pairs)
    counted = read_json(run.folder / "accounting.json")["main"]
    assert counted["train"][0]["kept"] < 12
    assert counted["dev"][0]["kept"] == 12
