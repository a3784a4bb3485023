"""What somebody new does first: data by its name, a recipe with a slip in it, a run that loses rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from equipoise.core.errors import DataError, UsageError
from equipoise.core.files import read_json
from equipoise.training._preflight import advice
from equipoise.training.fit import fit
from equipoise.training.plan import planned
from equipoise.training.settings import TrainSettings
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


def test_a_bare_no_of_yaml_is_a_no() -> None:
    assert TrainSettings.make({"model_name_or_path": "x"}, ["save_strategy=no"]).save_strategy == "no"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("dataset_name=x", "'streams.0.data.dataset_name'"),
        ("max_length=9", "'tokenise.max_length'"),
        ("beta=1", "streams.0.objective.beta"),
        ("loss_type=ipo", "streams.0.objective.name"),
        ("torch_dtype=bfloat16", "'dtype'"),
        ("resume_from_checkpoint=true", "resume by themselves"),
    ],
)
def test_names_that_users_of_trl_know_lead_to_ours(override: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"Unknown setting .*{said}"):
        TrainSettings.make({"model_name_or_path": "x"}, [override])


def test_a_methods_bare_name_is_an_objective() -> None:
    settings = TrainSettings.make({"model_name_or_path": "x", "streams": [{}]}, ["streams.0.objective=sft"])
    assert settings.streams[0].objective == {"name": "sft"}


@pytest.mark.parametrize(("values", "told"), [({"use_peft": True}, True), ({"use_peft": True, "learning_rate": 1e-4}, False), ({}, False)])
def test_lora_at_the_default_rate_is_remarked_on(values: dict[str, Any], told: bool) -> None:
    assert ["LoRA usually wants 1e-5 to 1e-4" in hint for hint in advice(TrainSettings(model_name_or_path="x", **values))] == [True] * told


def lossy(tmp_path: Path) -> str:
    """Six pairs, one of them equal, one with an empty reply, one with a prompt too long for 40 tokens."""
    rows = preference_dicts(6)
    rows[0]["chosen"] = rows[0]["rejected"]
    rows[1]["chosen"] = " "
    rows[2]["prompt"] = "w1 " * 60
    path = tmp_path / "lossy.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


SAID = "4 of 6 rows kept: 1 chosen equals rejected, 1 empty reply; 1 prompt truncated"


def test_a_run_says_what_became_of_the_rows(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"tokenise": {"max_length": 40}, "max_steps": 1, "streams": [{"data": {"dataset_name": lossy(tmp_path)}}]}
    assert planned(recipe(base, tmp_path / "out", **given))["streams"][0]["data"] == SAID
    fit(recipe(base, tmp_path / "out", **given))
    assert f"data of main: {SAID}\n" in capsys.readouterr().err


def test_no_row_left_is_said_in_words(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"after tokenising: 4 of 4 rows dropped: .* \(4: lossy:3, lossy:4"):
        fit(recipe(base, tmp_path / "out", tokenise={"max_length": 2}), train_dataset=lossy(tmp_path))
