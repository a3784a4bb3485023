"""Shared prompts are found between any two of policy training, judge training and test, and withhold the headline."""

from __future__ import annotations

from pathlib import Path

import pytest

from equipoise.core.errors import DataError
from equipoise.core.prints import PromptPrints
from equipoise.core.records import Message
from equipoise.evaluation.evaluate import compute
from equipoise.evaluation.independence import check
from equipoise.evaluation.settings import EvaluateSettings
from equipoise.generation._base import Prompt

from .conftest import prompt_rows, verdict_rows  # isort: skip

PROMPTS = [
    Prompt("a", (Message("system", "Be kind."), Message("user", "How do I prune an old apple tree in winter?")), "helpful"),
    Prompt("b", (Message("user", "What is the tallest mountain of the moon?"),), "helpful"),
]


def prints(path: Path, *texts: str) -> Path:
    PromptPrints.of(texts).save(path)
    return path


def test_nothing_shared(tmp_path: Path) -> None:
    found = check(PROMPTS, [prints(tmp_path / "p.npz", "apples")], prints(tmp_path / "j.npz", "pears"))
    assert (found.blocked, found.overridden, found.withheld, found.overlaps, found.unknown) == (False, False, False, (), ())
    assert set(found.counts.values()) == {0}
    assert found.warnings() == []


@pytest.mark.parametrize(
    ("policy", "judge", "between", "test_id"),
    [
        ("how do I prune an old apple tree, in winter", "pears", ["policy training", "test"], "a"),
        ("apples", "WHAT IS THE TALLEST MOUNTAIN OF THE MOON", ["judge training", "test"], "b"),
        ("something else entirely", "Something else, entirely!", ["policy training", "judge training"], "prompt 0 of judge training"),
    ],
)
def test_each_pair_blocks(tmp_path: Path, policy: str, judge: str, between: list[str], test_id: str) -> None:
    paths = [prints(tmp_path / "p.npz", policy)], prints(tmp_path / "j.npz", judge)
    found = check(PROMPTS, *paths)
    assert found.blocked
    assert found.withheld
    assert found.overlaps == ({"between": between, "kind": "exact", "similarity": 1.0, "test_id": test_id},)
    assert "1 prompt shared between " + " and ".join(between) in found.warnings()[0]
    overridden = check(PROMPTS, *paths, allow_overlap=True)
    assert overridden.blocked
    assert overridden.overridden
    assert not overridden.withheld
    assert "overridden" in overridden.warnings()[0]


def test_near_prompts_block_too(tmp_path: Path) -> None:
    near = "How do I prune an old pear tree in winter?"  # 9 common words, 11 in all
    found = check(PROMPTS, [prints(tmp_path / "p.npz", near)], None)
    assert found.overlaps[0]["kind"] == "near"
    assert found.overlaps[0]["similarity"] == pytest.approx(9 / 11, abs=1e-6)
    assert not check(PROMPTS, [prints(tmp_path / "p.npz", near)], None, near=0.9).blocked


def test_unknown_provenance_is_said_and_does_not_block() -> None:
    found = check(PROMPTS, [], None)
    assert not found.blocked
    assert len(found.unknown) == len(found.warnings()) == 2
    assert "judge was trained" in found.unknown[1]


def test_a_missing_or_damaged_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        check(PROMPTS, [tmp_path / "absent.npz"], None)
    (tmp_path / "broken.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="damaged"):
        check(PROMPTS, [], tmp_path / "broken.npz")


def test_many_overlaps_are_counted_in_full_and_listed_in_part(tmp_path: Path) -> None:
    texts = [f"question number {n} about topic {n}{n}" for n in range(300)]
    found = check(PROMPTS, [prints(tmp_path / "p.npz", *texts)], prints(tmp_path / "j.npz", *texts))
    assert found.counts["policy training and judge training"] == 300
    assert len(found.overlaps) == 200


def test_the_headline_is_withheld_the_words_are_kept_and_an_override_is_stamped(write_scores) -> None:
    rows = verdict_rows(prompt_rows(), lambda axis, n: {"reward": float(n)})
    better = verdict_rows(prompt_rows(), lambda axis, n: {"reward": n + 1.0})
    primary = [{"a": "tuned", "b": "base", "metric": "reward_helpful"}]
    source = write_scores(
        {"base": rows, "tuned": better},
        trained={"judge": ["Helpful question number 33!"], "policy": ["unrelated"]},
        baseline="base",
        primary=primary,
    )
    settings = EvaluateSettings(suite="two_axis", source=str(source), resamples=1000, flips=1000)
    withheld, _ = compute(settings)
    assert withheld["headline"] is None
    assert withheld["independence"]["blocked"]
    assert withheld["independence"]["overlaps"][0]["test_id"] == "helpful-3"
    assert withheld["comparisons"][0]["verdict"] == "real"
    assert "headline is withheld" in withheld["warnings"][0]
    given, _ = compute(settings.model_copy(update={"allow_overlap": True}))
    assert given["headline"][0]["verdict"] == "real"
    assert given["independence"]["overridden"]
    assert "was overridden" in given["warnings"][0]
