"""Methods that read more than a pair's log-probs, from rows of data to a trained model: the first step's loss by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from equipoise.core.errors import DataError
from equipoise.core.files import read_json, read_jsonl, write_jsonl
from equipoise.models.batch import pack
from equipoise.objectives._base import Scored
from equipoise.objectives._load import build
from equipoise.training._streams import Stream, check_stream, join
from equipoise.training.fit import fit
from equipoise.training.settings import TrainSettings
from tests.tiny import pairs, preference_dicts, row


def trained(base: Path, objective: dict[str, Any], rows: list[dict[str, Any]] | None, **values: Any) -> list[dict[str, Any]]:
    """Log lines of a run over all rows at once, in the folder `out` beside the model."""
    settings = {
        "model_name_or_path": str(base),
        "output_dir": str(base.parent / "out"),
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 16,
        "num_train_epochs": 6,
        "token_budget": 100,
        "reference_store": str(base.parent / "store"),
        "streams": [{"objective": objective, "data": values.pop("data", None)}],
    }
    run = fit(TrainSettings.make(settings | values), train_dataset=rows)
    return [line for line in read_jsonl(run.folder / "log.jsonl") if "loss" in line]


@pytest.mark.parametrize("name", ["infonca", "nca_list"])
def test_scored_lists(base: Path, name: str) -> None:
    generator = np.random.default_rng(4)
    sizes = [2, 3, 4, 3, 2, 1]
    rows = [
        {
            "prompt": f"w{number} w3",
            "completions": [f"w{10 + word} w{20 + number}" for word in range(size)],
            "scores": [{"tone": 9.0, "honesty": float(score)} for score in generator.normal(size=size)],
        }
        for number, size in enumerate(sizes)
    ]
    log = trained(base, {"name": name, "beta": 0.5, "score": "honesty"}, rows)
    # At the reference every reply of a list is as likely as the others; the list of one is left out.
    expected = {"infonca": sum(map(math.log, sizes[:5])) / 5, "nca_list": 2 * math.log(2)}[name]
    assert log[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert log[-1]["loss"] < log[0]["loss"] - 0.02
    assert log[-1]["rewards/accuracies"] > 0.8
    dropped = read_json(base.parent / "out" / "accounting.json")["main"]["train"][1]["dropped"]
    assert {reason: entry["count"] for reason, entry in dropped.items()} == {"no list of two or more replies": 1}


def test_a_list_of_one_among_token_rows_is_refused() -> None:
    with pytest.raises(DataError, match="Row a: InfoNCA needs at least two replies"):
        check_stream(Stream("main", [row("a", 3, {"sample": 2}, score=1.0)], build({"name": "infonca"})))


@pytest.mark.parametrize(
    ("name", "roles", "empty"), [("dpo", ("chosen", "rejected"), "rejected"), ("kto", ("sample", "mismatched"), "mismatched")]
)
def test_a_reply_with_nothing_to_learn_among_token_rows_is_refused(name: str, roles: tuple[str, ...], empty: str) -> None:
    made = row("a", 3, dict.fromkeys(roles, 2), label=1.0)
    branches = [replace(item, marks={"learn": np.full(2, item.role != empty)}) for item in made.branches]
    with pytest.raises(DataError, match="Row a: nothing to learn"):
        check_stream(Stream("main", [replace(made, branches=tuple(branches))], build({"name": name})))


def test_rewards_of_other_objectives(base: Path) -> None:
    rows = [item | {"score_chosen": 1, "score_rejected": {"score": 0.0}} for item in preference_dicts(4)]
    # h = 0, ΔR = 1 and w = ½: the margin is −1.
    assert trained(base, {"name": "modpo"}, rows, max_steps=1)[0]["loss"] == pytest.approx(math.log(1 + math.e), abs=1e-5)


def test_token_marks(base: Path) -> None:
    rows = [item | {"rejected": f"{item['chosen']} w1 w2"} for item in preference_dicts(6)]
    log = trained(base, {"name": "bmc", "beta": 0.3}, rows)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1]["loss"] < log[0]["loss"]
    # Two of each rejected reply's tokens differ, and no chosen one: they are improbable, so λ is 3 for them and 1 for the rest.
    words = [len(item["chosen"].split()) + 1 for item in rows]
    assert log[0]["weights"] == pytest.approx(sum((2 * count + 2 * 3) / (2 * count + 2) for count in words) / 6, abs=1e-3)


def test_marks_are_laid_out_and_joined_like_the_mask() -> None:
    made = pairs(2)
    for item in made:
        for branch in item.branches:
            branch.marks["odd"] = np.arange(len(branch.ids)) % 2 == 1  # type: ignore[index]
    plain = row("z", 2, {"chosen": 1, "rejected": 20})
    batches = [pack(made).to("cpu"), pack([plain])]
    assert batches[0].marks["odd"].tolist() == [
        [at % 2 == 1 and at < len(b.ids) for at in range(batches[0].mask.shape[1])] for item in made for b in item.branches
    ]
    assert batches[1].marks == {}
    mixed = pack([made[0], plain]).marks["odd"]
    assert not mixed[2:].any()
    views = [Scored(None, None, batch.mask, batch.unit, batch.role, marks={"odd": batch.mask}) for batch in batches]
    joined = join(views)
    assert joined.marks["odd"].shape == (6, 20)
    assert torch.equal(joined.marks["odd"], joined.mask)
    assert join([replace(views[0], marks={}), views[0]]).marks == {}


def flagged(path: Path, flags: list[tuple[bool, bool]]) -> dict[str, Any]:
    """A PKU-SafeRLHF file: response 0 is the more helpful one, response 1 the safer one."""
    rows = [
        {
            "prompt": item["prompt"],
            "response_0": item["chosen"],
            "response_1": item["rejected"],
            "better_response_id": 0,
            "safer_response_id": 1,
            "is_response_0_safe": helpful,
            "is_response_1_safe": other,
        }
        for item, (helpful, other) in zip(preference_dicts(len(flags)), flags, strict=True)
    ]
    write_jsonl(path, rows)
    return {"dataset_name": str(path)}


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_bfpo_with_a_buffer_trains_what_the_pattern_names(base: Path, weight: float) -> None:
    """The recipe: a safety set with flags and a buffer of helpful pairs without, both in every step, only `down_proj` trained."""
    safety = flagged(base.parent / "safety.jsonl", [(True, False), (False, True), (True, True), (False, False)])
    turns = [
        [[{"role": "user", "content": item["prompt"]}, {"role": "assistant", "content": item[side]}] for side in ("chosen", "rejected")]
        for item in preference_dicts(5, seed=3)
    ]
    path = base.parent / "buffer.jsonl"
    write_jsonl(path, [{"chosen": chosen, "rejected": rejected, "score_chosen": 8, "score_rejected": 4} for chosen, rejected in turns])
    objective = {"name": "bfpo", "tau": 0.1}
    streams = [
        {"name": "safety", "data": safety, "objective": objective},
        {"name": "buffer", "data": {"dataset_name": str(path), "assume_safe": True}, "objective": objective, "weight": weight},
    ]
    log = trained(base, objective, None, streams=streams, per_device_train_batch_size=4, num_train_epochs=2, trainable="down_proj")
    # At the reference h = 0, so a pair costs (g/τ)²: the flags' g are 1, −1, ½, −½, the buffer's ½.
    assert log[0]["loss"] == pytest.approx(100 * (1 + 1 + 0.25 + 0.25) / 4 + weight * 100 * 0.25, rel=1e-5)
    assert log[0]["safety/label"] == pytest.approx(0.0, abs=1e-9)
    assert log[0]["buffer/label"] == pytest.approx(0.5)
    before, after = (load_file(next(folder.glob("*.safetensors"))) for folder in (base, base.parent / "out" / "model"))
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {name for name in before if "down_proj" in name}
    assert len(moved) == 2


def test_a_cost_model(base: Path) -> None:
    data = flagged(base.parent / "pairs.jsonl", [(False, True), (False, False), (True, True), (False, True)]) | {"preferred_by": "safer"}
    log = trained(base, {"name": "cost_model"}, None, data=data, num_train_epochs=12)
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["costs/sign_accuracies"] == 1.0
    with pytest.raises(DataError, match="preferred_by=safer"):
        trained(base, {"name": "cost_model"}, None, data=data | {"preferred_by": "better"}, output_dir=str(base.parent / "wrong"))
