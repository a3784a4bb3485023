"""Parts, exclusions, limits, and an accounting that always adds up."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.core.errors import DataError, UsageError
from equipoise.core.prints import PromptPrints
from equipoise.core.records import Message
from equipoise.data.accounting import Accounting
from equipoise.data.load import load, records_fingerprint, source_fingerprint
from equipoise.data.mixture import cluster, part_of, prompt_texts
from equipoise.data.settings import DataSettings


def row(prompt: Any, name: str | None = None) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": "yes", "rejected": "no"} | ({} if name is None else {"id": name})


def conversation(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user" if at % 2 == 0 else "assistant", "content": content} for at, content in enumerate(contents)]


MANY = [row(f"question {number // 2}") for number in range(600)]


def test_parts_are_disjoint_complete_and_keep_clusters_together() -> None:
    loaded = {part: load(DataSettings(part=part), dataset=MANY) for part in ("train", "dev", "test")}  # type: ignore[arg-type]
    ids = [{record.id for record in part.records} for part in loaded.values()]
    assert sum(map(len, ids)) == 600 == len(set.union(*ids))
    turns = [{record.first_turn for record in part.records} for part in loaded.values()]
    assert len(set.union(*turns)) == sum(map(len, turns))
    # 300 clusters, shares 0.8, 0.1, 0.1: within four standard deviations of the binomial (6.9 and 5.2 clusters).
    assert [len(part) // 2 for part in ids] == [pytest.approx(240, abs=28), pytest.approx(30, abs=21), pytest.approx(30, abs=21)]
    dev = loaded["dev"].accounting
    assert {reason: entry.count for reason, entry in dev.dropped.items()} == {
        "in another part (train)": len(ids[0]),
        "in another part (test)": len(ids[2]),
    }


def test_a_part_does_not_depend_on_what_else_is_there_but_on_the_seed() -> None:
    few = load(DataSettings(part="dev"), dataset=MANY[:100]).records
    assert {record.first_turn for record in few} <= {record.first_turn for record in load(DataSettings(part="dev"), dataset=MANY).records}
    other = load(DataSettings(part="dev", split_seed=1), dataset=MANY[:100]).records
    assert [record.id for record in few] != [record.id for record in other]
    assert part_of("any", (0.0, 0.0, 1.0)) == "test"
    assert part_of("any", (1.0, 0.0, 0.0)) == "train"
    with pytest.raises(UsageError, match="sum to 1"):
        DataSettings(split_fractions=(0.8, 0.1, 0.2))


def test_a_cluster_is_a_first_turn_without_case_spacing_and_punctuation_at_its_ends() -> None:
    assert cluster(" How  do I\nboil eggs?? ") == cluster("how do i boil eggs") == "how do i boil eggs"
    assert cluster("What is C++?") != cluster("What is C#?")
    assert cluster("???") == "???"
    assert prompt_texts([Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c")]) == (
        "a",
        "a\n\nb\n\nc",
    )


def test_excluded_prompts_exact_near_and_by_first_turn(tmp_path: Path) -> None:
    long = "please explain in plain words how a suspension bridge carries the weight of heavy traffic over a wide river"
    others = [{"prompt": "How do I Boil eggs"}, {"prompt": long}, {"prompt": conversation("Tell me a joke.", "No.", "Why not?")}]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(other) + "\n" for other in others))
    rows = [
        row("how do I boil eggs?", "exact"),
        row(f"{long} safely", "near"),
        row(conversation("tell me a joke", "Knock knock.", "Who is there?"), "first turn"),
        row("something else entirely", "kept"),
    ]
    loaded = load(DataSettings(exclude_prompts=(str(path),)), dataset=rows)
    assert [record.id for record in loaded.records] == ["kept"]
    assert {reason: entry.rows for reason, entry in loaded.accounting.dropped.items()} == {
        f"prompt stands in {path}": ["exact", "first turn"],
        f"prompt stands nearly in {path}": ["near"],
    }
    # The same from fingerprints alone, and from plain texts.
    prints = tmp_path / "trained_on.npz"
    PromptPrints.of(["how do I boil eggs"]).save(prints)
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(["Human: Tell me a joke."]))
    loaded = load(DataSettings(exclude_prompts=(str(prints), str(texts))), dataset=rows)
    assert [record.id for record in loaded.records] == ["near", "kept"]


def test_the_starter_s_own_prompts_can_be_excluded() -> None:
    train = load(DataSettings()).records
    rows = [row(train[0].first_turn, "train"), row("a prompt of nobody else, surely", "kept")]
    assert [record.id for record in load(DataSettings(exclude_prompts=("starter:train",)), dataset=rows).records] == ["kept"]
    assert len(load(DataSettings(exclude_prompts=("starter:judge", "starter"))).records) == 160


def test_limits_and_doubled_ids() -> None:
    loaded = load(DataSettings(max_rows=2), dataset=[row("a", "x"), row("b", "x"), row("c", "x"), row("", "y")])
    assert [record.id for record in loaded.records] == ["x", "x#2"]
    assert loaded.accounting.as_json()["dropped"] == {
        "empty prompt": {"count": 1, "rows": ["y"]},
        "beyond max_rows": {"count": 1, "rows": ["x#3"]},
    }
    assert loaded.accounting.notes == {"ids that stood twice were numbered": 2}


def test_an_empty_part_is_no_error_but_no_usable_row_is() -> None:
    settings = DataSettings(part="test", split_fractions=(1.0, 0.0, 0.0))
    assert load(settings, dataset=[row("a")]).records == []
    with pytest.raises(DataError, match="no row is left; 1 of 1 rows dropped: empty prompt"):
        load(settings, dataset=[row("")])


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    first, same = load(DataSettings(), dataset=[row("a")]), load(DataSettings(), dataset=[row("a")])
    other = load(DataSettings(), dataset=[row("a") | {"rejected": "No"}])
    assert first.fingerprint == same.fingerprint == records_fingerprint(first.records) != other.fingerprint
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row("a")))
    before = source_fingerprint(DataSettings(dataset_name=str(path), exclude_prompts=("starter",)))
    assert set(before) == {"data", "excluded starter"}
    path.write_text(json.dumps(row("b")))
    assert source_fingerprint(DataSettings(dataset_name=str(path)))["data"] != before["data"]
    assert set(source_fingerprint(DataSettings())) == {"train_helpfulness.jsonl", "train_harmlessness.jsonl"}
    assert source_fingerprint(DataSettings(), [row("a")]) != source_fingerprint(DataSettings(), [row("b")])


def test_unknown_settings_name_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Unknown setting 'dataset_nam'. Did you mean 'dataset_name'"):
        DataSettings.make({"dataset_nam": "x"})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", " ", ""]), st.sampled_from(["yes", "no", "", "\0"])), max_size=12), st.integers(1, 4))
def test_the_accounting_always_adds_up(values: list[tuple[str, str]], limit: int) -> None:
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": "no"} for prompt, chosen in values]
    good = {"prompt": "good", "chosen": "yes", "rejected": "no"}
    loaded = load(DataSettings(max_rows=limit), dataset=[good, *rows])
    usable = 1 + sum(bool(prompt.strip()) and chosen == "yes" for prompt, chosen in values)
    assert loaded.accounting.rows_in == len(rows) + 1
    assert loaded.accounting.kept == len(loaded.records) == min(usable, limit)
    assert loaded.accounting.kept + loaded.accounting.dropped_total == loaded.accounting.rows_in
    assert Accounting.from_json(json.loads(json.dumps(loaded.accounting.as_json()))) == loaded.accounting


def test_an_accounting_that_does_not_add_up_is_a_bug() -> None:
    accounting = Accounting(rows_in=2, kept=1)
    with pytest.raises(AssertionError, match="2 rows in, 1 kept, 0 dropped"):
        accounting.as_json()
    for number in range(8):
        accounting.drop("why", f"r{number}")
    assert (accounting.dropped["why"].count, accounting.dropped["why"].rows) == (8, ["r0", "r1", "r2", "r3", "r4"])


def test_values_that_json_does_not_know_count_in_the_fingerprint() -> None:
    class Picture:
        pass

    def print_of(value: Any) -> str:
        return source_fingerprint(DataSettings(), [row("a") | {"extra": [value]}])["data"]

    first, other = datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 1, 2, tzinfo=UTC)
    assert print_of(first) == print_of(datetime(2024, 1, 1, tzinfo=UTC)) != print_of(other)
    assert print_of(b"xx") == print_of(b"xx") != print_of(b"xy")
    assert print_of(np.datetime64("2024-01-01", "s")) != print_of(np.datetime64("2024-01-02", "s"))
    assert print_of(Picture()) == print_of(Picture()), "an address is no content"
    assert len(load(DataSettings(), [row("a") | {"extra": first}]).records) == 1
