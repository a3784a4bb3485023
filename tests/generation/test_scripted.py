"""Null policies and scripted replies."""

from __future__ import annotations

import pytest

from equipoise.core.errors import DataError, UsageError
from equipoise.core.files import write_jsonl
from equipoise.core.records import Message
from equipoise.generation._base import Prompt, Sampling
from equipoise.generation.scripted import REFUSAL, Scripted, ScriptedSettings, always_refuse, echo, empty, random_reply

TALK = Prompt("talk", (Message("user", "First?"), Message("assistant", "Yes."), Message("user", "And then?")))
LONE = Prompt("lone", (Message("system", "Be kind."),))


def texts(generator, prompts=(TALK, LONE), **sampling):
    return [completion.text for completion in generator(prompts, Sampling(**sampling))]


def test_null_policies_say_what_they_are_named_for():
    assert texts(always_refuse()) == [REFUSAL, REFUSAL]
    assert texts(echo()) == ["And then?", ""]
    assert texts(empty()) == ["", ""]


def test_a_random_reply_is_drawn_by_seed_and_prompt():
    pool = [f"reply {number}" for number in range(100)]
    prompts = [Prompt(str(number), TALK.messages) for number in range(50)]
    drawn = texts(random_reply(pool), prompts, seed=3)
    assert set(drawn) <= set(pool)
    assert len(set(drawn)) > 20
    assert texts(random_reply(pool), prompts[::-1], seed=3) == drawn[::-1]
    assert texts(random_reply(pool), prompts, seed=4) != drawn
    with pytest.raises(DataError, match="at least one text"):
        random_reply([])


def test_a_script_answers_by_id_or_by_function():
    assert texts(Scripted({"talk": "a", "lone": "b"})) == ["a", "b"]
    assert texts(Scripted(lambda prompt, seed: f"{prompt.id} {seed}"), seed=5) == ["talk 5", "lone 5"]
    with pytest.raises(DataError, match="'lone'"):
        texts(Scripted({"talk": "a"}))
    with pytest.raises(DataError, match="'talk' stands twice"):
        texts(echo(), (TALK, TALK))


def test_settings_read_replies_from_a_file(tmp_path):
    path = tmp_path / "replies.jsonl"
    write_jsonl(path, [{"id": "lone", "text": "b"}, {"id": "talk", "text": "a"}])
    assert texts(ScriptedSettings(policy="file", replies_file=str(path)).build()) == ["a", "b"]
    assert set(texts(ScriptedSettings(policy="random_reply", replies_file=str(path)).build())) <= {"a", "b"}
    write_jsonl(path, ["only"])
    assert texts(ScriptedSettings(policy="random_reply", replies_file=str(path)).build()) == ["only", "only"]
    with pytest.raises(DataError, match="needs `id`"):
        ScriptedSettings(policy="file", replies_file=str(path)).build()


def test_settings_want_a_file_exactly_where_one_is_read():
    with pytest.raises(UsageError, match="random_reply needs a replies_file"):
        ScriptedSettings.make({"policy": "random_reply"})
    with pytest.raises(UsageError, match="echo takes no replies_file"):
        ScriptedSettings.make({"policy": "echo", "replies_file": "x"})
    with pytest.raises(DataError, match="does not exist"):
        ScriptedSettings(policy="file", replies_file="nowhere.jsonl").inputs()
