"""`equipoise study`, `equipoise train --plan` and `equipoise methods`, in process."""

from __future__ import annotations

import json

import pytest
import typer

from equipoise.cli.main import app, main
from equipoise.core.catalog import names


def said(capsys: pytest.CaptureFixture[str]) -> dict:
    """The one JSON object on stdout."""
    found = json.loads(capsys.readouterr().out)
    assert found["schema_version"] == 1
    return found


def test_methods_are_listed_from_the_objectives_themselves(capsys):
    assert main(["methods", "--json"]) == 0
    methods = {row["name"]: row for row in said(capsys)["methods"]}
    assert list(methods) == names("objectives")
    dpo = methods["dpo"]
    assert "2305.18290" in dpo["paper"]
    assert dpo["needs"]["roles"] == ["chosen", "rejected"]
    assert dpo["needs"]["reference"] == "stored"
    beta = next(item for item in dpo["settings"] if item["name"] == "beta")
    assert (beta["default"], beta["range"]) == (0.1, "> 0")
    assert all(row["departures"] and row["paper"] for row in methods.values())
    assert methods["bradley_terry"]["needs"]["readout"] == "score"


def test_methods_for_people(capsys):
    assert main(["methods"]) == 0
    assert "dpo" in capsys.readouterr().out


def test_the_bundled_studies_are_listed(capsys):
    assert main(["study", "list", "--json"]) == 0
    assert {row["name"] for row in said(capsys)["studies"]} >= {"quickstart", "opt350m", "hh-smollm2"}


def test_a_plan_as_json_and_for_people(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path))
    assert main(["study", "plan", "quickstart", "--json", "--set", "seeds=[0,1]"]) == 0
    plan = said(capsys)
    trained = [row for row in plan["stages"] if row["stage"] == "train" and row["arms"]]
    assert len(trained) == 8
    assert plan["budget"]["arms"]["sft_dpo"]["pairs"] == 160
    assert main(["study", "plan", "quickstart"]) == 0
    assert "sft_dpo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["study", "plan", "quikstart"], "Did you mean 'quickstart'"),
        (["study", "plan", "quickstart", "--set", "trainng.lora_r=4"], "Did you mean 'training'"),
        (["train", "--set", "learning_rat=1", "--set", "model_name_or_path=x"], "Did you mean 'learning_rate'"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["train", "--plan"], "model_name_or_path"),
    ],
)
def test_bad_use_is_exit_code_2_with_a_hint(arguments, words, capsys):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_report_of_what_is_no_study_is_an_error(capsys, tmp_path):
    assert main(["study", "report", str(tmp_path)]) == 1
    assert "not a study folder" in capsys.readouterr().err


def commands(command: typer.core.TyperCommand, path: str) -> dict[str, set[str]]:
    """Every command under this one by its path, with its options."""
    found = {path: {name for parameter in command.params for name in parameter.opts}}
    if hasattr(command, "list_commands"):
        context = typer.Context(command)
        for name in command.list_commands(context):
            found |= commands(command.get_command(context, name), f"{path} {name}")
    return found


def test_the_output_folder_is_o_for_every_verb_and_no_verb_installs_completion():
    every = commands(typer.main.get_command(app), "equipoise")
    writing = {path for path, options in every.items() if "--output-dir" in options}
    assert {"equipoise train", "equipoise evaluate", "equipoise study run", "equipoise study report"} <= writing
    assert writing == {path for path, options in every.items() if "-o" in options} - {"equipoise data replies"}
    assert not [path for path, options in every.items() if "--install-completion" in options]
