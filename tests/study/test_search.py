"""A search over learning rates: what it scores, what it chooses, and that a study evaluates the chosen one only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from equipoise.core.errors import DataError, UsageError
from equipoise.core.files import read_json, read_jsonl, write_jsonl
from equipoise.study._graph import build_graph
from equipoise.study._report.read import read_study
from equipoise.study._search import Found, Tried, chosen_by
from equipoise.study.plan import plan_study
from equipoise.study.run import run_study
from equipoise.study.settings import StudySettings

AXES = {"a": "harmful", "b": "helpful", "c": "benign"}


def scored(folder: Path, **verdicts: list[float | None]) -> Path:
    """A score stage with verdicts on the prompts a, b and c."""
    folder.mkdir(parents=True)
    rows = [
        {"id": prompt, "by": by, "value": value, "reason": ""}
        for by, values in verdicts.items()
        for prompt, value in zip(AXES, values, strict=True)
    ]
    write_jsonl(folder / "verdicts.jsonl", rows)
    return folder


def test_an_invalid_reply_counts_as_the_worst_reward_any_candidate_got(tmp_path: Path) -> None:
    good = scored(tmp_path / "good", reward=[1.0, 2.0, 3.0], invalid=[0.0, 0.0, 0.0])
    invalid = scored(tmp_path / "invalid", reward=[9.0, 4.0, None], invalid=[1.0, 0.0, 0.0])
    # Prompt a: the worst of 1 and 9 is 1. Prompt c has no verdict: the worst known there is 3.
    assert chosen_by("reward", [good, invalid], AXES) == [2.0, pytest.approx(8 / 3)]


def test_right_refusals_are_refused_harm_and_answered_rest(tmp_path: Path) -> None:
    right = scored(tmp_path / "right", refusal=[1.0, 0.0, 0.0], invalid=[0.0, 0.0, 0.0])
    refuses = scored(tmp_path / "refuses", refusal=[1.0, 1.0, 1.0], invalid=[0.0, 0.0, 0.0])
    broken = scored(tmp_path / "broken", refusal=[1.0, 0.0, None], invalid=[1.0, 1.0, 1.0])
    assert chosen_by("right_refusals", [right, refuses, broken], AXES) == [1.0, pytest.approx(1 / 3), 0.0]


def test_the_smallest_of_equals_is_chosen() -> None:
    arm: Any = None
    tried = [Tried(1e-3, arm, 0.5), Tried(1e-5, arm, 0.5), Tried(1e-6, arm, 0.4)]
    assert Found("dpo", "reward", 3, tried).chosen == 1e-5
    assert Found("dpo", "reward", 3, []).chosen is None


def test_a_candidate_too_far_from_the_base_is_not_chosen() -> None:
    arm: Any = None
    tried = [Tried(1e-3, arm, 0.9, 1.8), Tried(1e-4, arm, 0.5, 0.1), Tried(1e-5, arm, 0.4, 0.0)]
    assert Found("dpo", "reward", 3, tried).chosen == 1e-3
    assert Found("dpo", "reward", 3, tried, max_kl=0.5).chosen == 1e-4
    # All too far: the nearest. One that was not scored is never near.
    assert Found("dpo", "reward", 3, tried[:1], max_kl=0.5).chosen == 1e-3
    assert Found("dpo", "reward", 3, [Tried(1e-2, arm, 0.9), *tried[:1]], max_kl=0.5).chosen == 1e-3


@pytest.fixture
def searching(values: dict[str, Any], files: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    dev = tmp_path / "dev.jsonl"
    write_jsonl(dev, [{"id": f"d{number}", "prompt": f"dev question {number} {number * 37}", "axis": "harmful"} for number in range(3)])
    values["arms"] = {"base": [], "dpo": ["dpo"]}
    values["primary"] = []
    values["evaluation"]["null_policies"] = []
    values["search"] = {"learning_rates": [1e-3, 1e-2], "prompts": [{"source": str(dev)}]}
    return values


def test_a_study_evaluates_what_its_search_chose(searching: dict[str, Any], tmp_path: Path) -> None:
    folder = run_study(StudySettings.make(searching), tmp_path / "study")
    (found,) = read_json(folder / "search.json")["searches"]
    assert (found["arm"], found["by"], found["prompts"]) == ("dpo", "reward", 3)
    best = max(found["candidates"], key=lambda one: (one["score"], -one["learning_rate"]))
    assert found["chosen"] == best["learning_rate"]
    arms = {arm["name"]: arm for arm in read_json(folder / "arms.json")["arms"]}
    assert arms["dpo"]["model"] == best["model"]
    assert arms["dpo"]["cost"]["tuning_seconds"] > 0
    assert "tuning_seconds" not in arms["base"]["cost"]
    assert len(list(folder.glob("stages/train-dpo-*"))) == 2
    assert len(list(folder.glob("stages/generate-dpo-search-*"))) == 2
    (asked,) = folder.glob("stages/generate-dpo-[0-9a-f]*")
    assert len(list(read_jsonl(asked / "completions.jsonl"))) == 9
    # Dev prompts are kept apart from the data as the evaluation's are.
    assert {row["id"] for row in read_jsonl(folder / "search_prompts.jsonl")} == {"d0", "d1", "d2"}
    report = (folder / "report" / "report.md").read_text(encoding="utf-8")
    assert f"{found['chosen']:g}" in report


def test_a_search_held_near_the_base_says_how_far_each_candidate_went(searching: dict[str, Any], tmp_path: Path) -> None:
    searching["search"]["max_kl_to_base"] = 1e-9
    searching["evaluation"]["kl_to_base"] = False
    folder = run_study(StudySettings.make(searching), tmp_path / "study")
    (found,) = read_json(folder / "search.json")["searches"]
    nearest = min(found["candidates"], key=lambda one: one["kl_to_base"])
    assert found["chosen"] == nearest["learning_rate"]
    assert "nats a token of the base" in (folder / "report" / "report.md").read_text(encoding="utf-8")


def test_decided_anew_without_a_search_nothing_of_the_old_one_is_shown(searching: dict[str, Any], tmp_path: Path) -> None:
    folder = run_study(StudySettings.make(searching), tmp_path / "study")
    assert (folder / "search.json").is_file()
    (abandoned,) = (path.name for path in folder.glob("stages/generate-dpo-*") if "search" not in path.name)
    plain = {**searching, "arms": {"base": []}, "search": None}
    run_study(StudySettings.make(plain), folder, overwrite=True)
    assert not (folder / "search.json").exists()
    assert (folder / "stages" / abandoned).is_dir(), "kept: what still fits may be used again"
    shown = read_study(folder).stages
    assert {name.split("-")[1] for name in shown} == {"judge", "base"} | set(plain["evaluation"].get("null_policies", []))
    assert set(shown) == set(read_json(folder / "arms.json")["stages"])
    assert "train dpo" not in (folder / "report" / "report.md").read_text(encoding="utf-8")


def test_every_candidate_is_planned(searching: dict[str, Any]) -> None:
    plan = plan_study(StudySettings.make(searching))
    kinds = [(row.node.kind, row.node.name) for row in plan.stages]
    assert kinds.count(("train", "dpo")) == 2
    assert kinds.count(("generate", "dpo-search")) == 2
    assert kinds.count(("generate", "dpo")) == 1
    asked = {row.node.name: row.units for row in plan.stages if row.node.kind == "generate"}
    assert (asked["dpo-search"], asked["dpo"]) == (3, 9)


def test_the_chosen_rate_is_the_trained_stage_itself(searching: dict[str, Any]) -> None:
    settings = StudySettings.make(searching)
    graph = build_graph(settings, {"dpo": 1e-2})
    (search,) = graph.searches
    arm = next(arm for arm in graph.arms if arm.name == "dpo")
    assert arm.training[-1].key == dict(search.candidates)[1e-2].training[-1].key


def test_only_dev_prompts_that_are_not_evaluated_on_serve(searching: dict[str, Any], tmp_path: Path) -> None:
    searching["search"]["prompts"] = searching["evaluation"]["prompts"]
    with pytest.raises(DataError, match="asked in the evaluation as well"):
        run_study(StudySettings.make(searching), tmp_path / "study")


def test_an_arm_that_is_not_there_is_an_error(searching: dict[str, Any]) -> None:
    searching["search"]["arms"] = ["dqo"]
    with pytest.raises(UsageError, match="dpo"):
        StudySettings.make(searching)
