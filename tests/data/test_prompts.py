"""Evaluation prompts: bundled, from files, and what is wrong with them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from equipoise.core.errors import DataError
from equipoise.data.prompts import load_prompts, other_prompts, save


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_bundled_prompts_are_eighty_of_each_axis() -> None:
    prompts = load_prompts()
    assert Counter(prompt["axis"] for prompt in prompts) == {"helpful": 80, "harmful": 80, "benign": 80}
    assert len({prompt["id"] for prompt in prompts}) == 240
    assert all(prompt["prompt"][-1]["role"] == "user" and prompt["topic"] for prompt in prompts)
    assert Counter(prompt["axis"] for prompt in load_prompts(limit=3)) == {"helpful": 3, "harmful": 3, "benign": 3}
    assert load_prompts(limit=3)[0] == prompts[0]


def test_prompts_come_back_as_they_were_saved(tmp_path: Path) -> None:
    prompts = load_prompts(limit=2)
    assert save(tmp_path / "prompts.jsonl", prompts) == 6
    assert load_prompts(str(tmp_path / "prompts.jsonl")) == prompts


def test_texts_conversations_and_transcripts(tmp_path: Path) -> None:
    name = write(
        tmp_path / "p.jsonl",
        {"prompt": "hi", "axis": "helpful"},
        {"id": 7, "prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "axis": "harmful", "topic": "t"},
    )
    assert load_prompts(name) == [
        {"id": "p:1", "prompt": [{"role": "user", "content": "hi"}], "axis": "helpful", "topic": ""},
        {
            "id": "7",
            "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
            "axis": "harmful",
            "topic": "t",
        },
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "hi", "axis": "helpfull"}],
            r"p\.jsonl, line 1: axis 'helpfull' is none of helpful, harmful, benign. Did you mean 'helpful'",
        ),
        ([{"prompt": "hi"}], r"line 1: axis None is none of"),
        ([{"axis": "helpful", "text": "hi"}], r"line 1: no 'prompt' \(columns: axis, text\)"),
        ([{"prompt": " ", "axis": "helpful"}], r"line 1: the prompt does not end with a user's turn that says something"),
        ([{"prompt": "a", "axis": "benign", "id": 1}, {"prompt": "b", "axis": "benign", "id": "1"}], r"the prompt id '1' stands twice"),
        ([], r"holds no prompts"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_prompts(write(tmp_path / "p.jsonl", *rows))


def test_the_prompts_of_other_sources(tmp_path: Path, shared_data: Path) -> None:
    assert len(other_prompts("starter")) == 240
    assert len(other_prompts(str(shared_data / "xstest" / "prompts.csv"))) == 450
    assert len(other_prompts(str(shared_data / "trl-style-demos" / "alpaca_en_demo.json"))) == 999
    # 50 texts, of which those with several turns give their first turn too.
    study = shared_data / "opt350m-study" / "harmful_prompts.json"
    several = sum("\n\nAssistant:" in text for text in json.loads(study.read_text(encoding="utf-8")))
    assert len(other_prompts(str(study))) == 50 + several
    with pytest.raises(DataError, match="holds no rows"):
        other_prompts(write(tmp_path / "empty.jsonl"))
