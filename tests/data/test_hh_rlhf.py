"""HH-RLHF transcripts: roles, blank lines, differing prompts, and all 1,800 real rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from equipoise.core.records import Message
from equipoise.data.load import Loaded, load
from equipoise.data.settings import DataSettings
from equipoise.data.transcripts import parse, parse_prompt, plain


def pairs(*sides: tuple[str, str]) -> Loaded:
    good = ("\n\nHuman: fine\n\nAssistant: yes", "\n\nHuman: fine\n\nAssistant: no")
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in (good, *sides)]
    return load(DataSettings(format="hh_rlhf"), dataset=rows)


def test_roles_are_parsed_and_blank_lines_belong_to_their_turn() -> None:
    text = (
        "\n\nHuman: A list?\n\n- with\n\nblank lines\n\nAssistant: One.\n\nTwo: Human: no marker\n\nHuman:ok\n\nAssistant:  Three.\n\nFour."
    )
    assert parse(text) == (
        Message("user", "A list?\n\n- with\n\nblank lines"),
        Message("assistant", "One.\n\nTwo: Human: no marker"),
        Message("user", "ok"),
        Message("assistant", "Three.\n\nFour."),
    )
    assert parse("Just text.\n\nHuman: hi") is None
    assert parse("no marker at all") is None


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_lines_may_end_as_elsewhere(end: str) -> None:
    text = "\n\nHuman: A list?\n- one\n\nAssistant: yo\n\nyes\n\nHuman: more\n\nAssistant:"
    assert parse_prompt(text.replace("\n", end)) == parse_prompt(text)
    assert len(parse_prompt(text)) == 3
    loaded = pairs(("Human: q\n\nAssistant: a".replace("\n", end), "Human: q\n\nAssistant: b"))
    assert [reply.text for reply in loaded.records[1].replies] == ["a", "b"]
    # A prompt that is no transcript stays as it is.
    assert parse_prompt("a\r\nb") == (Message("user", "a\r\nb"),)


def test_replies_with_a_common_beginning_are_not_cut() -> None:
    loaded = pairs(("\n\nHuman: q\n\nAssistant: I think\n\nso.", "\n\nHuman: q\n\nAssistant: I think\n\nnot."))
    assert [reply.text for reply in loaded.records[1].replies] == ["I think\n\nso.", "I think\n\nnot."]
    assert loaded.records[1].prompt == (Message("user", "q"),)


Q = "\n\nHuman: q\n\nAssistant: "
DIFFER = "prompts of chosen and rejected differ"


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (Q + "a", "\n\nHuman: r\n\nAssistant: b", DIFFER),
        (Q + "a\n\nHuman: r\n\nAssistant: c", Q + "b", DIFFER),
        (Q + "a\n\nHuman: more", Q + "b", "ends with the human's turn"),
        (Q, Q + "b", "empty reply"),
        (Q + "a", Q + " a ", "chosen equals rejected"),
        (Q + "x\n\nAssistant: a", Q + "x\n\nAssistant: b", "the prompt does not end with the user's turn"),
        ("\n\nHuman: \n\nAssistant: a", "\n\nHuman: \n\nAssistant: b", "empty prompt"),
        (Q + "\n\nHuman: r\n\nAssistant: a", Q + "\n\nHuman: r\n\nAssistant: b", "empty turn in the prompt"),
        ("text", Q + "b", "'chosen' does not begin with 'Human:' or 'Assistant:'"),
    ],
)
def test_rows_that_cannot_be_used_are_counted(chosen: str, rejected: str, reason: str) -> None:
    loaded = pairs((chosen, rejected))
    assert {name: entry.rows for name, entry in loaded.accounting.dropped.items()} == {reason: ["memory:2"]}


def test_a_prompt_with_a_reply_cue_and_one_without() -> None:
    turns = (Message("user", "q"), Message("assistant", "a"), Message("user", "r"))
    assert parse_prompt("\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:") == turns
    assert parse_prompt("Human: q\n\nAssistant: a\n\nHuman: r") == turns
    assert plain(turns) == "\n\nHuman: q\n\nAssistant: a\n\nHuman: r"
    assert parse_prompt("What is Human: here?") == (Message("user", "What is Human: here?"),)


def test_all_1800_real_rows(shared_data: Path) -> None:
    path = shared_data / "hh-harmless-base" / "pairs.jsonl.gz"
    loaded = load(DataSettings(dataset_name=str(path)))
    assert (loaded.format, loaded.accounting.rows_in, len(loaded.records)) == ("hh_rlhf", 1800, 1794)
    # Found by reading the file by hand: four empty last turns, two rows whose conversations part before the last turn.
    assert {reason: entry.rows for reason, entry in loaded.accounting.dropped.items()} == {
        "empty reply": ["pairs:87", "pairs:517", "pairs:926", "pairs:1104"],
        "prompts of chosen and rejected differ": ["pairs:1255", "pairs:1689"],
    }
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        raw = {f"pairs:{number}": json.loads(line) for number, line in enumerate(stream, 1)}
    joined = {"pairs:668", "pairs:764", "pairs:1320"}  # two neighbouring turns of the assistant, read as one
    for record in loaded.records:
        for reply in record.replies:
            # Nothing is lost: the turns, written out again, are the row, but for spaces around turns.
            whole, row = plain((*record.prompt, Message("assistant", reply.text))), raw[record.id][reply.role]
            assert ("".join(whole.split()) == "".join(row.split())) is (record.id not in joined)
        assert record.prompt[-1].role == "user"
        assert all(one.role != other.role for one, other in zip(record.prompt, record.prompt[1:], strict=False))


def test_the_study_s_prompts_are_kept_apart(shared_data: Path) -> None:
    path = shared_data / "hh-harmless-base" / "pairs.jsonl.gz"
    study = shared_data / "opt350m-study" / "harmful_prompts.json"
    loaded = load(DataSettings(dataset_name=str(path), exclude_prompts=(str(study),)))
    excluded = {reason: entry.count for reason, entry in loaded.accounting.dropped.items() if reason.startswith("prompt stands")}
    assert 40 <= sum(excluded.values()) <= 60
    first = [parse_prompt(text)[0].content for text in json.loads(study.read_text(encoding="utf-8"))]
    assert not {record.first_turn for record in loaded.records} & set(first)
