"""benchmarks/gpu.py from end to end on the CPU: what a machine with a GPU will run unattended has to run here."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cpu", "--tiny", *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_one_object_with_every_side(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--shapes", "tiny-opt")
    result = json.loads(capsys.readouterr().out)
    assert result["schema_version"] == 1
    assert not result["skipped"]
    (one,) = result["runs"]
    assert "error" not in one, one
    assert one["sides"].keys() == {"ours", "trl_defaults", "trl_tuned"}
    assert all(side["tokens_a_second"] > 0 and side["tflops"] > 0 for side in one["sides"].values())
    # Every side computes the same step: loss and gradient norm, in bfloat16.
    norms = [side["gradient_norm"] for side in one["agreement"].values()]
    assert max(norms) < 1.02 * min(norms)
    assert [side["loss"] for side in one["agreement"].values()] == pytest.approx([0.6931] * 3, abs=5e-3)
    assert {name: part.get("error") for name, part in one["ablations"].items()} == dict.fromkeys(one["ablations"])
    assert len(one["ablations"]) == 6
    assert one["profile"]


def test_what_the_time_does_not_allow_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--budget-seconds", "0")
    result = json.loads(capsys.readouterr().out)
    assert result["skipped"] == ["tiny-llama tiny", "tiny-opt tiny"]
    assert result["runs"] == []
