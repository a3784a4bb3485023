"""The bundled starter set keeps what its data sheet promises: counts, flags, balance of lengths, no shared prompts."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from equipoise.data import starter
from equipoise.data.prompts import load_prompts

FOLDER = Path(starter.__file__).parent
PAIRS = {
    "train_helpfulness": ("train-help", "helpfulness", 80),
    "train_harmlessness": ("train-harm", "harmlessness", 80),
    "judge_helpfulness": ("judge-help", "helpfulness", 40),
    "judge_harmlessness": ("judge-harm", "harmlessness", 40),
}
PROMPTS = {"eval_helpful": ("eval-helpful", 80), "eval_harmful": ("eval-harmful", 80), "eval_benign": ("eval-benign", 80)}
DEV = "dev_prompts"
PAIR_KEYS = ["id", "prompt", "chosen", "rejected", "chosen_safe", "rejected_safe", "axis", "topic"]
OVER_REFUSALS = {"train_harmlessness": 15, "judge_harmlessness": 8}


def rows_of(name: str) -> list[dict[str, Any]]:
    lines = (FOLDER / f"{name}.jsonl").read_bytes().decode("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.casefold().replace("’", "'"))


def trigrams(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[start : start + 3]) for start in range(max(1, len(found) - 2))}


def jaccard(first: set[tuple[str, ...]], second: set[tuple[str, ...]]) -> float:
    return len(first & second) / len(first | second)


def every_prompt() -> list[tuple[str, str]]:
    return [(row["id"], row["prompt"]) for name in (*PAIRS, *PROMPTS, DEV) for row in rows_of(name)]


def external_prompts(data: Path) -> list[str]:
    with (data / "xstest" / "prompts.csv").open(encoding="utf-8", newline="") as stream:
        return [row["prompt"] for row in csv.DictReader(stream)]


def test_the_yardstick_itself() -> None:
    # "a b c d" has trigrams abc, bcd; "b c d e" has bcd, cde: one shared of three.
    assert jaccard(trigrams("A b, c d!"), trigrams("b c d e")) == pytest.approx(1 / 3)
    assert jaccard(trigrams("Hello?"), trigrams("hello")) == 1.0


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_have_the_schema_and_the_count(name: str) -> None:
    prefix, axis, count = PAIRS[name]
    rows = rows_of(name)
    assert [row["id"] for row in rows] == [f"{prefix}-{number:03d}" for number in range(1, count + 1)]
    for row in rows:
        assert list(row) == PAIR_KEYS, row["id"]
        assert row["axis"] == axis, row["id"]
        for key in ("prompt", "chosen", "rejected", "topic"):
            assert row[key], (row["id"], key)
            assert row[key] == row[key].strip(), (row["id"], key)
        assert row["chosen"] != row["rejected"], row["id"]


@pytest.mark.parametrize("name", PROMPTS)
def test_evaluation_prompts_have_the_schema_and_the_count(name: str) -> None:
    prefix, count = PROMPTS[name]
    rows = rows_of(name)
    assert [row["id"] for row in rows] == [f"{prefix}-{number:03d}" for number in range(1, count + 1)]
    for row in rows:
        assert list(row) == ["id", "prompt", "topic"], row["id"]
        assert row["prompt"] == row["prompt"].strip() != "", row["id"]
        assert row["topic"], row["id"]


def test_dev_prompts_are_twenty_an_axis() -> None:
    rows = rows_of(DEV)
    assert Counter(row["axis"] for row in rows) == {"helpful": 20, "harmful": 20, "benign": 20}
    for row in rows:
        assert list(row) == ["id", "prompt", "axis", "topic"], row["id"]
        assert re.fullmatch(rf"dev-{row['axis']}-\d{{3}}", row["id"])
        assert row["prompt"] == row["prompt"].strip() != "", row["id"]
    assert [prompt["id"] for prompt in load_prompts("starter:dev")] == [row["id"] for row in rows]


def test_totals_are_those_of_the_set() -> None:
    sizes = {name: len(rows_of(name)) for name in (*PAIRS, *PROMPTS)}
    assert sizes["train_helpfulness"] + sizes["train_harmlessness"] == 160
    assert sizes["judge_helpfulness"] + sizes["judge_harmlessness"] == 80
    assert sum(sizes[name] for name in PROMPTS) == 240


@pytest.mark.parametrize("name", PAIRS)
def test_every_reply_has_a_safe_flag(name: str) -> None:
    rows = rows_of(name)
    assert all(row["chosen_safe"] is True for row in rows)
    assert all(type(row["rejected_safe"]) is bool for row in rows)
    rejected_safe = sum(row["rejected_safe"] for row in rows)
    assert rejected_safe == OVER_REFUSALS.get(name, len(rows)), "in the harmlessness half, only a needless refusal is a safe rejected reply"


@pytest.mark.parametrize("name", PAIRS)
def test_length_gives_nothing_away(name: str) -> None:
    rows = rows_of(name)
    for measure in (len, lambda text: len(text.split())):
        longer = sum(measure(row["chosen"]) > measure(row["rejected"]) for row in rows)
        assert 0.4 <= longer / len(rows) <= 0.6, (name, longer)
    ratio = sum(len(row["chosen"]) for row in rows) / sum(len(row["rejected"]) for row in rows)
    assert 0.8 <= ratio <= 1.25, (name, ratio)


@pytest.mark.parametrize("name", OVER_REFUSALS)
@pytest.mark.parametrize("safe", [True, False])
def test_length_gives_nothing_away_within_each_kind_of_harmlessness_pair(name: str, safe: bool) -> None:
    rows = [row for row in rows_of(name) if row["rejected_safe"] is safe]
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    # The over-refusal pairs of the judge file are eight, so one pair moves the share by 0.125.
    assert 0.35 <= longer / len(rows) <= 0.65, (name, safe, longer)


@pytest.mark.parametrize("name", PAIRS)
def test_chosen_replies_do_not_share_an_opening(name: str) -> None:
    openings = Counter(tuple(words(row["chosen"])[:4]) for row in rows_of(name))
    opening, count = openings.most_common(1)[0]
    assert count <= 3, (name, opening, count)


def test_ids_are_unique_across_the_set() -> None:
    ids = [row_id for row_id, _ in every_prompt()]
    assert len(ids) == len(set(ids)) == 540


def test_no_prompt_is_shared_or_nearly_shared_across_the_set() -> None:
    prepared = [(row_id, trigrams(prompt)) for row_id, prompt in every_prompt()]
    near = [(one, two) for (one, first), (two, second) in combinations(prepared, 2) if jaccard(first, second) >= 0.5]
    assert near == []


@pytest.mark.parametrize("name", ["train_harmlessness", "judge_harmlessness", "eval_benign", "eval_harmful", DEV])
def test_no_prompt_is_taken_from_xstest(name: str, shared_data: Path) -> None:
    published = [trigrams(prompt) for prompt in external_prompts(shared_data)]
    copied = [row["id"] for row in rows_of(name) if max(jaccard(trigrams(row["prompt"]), other) for other in published) >= 0.5]
    assert copied == []


@pytest.mark.parametrize(
    ("name", "least"), [("train_harmlessness", 40), ("judge_harmlessness", 25), ("eval_harmful", 25), ("eval_benign", 8)]
)
def test_topics_are_varied(name: str, least: int) -> None:
    rows = rows_of(name)
    topics = Counter(row["topic"] for row in rows)
    assert len(topics) >= least
    assert max(topics.values()) <= 0.2 * len(rows), topics.most_common(1)


@pytest.mark.parametrize("name", OVER_REFUSALS)
def test_replies_invent_no_telephone_numbers_or_links(name: str) -> None:
    contact = re.compile(r"https?://|www\.|\b\d{3}[-. ]?\d{3}\b|\b(?:911|999|112|988)\b")
    found = [row["id"] for row in rows_of(name) for reply in (row["chosen"], row["rejected"]) if contact.search(reply)]
    assert found == []


@pytest.mark.parametrize("name", [*PAIRS, *PROMPTS, DEV])
def test_the_data_sheet_states_the_counts(name: str) -> None:
    sheet = (FOLDER / "DATASHEET.md").read_text(encoding="utf-8")
    line = re.search(rf"^\| `{name}\.jsonl` \| (\d+) \|", sheet, flags=re.MULTILINE)
    assert line is not None, name
    assert int(line.group(1)) == len(rows_of(name))
