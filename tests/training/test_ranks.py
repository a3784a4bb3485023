"""Many processes train as one: gradients, logs, weights, resuming, sharding; and what is done once is done once.

Two gloo processes run every case of `ranks_worker` once; the tests compare what they left with one process here.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from equipoise.core.files import read_json, read_jsonl
from equipoise.models.attention import register
from equipoise.training.fit import fit
from tests.tiny import tiny, tokenizer
from tests.training.ranks_worker import (
    MOVED,
    RESUMED,
    RUNS,
    SPECS,
    WRAPS,
    data,
    run_settings,
    step_gradient,
    step_plan,
    step_stream,
    stopped,
)

ROOT = Path(__file__).parents[2]
register()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny(seed=5).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    # Begun by one process and stopped: the two take them up.
    for name in MOVED:
        stopped(run_settings(folder / "base", folder / f"{name}-1-to-2", 1, **RUNS[name]), 5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in places.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        log = open(folder / f"log-{rank}.txt", "w")  # noqa: SIM115 (closed with the process)
        command = [sys.executable, "-m", "tests.training.ranks_worker", str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "".join((folder / f"log-{rank}.txt").read_text()[-3000:] for rank in range(2))
    return folder


@pytest.fixture(scope="module")
def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}" / "report.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The same whole runs by one process."""
    for name, values in RUNS.items():
        fit(run_settings(folder / "base", folder / "alone" / name, 1, **values), **data())
    return folder / "alone"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run / "model").glob("*.safetensors")))


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Norm of the difference over the norm, all tensors together."""
    assert one.keys() == other.keys()
    gap = sum(float(((np.asarray(one[name], np.float64) - np.asarray(other[name], np.float64)) ** 2).sum()) for name in one)
    size = sum(float((np.asarray(other[name], np.float64) ** 2).sum()) for name in other)
    return float(np.sqrt(gap / size))


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", SPECS)
def test_a_step_of_two_is_a_step_of_one(name: str, wrap: str, folder: Path, tmp_path: Path) -> None:
    """Uneven hands, an idle rank, coupled objectives, whole distributions: the gradient each rank ends with is the whole step's."""
    wanted = step_gradient(name, wrap, tmp_path, 0, 1)
    wanted_loss = float(wanted.pop("loss"))
    assert wanted.pop("idle") == 0
    losses = []
    for rank in range(2):
        with np.load(folder / f"rank-{rank}" / f"step-{name}-{wrap}.npz") as saved:
            found = dict(saved)
        losses.append(float(found.pop("loss")))
        found.pop("idle")
        assert distance(found, wanted) < 1e-6, (rank, distance(found, wanted))
    assert sum(losses) / 2 == pytest.approx(wanted_loss, rel=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_the_steps_compared_have_an_idle_rank(name: str, tmp_path: Path) -> None:
    step = step_plan(step_stream(name, tmp_path), 2).step(0)
    assert sum(micro.idle for rank in step.ranks for micro in rank) >= 1
    assert len(step.ranks[0]) == len(step.ranks[1]) > 1


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_two_is_a_run_of_one(name: str, folder: Path, alone: Path, reports: list[dict[str, Any]]) -> None:
    """Losses, gradient norms, meters, dev figures and weights (under SGD: Adam would amplify rounding)."""
    ours, theirs = (
        [{key: value for key, value in line.items() if "runtime" not in key and "second" not in key} for line in lines]
        for lines in (read_jsonl(folder / name / "log.jsonl"), read_jsonl(alone / name / "log.jsonl"))
    )
    assert len(ours) == len(theirs) > 6
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=2e-6)
    start = load_file(folder / "base" / "model.safetensors")
    moved = weights(folder / name)
    assert distance(moved, weights(alone / name)) < 1e-6
    if start.keys() == moved.keys():
        assert distance(moved, start) > 1e-4, "nothing was learnt"
    for report in reports:
        assert report[name]["dev"] == pytest.approx(reports[0][name]["dev"])
        assert report[name]["train_loss"] == pytest.approx(read_json(alone / name / "done.json")["results"]["train_loss"], rel=1e-5)
    assert not (folder / name / "checkpoints").exists()
    assert not (folder / name / "rows").exists()


