"""Replies out to a scorer, its verdicts back as scores and safety flags."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from equipoise.core.errors import DataError, UsageError
from equipoise.core.files import write_jsonl
from equipoise.data._encode import Encoder
from equipoise.data.load import load, source_fingerprint
from equipoise.data.settings import DataSettings, TokeniseSettings
from equipoise.data.verdicts import UNJUDGED, completions

ROWS = [
    {"id": "p", "prompt": "w1", "response_0": "w2 w3", "response_1": "w4", "better_response_id": 1, "safer_response_id": 0},
    {"id": "q", "prompt": "w5", "response_0": "w6", "response_1": "w7", "better_response_id": 0, "safer_response_id": 0},
]


def verdicts(path: Path, values: dict[str, float | None]) -> str:
    """A file of verdicts on the replies of ROWS by their text, signed `cost`."""
    lines = completions(load(DataSettings(), dataset=ROWS).records)
    write_jsonl(path, [{"id": row["id"], "by": "cost", "value": values[row["text"]]} for row in lines if row["text"] in values])
    return str(path)


def told(**settings: Any) -> dict[str, tuple[str, dict[str, float], bool | None]]:
    """Text → role, scores and flag of every reply."""
    records = load(DataSettings(**settings), dataset=ROWS).records
    return {reply.text: (reply.role, dict(reply.scores), reply.safe) for record in records for reply in record.replies}


def test_every_different_reply_is_a_completion(word_tokenizer: Callable[..., Any]) -> None:
    rows = [{"prompt": "w1", "completions": ["w2", "w3", "w2"]}]
    records = load(DataSettings(), dataset=rows).records
    plain = list(completions(records))
    assert [(row["prompt"], row["text"], row["token_ids"]) for row in plain] == [
        ([{"role": "user", "content": "w1"}], "w2", []),
        ([{"role": "user", "content": "w1"}], "w3", []),
    ]
    assert len({row["id"] for row in plain}) == 2
    tokenizer = word_tokenizer()
    encoded = list(completions(records, Encoder(tokenizer, TokeniseSettings())))
    assert [row["token_ids"] for row in encoded] == [tokenizer.convert_tokens_to_ids([word, "<|end|>"]) for word in ("w2", "w3")]


def test_verdicts_are_scores_whichever_way_the_pairs_are_ordered(tmp_path: Path) -> None:
    path = verdicts(tmp_path / "verdicts.jsonl", {"w2 w3": -1.5, "w4": 2.0, "w6": None})
    assert told(verdicts=[path]) == {
        "w4": ("chosen", {"cost": 2.0}, None),
        "w2 w3": ("rejected", {"cost": -1.5}, None),
        "w6": ("chosen", {}, None),
        "w7": ("rejected", {}, None),
    }
    assert told(verdicts=[path], preferred_by="safer")["w2 w3"] == ("chosen", {"cost": -1.5}, None)
    # One verdict says nothing, one reply has none.
    assert load(DataSettings(verdicts=(path,)), dataset=ROWS).accounting.notes == {UNJUDGED: 2}
    assert "verdicts 0" in source_fingerprint(DataSettings(verdicts=(path,)), dataset=ROWS)


@pytest.mark.parametrize(
    ("rule", "safe"),
    [("cost < 0", [True, False]), ("cost<=2", [True, True]), ("cost >= 2e0", [False, True]), ("other > 0", [None, None])],
)
def test_a_rule_makes_flags_of_scores(tmp_path: Path, rule: str, safe: list[bool | None]) -> None:
    path = verdicts(tmp_path / "verdicts.jsonl", {"w2 w3": -1.5, "w4": 2.0})
    found = told(verdicts=[path], safe_when=rule)
    assert [found[text][2] for text in ("w2 w3", "w4")] == safe
    assert found["w7"][2] is None, "no verdict is no flag"
    assert told(verdicts=[path], safe_when=rule, assume_safe=True)["w7"][2] is True


def test_flags_of_the_source_stay_where_there_is_no_score() -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "chosen_safe": False, "rejected_safe": None, "score_rejected": 0.2}]
    replies = load(DataSettings(safe_when="score > 0.5", assume_safe=True), dataset=rows).records[0].replies
    assert [reply.safe for reply in replies] == [False, False]


def test_a_rule_that_cannot_be_read_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    for rule in ("cost", "cost = 0", "< 0", "cost < zero"):
        with pytest.raises(UsageError, match="safe_when"):
            DataSettings(safe_when=rule)
    with pytest.raises(DataError, match=r"nothing\.jsonl does not exist"):
        told(verdicts=[str(tmp_path / "nothing.jsonl")])


@pytest.mark.parametrize(
    "row",
    [[1], "text", {"id": "p", "by": "cost"}, {"id": "p", "value": 1}, {"by": "cost", "value": 1}, {"id": "p", "by": "c", "value": "?"}],
)
def test_a_row_that_is_no_verdict_is_named(tmp_path: Path, row: Any) -> None:
    write_jsonl(tmp_path / "bad.jsonl", [{"id": "p", "by": "cost", "value": None}, row])
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: Not a verdict: .*Each line needs `id`, `by` and `value`"):
        told(verdicts=[str(tmp_path / "bad.jsonl")])
    with pytest.raises(DataError, match=r"nothing\.jsonl does not exist"):
        source_fingerprint(DataSettings(verdicts=(str(tmp_path / "nothing.jsonl"),)), dataset=ROWS)


def test_from_a_data_file_through_a_scorer_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from equipoise.cli.main import main

    source = tmp_path / "pairs.jsonl"
    write_jsonl(source, ROWS)
    assert main(["data", "replies", str(source), "-o", str(tmp_path / "replies.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["replies"] == 4
    command = ["score", "--set", f"completions={tmp_path / 'replies.jsonl'}", "--set", "scorers=[refusal]"]
    assert main([*command, "--set", f"output_dir={tmp_path / 'scored'}"]) == 0
    loaded = load(DataSettings(dataset_name=str(source), verdicts=(str(tmp_path / "scored" / "verdicts.jsonl"),), safe_when="refusal < 1"))
    assert UNJUDGED not in loaded.accounting.notes
    assert all(reply.scores == {"refusal": 0.0} and reply.safe for record in loaded.records for reply in record.replies)
