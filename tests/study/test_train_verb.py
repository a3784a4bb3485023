"""`equipoise train` on a tiny model: plan, run, skip, and a loss of the user's own."""

from __future__ import annotations

import json
import math

import pytest

from equipoise.cli.main import main

OWN = '''
"""A loss of one's own."""

from typing import ClassVar

from equipoise.objectives._base import Losses, Needs, Objective, Scored


class Fixed(Objective):
    """The same nats for every pair."""

    paper: ClassVar[str] = "none"
    departures: ClassVar[str] = "none"
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"))
    nats: float = 2.0

    def __call__(self, scored: Scored) -> Losses:
        """With a gradient of zero."""
        return Losses(self.nats + 0 * scored.side("chosen").policy_logps())
'''


@pytest.fixture
def arguments(tiny, files, tmp_path):
    sets = {
        "model_name_or_path": tiny["llama"],
        "streams.0.data.dataset_name": files["pairs"],
        "per_device_train_batch_size": 4,
        "tokenise.max_length": 256,
    }
    return [
        "train",
        "--json",
        "--output-dir",
        str(tmp_path / "run"),
        *(word for key, value in sets.items() for word in ("--set", f"{key}={value}")),
    ]


def test_a_plan_trains_nothing(arguments, tmp_path, capsys):
    assert main([*arguments, "--plan"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["streams"][0]["rows"] == 12
    assert plan["steps"] == 3
    assert plan["fits"]
    assert plan["memory"]["peak"] == max(plan["memory"]["moments"].values())
    assert not (tmp_path / "run").exists()


def test_dpo_starts_at_ln_2_and_a_second_call_does_nothing(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    assert not json.loads(capsys.readouterr().out)["skipped"]
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["skipped"]


def test_an_objective_file_is_used(arguments, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(OWN, encoding="utf-8")
    assert main([*arguments, "--objective-file", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["results"]["train_loss"] == pytest.approx(2.0)
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["streams"][0]["objective"] == {"name": "mine", "file": str(file)}


def test_hyper_parameters_of_the_config_stay_with_an_objective_file(arguments, tmp_path, capsys):
    file, config = tmp_path / "mine.py", tmp_path / "run.yaml"
    file.write_text(OWN, encoding="utf-8")
    data = next(word for word in arguments if word.startswith("streams.0.data.dataset_name=")).partition("=")[2]
    stream = {"data": {"dataset_name": data}, "objective": {"name": "mine", "file": str(file), "nats": 5.0}}
    config.write_text(json.dumps({"streams": [stream]}), encoding="utf-8")
    assert main([*arguments, "--config", str(config), "--objective-file", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["results"]["train_loss"] == pytest.approx(5.0)
    config.write_text("streams: []", encoding="utf-8")
    assert main(["train", "--config", str(config), "--objective-file", str(file), "--set", "model_name_or_path=x"]) == 2
    assert "streams" in capsys.readouterr().err


def test_an_objective_file_takes_hyper_parameters(arguments, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(OWN, encoding="utf-8")
    assert main([*arguments, "--objective-file", str(file), "--set", "streams.0.objective.nats=3"]) == 0
    assert json.loads(capsys.readouterr().out)["results"]["train_loss"] == pytest.approx(3.0)


def test_an_edited_objective_file_is_not_taken_for_the_one_that_was_trained(arguments, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(OWN, encoding="utf-8")
    assert main([*arguments, "--objective-file", str(file)]) == 0
    file.write_text(OWN.replace("nats: float = 2.0", "nats: float = 4.0"), encoding="utf-8")
    assert main([*arguments, "--objective-file", str(file)]) != 0
    assert "objective main" in capsys.readouterr().err
    assert main([*arguments, "--objective-file", str(file), "--overwrite"]) == 0
    assert json.loads(capsys.readouterr().out)["results"]["train_loss"] == pytest.approx(4.0)


def test_a_plan_that_does_not_fit_is_exit_code_1_with_ways_out(arguments, monkeypatch, capsys):
    monkeypatch.setattr("equipoise.training.machine.memory_at_hand", lambda device: 1_000_000)
    assert main([*arguments, "--plan"]) == 1
    told = capsys.readouterr()
    assert not json.loads(told.out)["fits"]
    assert "0.0 GB are at hand" in told.err
    assert "gradient_checkpointing=true" in told.err