def test_sharded_runs_train_on_dtensors_and_leave_an_ordinary_folder(folder: Path, reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["kinds"]["fsdp"] == report["kinds"]["fsdp-lora"] == ["DTensor"]
        assert report["kinds"]["full"] == ["Parameter"]
    model = AutoModelForCausalLM.from_pretrained(folder / "fsdp" / "model")
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert distance(dict(model.state_dict()), weights(folder / "fsdp")) == 0
    assert (folder / "fsdp-lora" / "model" / "adapter_config.json").is_file()


@pytest.mark.parametrize("name", RESUMED)
def test_stopped_and_resumed_on_two_ends_with_the_same_bytes(name: str, folder: Path, reports: list[dict[str, Any]]) -> None:
    """Adam's moments, the schedule and each rank's dropout go on as if nothing had happened."""
    assert [report[f"{name}-broken"]["resumed_from"] for report in reports] == ["checkpoint-4"] * 2
    whole, broken = (next((folder / f"{name}-{kind}" / "model").glob("*.safetensors")) for kind in ("whole", "broken"))
    assert whole.read_bytes() == broken.read_bytes()
    losses = [
        [line["loss"] for line in read_jsonl(folder / f"{name}-{kind}" / "log.jsonl") if "loss" in line] for kind in ("whole", "broken")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", MOVED)
def test_resumed_on_another_number_of_processes(name: str, folder: Path, alone: Path, reports: list[dict[str, Any]]) -> None:
    """Both ways: the same batches go on at the same row, so the run ends where the unbroken one does."""
    broken = run_settings(folder / "base", folder / f"{name}-2-to-1", 2, **RUNS[name])
    assert fit(broken, **data()).results["resumed_from"] == "checkpoint-4"
    assert reports[0][f"{name}-1-to-2"]["resumed_from"] == "checkpoint-4"
    for way in ("2-to-1", "1-to-2"):
        assert distance(weights(folder / f"{name}-{way}"), weights(alone / name)) < 1e-6
        lines = [line for line in read_jsonl(folder / f"{name}-{way}" / "log.jsonl") if "loss" in line]
        wanted = [line for line in read_jsonl(alone / name / "log.jsonl") if "loss" in line]
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in wanted], rel=1e-4)


def test_what_is_done_once_is_done_on_rank_0(reports: list[dict[str, Any]]) -> None:
    first, second = (report["counted"] for report in reports)
    assert first["tokenise"] == 2, "training rows and dev rows"
    assert first["weights"] == first["identity"] == 1
    assert {"inputs.json", "done.json", "start_check.json", "accounting.json", "cost.json", "complete.json"} <= set(first["written"])
    assert second["tokenise"] == second["weights"] == second["identity"] == 0
    # Shards of the reference store are each rank's own; nothing else is written twice.
    assert set(second["written"]) <= {"context.json"}
    assert second["steps"] == first["steps"]


def test_the_store_is_filled_by_all_and_counted_once(folder: Path, reports: list[dict[str, Any]]) -> None:
    """As many tokens as one process computes, written as one shard of each rank."""
    wanted = run_settings(folder / "base", folder / "alone-store" / "counted", 1, max_steps=1)
    cost = fit(wanted, **data()).results["cost"]
    for report in reports:
        assert report["counted"]["reference_tokens"] == cost["reference_tokens"] > 0
    shards = list((folder / "store-counted" / "reference").glob("*/shard-*"))
    assert len(shards) == 4, "two ranks, training and dev rows"


def test_every_rank_hears_the_refusal(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["refused"]["stage"].startswith("StageError")
        assert "learning_rate" in report["refused"]["stage"]
        assert report["refused"]["data"].startswith("DataError")
        assert "rank 0 has 0, rank 1 has 1" in report["refused"]["agree"]
