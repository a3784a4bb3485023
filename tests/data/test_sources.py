"""Every format: what it makes of ordinary rows, and what it does with rows that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise.core import catalog
from equipoise.core.errors import DataError, UsageError
from equipoise.core.records import Message
from equipoise.data._read import Row
from equipoise.data.load import Loaded, load
from equipoise.data.settings import DataSettings
from equipoise.data.sources._base import source

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
IMAGE = {"role": "user", "content": [{"type": "image"}]}
SAMPLES: dict[str, dict[str, Any]] = {
    "hh_rlhf": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "messages": {"messages": TURNS},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "labelled": {"prompt": "q", "completion": "a", "label": True},
    "pku_safe_rlhf": {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0},
    "ultrafeedback_binarized": {
        "prompt": "q",
        "prompt_id": "7f",
        "chosen": TURNS,
        "rejected": [TURNS[0], {"role": "assistant", "content": "b"}],
        "messages": TURNS,
        "score_chosen": 8.5,
        "score_rejected": 4.0,
    },
    "scored_lists": {"prompt": "q", "completions": ["a", "b"], "scores": [1.0, 0.5]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "alpaca_eval": {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1.0, "generator_1": "m", "generator_2": "n"},
    "starter": {
        "id": "s1",
        "prompt": "q",
        "chosen": "a",
        "rejected": "b",
        "chosen_safe": True,
        "rejected_safe": False,
        "axis": "helpfulness",
    },
}
VARIANTS = [
    ("preference", {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "b"}]}),
    ("preference", {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "b"}]}),
    ("preference", {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"}),
    ("messages", {"prompt": "q", "completion": "a"}),
    ("messages", {"prompt": TURNS[:1], "completion": TURNS[1:]}),
    ("labelled", {"messages": TURNS, "label": False}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
]


def of(*rows: dict[str, Any], **settings: Any) -> Loaded:
    return load(DataSettings(**settings), dataset=list(rows))


def reasons(*rows: dict[str, Any], **settings: Any) -> dict[str, int]:
    """Why rows were dropped, beside one good row of the same format."""
    accounting = of(*rows, **settings).accounting
    return {reason: entry.count for reason, entry in accounting.dropped.items()}


def test_every_format_of_the_folder_is_tried_here() -> None:
    assert sorted(SAMPLES) == catalog.names("data.sources")


@pytest.mark.parametrize(("name", "row"), [*SAMPLES.items(), *VARIANTS])
def test_a_row_is_told_apart_and_read(name: str, row: dict[str, Any]) -> None:
    loaded = of(row)
    assert loaded.format == name
    record = loaded.records[0]
    assert record.prompt == (Message("user", "q"),)
    assert record.replies[0].text.strip() == ("b" if name == "pku_safe_rlhf" else "a")
    assert record.id == str(row.get("id", "memory:1"))
    # Named, the format reads the same.
    assert of(row, format=name).records == loaded.records


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_exactly_one_format_matches_each_sample(name: str) -> None:
    row = SAMPLES[name]
    fitting = [known for known in catalog.names("data.sources") if catalog.module("data.sources", known).matches(set(row), row)]
    assert fitting == [name]


def test_columns_that_fit_nothing_are_shown_with_the_nearest() -> None:
    with pytest.raises(
        DataError, match=r"no known format has these columns \(chosen, promt, rejected\).*'prompt' is missing.*Did you mean 'promt'"
    ):
        of({"promt": "q", "chosen": "a", "rejected": "b"})
    with pytest.raises(
        DataError, match=r"memory, row 1: format 'alpaca' needs columns instruction \+ output; 'output' is missing.*'outputs'"
    ):
        of({"instruction": "q", "outputs": "a"}, format="alpaca")
    with pytest.raises(DataError, match=r"these columns \(chosen, id, rejected\)\. Where the prompt ends.*a column `prompt`"):
        of({"id": "1", "chosen": "q a", "rejected": "q b"})
    with pytest.raises(DataError, match=r"these columns \(text\)\. A whole `text`.*`prompt` and `completion`"):
        of({"text": "q a"})
    with pytest.raises(UsageError, match=r"There is no sources entry named 'alpacca'. Did you mean 'alpaca'"):
        of({"instruction": "q", "output": "a"}, format="alpacca")
    with pytest.raises(UsageError, match=r"fit several formats. Say which with format="):
        source("auto", [Row("x:1", "x, line 1", SAMPLES["alpaca"] | SAMPLES["messages"])])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "empty reply"),
        ({"prompt": "q", "chosen": "a", "rejected": " \n\t "}, "empty reply"),
        ({"prompt": "q", "chosen": "a ", "rejected": "a"}, "chosen equals rejected"),
        ({"prompt": "  ", "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"chosen": "a", "rejected": "b"}, "no 'prompt'"),
        ({"prompt": "q", "chosen": "a"}, "no 'rejected'"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "no 'rejected'"),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, "'rejected' is a number, not text"),
        ({"prompt": "q", "chosen": "a\0", "rejected": "b"}, "NUL character in the text"),
        ({"prompt": "q", "chosen": "a\ud800", "rejected": "b"}, "half a surrogate pair in the text"),
        ({"prompt": TURNS, "chosen": "a", "rejected": "b"}, "the prompt does not end with the user's turn"),
        ({"prompt": [{"role": "tool", "content": "x"}], "chosen": "a", "rejected": "b"}, "a turn of 'prompt' has the role 'tool'"),
        ({"prompt": [IMAGE], "chosen": "a", "rejected": "b"}, "a turn of 'prompt' holds something other than text"),
        ({"prompt": "q", "chosen": TURNS[:1], "rejected": TURNS}, "ends with the human's turn"),
        ({"prompt": "other", "chosen": TURNS, "rejected": TURNS}, "prompts of chosen and rejected differ"),
        ({"prompt": "q", "chosen": ["a"], "rejected": ["b"]}, "a turn of 'chosen' is text, not a message"),
    ],
)  # fmt: skip
def test_preference_rows_that_cannot_be_used_are_counted(bad: dict[str, Any], reason: str) -> None:
    loaded = of(SAMPLES["preference"], bad)
    assert {name: (entry.count, entry.rows) for name, entry in loaded.accounting.dropped.items()} == {reason: (1, ["memory:2"])}
    assert (loaded.accounting.rows_in, loaded.accounting.kept) == (2, 1)


def test_implicit_prompts_are_compared_turn_by_turn() -> None:
    other = [{"role": "user", "content": "q2"}, {"role": "assistant", "content": "b"}]
    assert reasons(
        {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "b"}]}, {"chosen": TURNS, "rejected": other}
    ) == {"prompts of chosen and rejected differ": 1}


def test_no_row_left_is_an_error_with_the_reasons() -> None:
    with pytest.raises(
        DataError, match=r"no row is left; 2 of 2 rows dropped: empty reply \(1: memory:1\); chosen equals rejected \(1: x\)"
    ):
        of({"prompt": "q", "chosen": "", "rejected": "b"}, {"id": "x", "prompt": "q", "chosen": "a", "rejected": "a"})


def test_neighbouring_turns_of_one_role_are_joined_and_parts_of_text_too() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"role": "user", "content": "q"}, {"role": "user", "content": "r"}, {"role": "assistant", "content": parts}]
    record = of({"messages": turns}).records[0]
    assert record.prompt == (Message("user", "q\n\nr"),)
    assert record.replies[0].text == "ab"


def test_alpaca_puts_the_input_after_the_instruction() -> None:
    assert of({"instruction": "Sort.", "input": "3 1 2", "output": "1 2 3"}).records[0].prompt == (Message("user", "Sort.\n\n3 1 2"),)


def test_labels_are_read_from_words_and_missing_ones_counted() -> None:
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in ("True", "false", 1, 0, None, "maybe")]
    loaded = of(*rows)
    assert [record.replies[0].label for record in loaded.records] == [True, False, True, False]
    assert {reason: entry.count for reason, entry in loaded.accounting.dropped.items()} == {
        "no 'label'": 1,
        "'label' is 'maybe', not true or false": 1,
    }


def test_pku_orders_by_the_judgement_asked_for_and_keeps_the_flags() -> None:
    row = SAMPLES["pku_safe_rlhf"] | {"is_response_0_safe": True, "is_response_1_safe": False}
    better, safer = of(row).records[0], of(row, preferred_by="safer").records[0]
    assert [(reply.role, reply.text, reply.safe) for reply in better.replies] == [("chosen", "b", False), ("rejected", "a", True)]
    assert [(reply.role, reply.text, reply.safe) for reply in safer.replies] == [("chosen", "a", True), ("rejected", "b", False)]
    assert of(SAMPLES["pku_safe_rlhf"]).records[0].replies[0].safe is None
    assert reasons(row, row | {"better_response_id": 2}, row | {"better_response_id": None}) == {
        "'better_response_id' is neither 0 nor 1": 1,
        "no 'better_response_id'": 1,
    }


def test_pairs_may_carry_flags_and_scores() -> None:
    row = SAMPLES["preference"] | {"score_chosen": 2, "score_rejected": {"honesty": 0.5, "tone": None}, "rejected_safe": "false"}
    for replies in ({}, {"chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "b"}]}):
        loaded = of(row | replies, format="preference")
        assert [(reply.text, dict(reply.scores), reply.safe) for reply in loaded.records[0].replies] == [
            ("a", {"score": 2.0}, None),
            ("b", {"honesty": 0.5}, False),
        ]
    assert of(row).format == "preference"
    margin = of(SAMPLES["preference"] | {"margin": 1.5}, SAMPLES["preference"] | {"margin": None}).records
    assert [[dict(reply.scores) for reply in record.replies] for record in margin] == [[{"margin": 1.5}, {}], [{}, {}]]
    # Both flags beside a prompt are the starter's columns, whose replies may be messages as well.
    messages = SAMPLES["starter"] | {"chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "b"}]}
    loaded = of(messages)
    assert loaded.format == "starter"
    assert [(reply.text, reply.safe) for reply in loaded.records[0].replies] == [("a", True), ("b", False)]


def test_a_score_past_what_a_float_holds_is_none() -> None:
    (record,) = of(SAMPLES["preference"] | {"score_chosen": 10**400, "score_rejected": 1e999}, format="preference").records
    assert [dict(reply.scores) for reply in record.replies] == [{}, {}]


def test_ultrafeedback_keeps_scores_and_missing_is_not_zero() -> None:
    row = SAMPLES["ultrafeedback_binarized"]
    first, second = of(row, row | {"score_rejected": None}).records
    assert [dict(reply.scores) for reply in first.replies] == [{"score": 8.5}, {"score": 4.0}]
    assert [dict(reply.scores) for reply in second.replies] == [{"score": 8.5}, {}]


def test_scored_lists_keep_order_and_missing_scores() -> None:
    row = {"prompt": "q", "completions": ["a", {"text": "b", "safe": False}, "c"], "scores": [0.25, None, float("nan")]}
    replies = of(row).records[0].replies
    assert [(reply.text, dict(reply.scores), reply.safe) for reply in replies] == [
        ("a", {"score": 0.25}, None),
        ("b", {}, False),
        ("c", {}, None),
    ]
    several = of(row | {"scores": [{"honesty": 1, "tone": 2}, None, {}]}).records[0].replies
    assert [dict(reply.scores) for reply in several] == [{"honesty": 1.0, "tone": 2.0}, {}, {}]
    assert reasons(row, row | {"scores": [1.0]}, row | {"completions": []}) == {
        "'scores' are not one per completion": 1,
        "no 'completions'": 1,
    }


def test_sharegpt_reads_system_turns_labels_and_counts_other_roles() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    loaded = of(
        {"conversations": turns, "system": "be brief"},
        {"conversations": turns, "label": False},
        {"conversations": [turns[0], {"from": "observation", "value": "x"}]},
        {"conversations": turns[:1], "chosen": {"from": "gpt", "value": "a"}},
    )
    assert loaded.records[0].prompt == (Message("system", "be brief"), Message("user", "q"))
    assert loaded.records[0].replies[0].role == "gold"
    assert loaded.records[1].replies[0].label is False
    assert set(loaded.accounting.dropped) == {
        "a turn of 'conversations' has the role 'observation'",
        "only one of 'chosen' and 'rejected'",
    }


def test_alpaca_eval_keeps_what_the_judge_was_sure_of() -> None:
    row = SAMPLES["alpaca_eval"]
    # |2p - 3|: 1.0 -> 1; 1.9 -> 0.8; 1.45 -> 0.1; 1.5 -> a tie.
    rows = [row, row | {"preference": 1.9}, row | {"preference": 1.45}, row | {"preference": 1.5}, row | {"preference": 2.5}]
    loaded = of(*rows, min_confidence=0.5)
    assert [(record.replies[0].text, record.replies[0].source) for record in loaded.records] == [("a", "m"), ("b", "n")]
    assert loaded.records[1].facts["confidence"] == pytest.approx(0.8)
    assert {reason: entry.rows for reason, entry in loaded.accounting.dropped.items()} == {
        "the judge was less sure than min_confidence": ["memory:3"],
        "the judge saw a tie": ["memory:4"],
        "'preference' is not between 1 and 2": ["memory:5"],
    }


def test_starter_rows_carry_flags_and_axis() -> None:
    record = of(SAMPLES["starter"]).records[0]
    assert [(reply.role, reply.safe) for reply in record.replies] == [("chosen", True), ("rejected", False)]
    assert record.facts == {"axis": "helpfulness"}


def test_the_bundled_starter_has_its_two_configurations() -> None:
    train, judge = load(DataSettings()), load(DataSettings(dataset_config_name="judge"))
    assert (len(train.records), len(judge.records)) == (160, 80)
    assert train.accounting.dropped == {} == judge.accounting.dropped
    assert all(reply.safe is not None for record in train.records for reply in record.replies)
    with pytest.raises(UsageError, match=r"no configuration 'jugde'. Did you mean 'judge'"):
        load(DataSettings(dataset_config_name="jugde"))
    with pytest.raises(UsageError, match="has no splits"):
        load(DataSettings(dataset_split="test"))


def test_the_demos_and_the_judged_pairs_are_read_whole(shared_data: Path) -> None:
    expected = {"dpo_en_demo": ("sharegpt", 300), "kto_en_demo": ("labelled", 300), "alpaca_en_demo": ("alpaca", 999)}
    for name, (form, count) in expected.items():
        loaded = load(DataSettings(dataset_name=str(shared_data / "trl-style-demos" / f"{name}.json")))
        assert (loaded.format, len(loaded.records), loaded.accounting.dropped) == (form, count, {})
    raw = json.loads((shared_data / "trl-style-demos" / "dpo_en_demo.json").read_text(encoding="utf-8"))
    demos = load(DataSettings(dataset_name=str(shared_data / "trl-style-demos" / "dpo_en_demo.json"))).records
    assert [record.reply("chosen").text for record in demos] == [row["chosen"]["value"] for row in raw]  # type: ignore[union-attr]
    judged = load(DataSettings(dataset_name=str(shared_data / "alpaca-eval" / "annotations" / "gemma-2b-it.jsonl.gz")))
    assert (judged.accounting.rows_in, judged.accounting.kept) == (805, 783)
    assert judged.accounting.dropped["empty reply"].count == 22


def test_a_system_turn_that_says_nothing_is_left_out() -> None:
    turns = [{"role": "system", "content": " "}, *TURNS]
    loaded = load(DataSettings(), [{"messages": turns}, {"messages": [{"role": "system", "content": "s"}, *TURNS]}])
    assert [[turn.role for turn in record.prompt] for record in loaded.records] == [["user"], ["system", "user"]]


@pytest.mark.parametrize("value", [None, "", float("nan"), np.float32("nan"), "NaN"])
def test_a_flag_may_be_missing_in_many_ways(value: Any) -> None:
    loaded = load(DataSettings(), [SAMPLES["preference"] | {"chosen_safe": value, "rejected_safe": np.True_}])
    assert [reply.safe for reply in loaded.records[0].replies] == [None, True]
