"""`equipoise doctor`: facts about the machine, and what would stand in the way."""

from __future__ import annotations

import json
import os

import pytest
import torch

from equipoise.cli import doctor
from equipoise.cli.main import main
from equipoise.core import assets
from equipoise.training.machine import Machine


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_json_is_one_object_with_what_was_asked_for(capsys, empty_cache):
    assert main(["doctor", "--json", "--quick"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert next(iter(found)) == "schema_version"
    assert found["versions"]["torch"] == torch.__version__
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert found["assets"] == {"smollm2-135m-instruct": "absent", "minilm-l6": "absent"}
    assert found["cache"] == str(empty_cache)
    assert found["hub_reachable"] is None, "quick asks nobody"
    assert not empty_cache.exists(), "looking makes nothing"


def test_the_table_shows_the_same(capsys, empty_cache):
    assert main(["doctor", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "asset minilm-l6" in out
    assert torch.__version__ in out.replace("\n", "")


def test_presence_tells_ready_from_downloaded(empty_cache):
    raw = assets.raw_folder("smollm2-135m-instruct")
    raw.mkdir(parents=True)
    (raw / assets.ASSETS["smollm2-135m-instruct"].weights).write_bytes(b"x")
    assert doctor._presence("smollm2-135m-instruct") == "downloaded"
    ready = assets.ready_folder("smollm2-135m-instruct")
    ready.mkdir(parents=True)
    (ready / "source.json").write_text("{}")
    assert doctor._presence("smollm2-135m-instruct") == "ready"


def test_too_little_disk_memory_or_a_missing_converter_is_a_problem(empty_cache):
    fine = {
        "assets": {"a": "absent"},
        "cache": "c",
        "cache_free_gb": 50.0,
        "memory_gb": 16.0,
        "hub_reachable": False,
        "optional": {"gguf": True},
    }
    assert doctor._problems(fine) == []
    assert "only 1.0 GB are free" in doctor._problems({**fine, "cache_free_gb": 1.0})[0]
    assert "4.0 GB of memory" in doctor._problems({**fine, "memory_gb": 4.0})[0]
    assert doctor._problems({**fine, "memory_gb": None}) == []
    assert "equipoise[gguf]" in doctor._problems({**fine, "optional": {"gguf": False}})[0]


def test_the_speed_is_the_one_plans_are_made_with(monkeypatch, capsys, empty_cache):
    monkeypatch.setattr(assets, "hub_reachable", lambda: False)
    monkeypatch.setattr("equipoise.training.machine.measure", lambda: Machine("cpu", float32=2.1475e12, bfloat16=1e9))
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gflops"] == {"float32": 2147.5, "bfloat16": 1.0}
