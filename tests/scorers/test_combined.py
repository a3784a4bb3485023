"""Ensembles and pairwise judges, with scripted members."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from equipoise.core.errors import DataError, UsageError
from equipoise.core.files import write_jsonl
from equipoise.generation._base import Sampling
from equipoise.generation.scripted import Scripted
from equipoise.scorers._base import Scorer, Verdict
from equipoise.scorers.ensemble import Ensemble, EnsembleSettings
from equipoise.scorers.judge import AgainstBaseline, JudgeSettings, PairJudge


class Fixed(Scorer):
    """Gives these values, in order."""

    def __init__(self, name, *values):
        self.name, self.values = name, values

    def __call__(self, completions):
        return [
            Verdict(item.id, self.name, value, "" if value is not None else "too long")
            for item, value in zip(completions, self.values, strict=True)
        ]


def test_an_ensemble_is_the_mean_or_the_least_and_silent_where_a_member_is(completions):
    members = [Fixed("a", 1.0, 2.0, None), Fixed("b", 4.0, -2.0, 5.0)]
    mean, least = Ensemble(members)(completions), Ensemble(members, "min", name="worst")(completions)
    assert [verdict.value for verdict in mean] == [2.5, 0.0, None]
    assert [verdict.value for verdict in least] == [1.0, -2.0, None]
    assert mean[2].reason == "a: too long"
    assert (mean[0].by, least[0].by) == ("ensemble", "worst")


def test_an_ensemble_is_built_from_settings(completions):
    settings = EnsembleSettings.make({"members": ["refusal", "length"]})
    assert [verdict.value for verdict in settings.build()(completions)] == [3.5, 1.5, 3.5]
    with pytest.raises(UsageError, match="members"):
        EnsembleSettings.make({"members": ["length"]})


def shown(prompt):
    """The two replies a judge was shown, first and second."""
    found = re.search(r"\[Reply A\]\n(.*)\n\n\[Reply B\]\n(.*)\n\nAnswer", prompt.messages[0].content, re.DOTALL)
    return found.group(1), found.group(2)


def judged(answer, ours, theirs):
    return PairJudge(Scripted(lambda prompt, seed: answer(*shown(prompt))), Sampling())(ours, theirs)


@pytest.fixture
def others(completions):
    return [replace(completion, text="{first} other") for completion in completions]


def test_a_judge_is_asked_in_both_orders(completions, others):
    def prefers_ours(first, second):
        return "I say [[A]]" if "other" in second else "I say [[B]]"

    assert [verdict.value for verdict in judged(prefers_ours, completions, others)] == [1.0, 1.0, 1.0]
    assert [verdict.value for verdict in judged(prefers_ours, others, completions)] == [0.0, 0.0, 0.0]


def test_a_judge_that_goes_with_the_position_gives_ties(completions, others):
    (verdict, *_) = judged(lambda first, second: "[[A]]", completions, others)
    assert (verdict.value, verdict.reason) == (0.5, "orders disagree")
    (verdict, *_) = judged(lambda first, second: "[[C]]", completions, others)
    assert (verdict.value, verdict.reason) == (0.5, "tie")


def test_an_unreadable_answer_is_no_verdict(completions, others):
    (verdict, *_) = judged(lambda first, second: "[[A]]" if "other" in second else "Both are fine.", completions, others)
    assert verdict.value is None
    assert "cannot be read" in verdict.reason
    # The last word counts: a judge may weigh both replies first.
    (verdict, *_) = judged(lambda first, second: "[[B]] at first sight, but [[C]]", completions, others)
    assert verdict.value == 0.5


def test_a_judge_sees_the_conversation_and_refuses_to_mix_prompts(completions, others):
    seen = []
    PairJudge(Scripted(lambda prompt, seed: seen.append(prompt.messages[0].content) or "[[C]]"))(completions, others)
    assert len(seen) == 6
    assert "user: how do i bake bread ?" in seen[0]
    assert "{first} other" in seen[0]
    with pytest.raises(DataError, match="not to the same prompt"):
        PairJudge(Scripted({}))(completions, others[::-1])


def test_a_baseline_that_did_not_answer_gives_no_verdict(completions, others, tmp_path):
    judge = PairJudge(Scripted(lambda prompt, seed: "[[C]]"))
    values = [verdict.value for verdict in AgainstBaseline(judge, others[:2])(completions)]
    assert values == [0.5, 0.5, None]
    path = tmp_path / "baseline.jsonl"
    write_jsonl(path, (item.as_json() for item in others))
    settings = JudgeSettings.make({"generator": {"generator": "scripted", "policy": "echo"}, "baseline": str(path), "name": "echoing"})
    # The echo repeats the question, whose last bracketed letter is C.
    assert [(verdict.by, verdict.value) for verdict in settings.build()(completions)] == [("echoing", 0.5)] * 3
    assert set(settings.inputs()) == {"baseline"}
    with pytest.raises(DataError, match=r"nothing\.jsonl does not exist"):
        settings.model_copy(update={"baseline": str(tmp_path / "nothing.jsonl")}).inputs()
