"""The comparison with TRL: what is measured is not lost with a side that fails later."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest


class Worker:
    """Runs nothing; the tuned side fails from its second block on."""

    def __init__(self, device: str) -> None:
        self.jobs = 0

    def try_run(self, job: dict[str, Any]) -> dict[str, Any]:
        self.jobs += 1
        if job["side"] == "tuned" and self.jobs > 1:
            return {"error": "out of memory"}
        return {"reference_seconds": 1.0, "train_seconds": 1.0 if job["side"] == "ours" else 3.0, "peak_rss_mb": 1.0, "losses": [0.5]}

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        result = self.try_run(job)
        if "error" in result:
            raise SystemExit(result["error"])
        return result

    def close(self) -> None:
        pass


def test_a_side_that_fails_in_a_later_block_keeps_what_the_first_has_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    vs_trl = importlib.import_module("vs_trl")
    monkeypatch.setattr(vs_trl, "Worker", Worker)
    monkeypatch.setattr(vs_trl, "search", lambda *_: ({"micro_batch": 1}, []))
    monkeypatch.setattr(vs_trl, "matmul_peak", lambda *_: 1e9)
    monkeypatch.setattr(vs_trl, "model_weights", lambda _: (10, 10))
    monkeypatch.setattr("sys.argv", ["vs_trl.py", "--rows", "3", "--repeats", "3", "--device", "cpu", "--sides", "ours", "tuned"])
    arguments: argparse.Namespace = vs_trl._arguments()
    vs_trl.compare(arguments, [{"prompt": [1], "chosen": [2], "rejected": [3]}] * 3)
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert {name: side["blocks"] for name, side in told["sides"].items()} == {"ours": 3, "tuned": 1}
    assert told["ratios"]["throughput_vs_tuned"] == 2.0
    assert "block 2 of 3, tuned: out of memory" in captured.err
