"""The `score` stage and both verbs: files, resuming, settings."""

from __future__ import annotations

import json

import pytest

from equipoise.cli.main import main
from equipoise.core.errors import DataError, UsageError
from equipoise.core.files import read_jsonl, write_jsonl
from equipoise.core.records import Message
from equipoise.generation._base import Completion
from equipoise.scorers import ScoreSettings, score
from equipoise.scorers.rules import LengthRule, RefusalRule


@pytest.fixture
def completions_file(tmp_path):
    path = tmp_path / "completions.jsonl"
    rows = [
        Completion(f"c{n}", (Message("user", "Why?"),), "" if n == 3 else "I can't help with that." if n % 2 else "Because.", (1,) * n)
        for n in range(600)
    ]
    write_jsonl(path, (row.as_json() for row in rows))
    return path


def test_verdicts_stand_scorer_after_scorer_in_order(completions_file, tmp_path):
    settings = ScoreSettings.make({"completions": str(completions_file), "output_dir": str(tmp_path / "run")})
    run = score(settings)
    rows = read_jsonl(run.folder / "verdicts.jsonl")
    assert [row["by"] for row in rows] == ["invalid"] * 600 + ["refusal"] * 600 + ["length"] * 600
    assert [row["id"] for row in rows[:600]] == [f"c{n}" for n in range(600)]
    assert rows[3] == {"id": "c3", "by": "invalid", "value": 1.0, "reason": "empty"}
    assert rows[603] == {"id": "c3", "by": "refusal", "value": 0.0, "reason": "empty"}
    assert run.results["scorers"]["refusal"] == {"n": 600, "missing": 0, "mean": round(299 / 600, 6)}
    assert run.results["scorers"]["length"]["mean"] == pytest.approx(sum(range(1, 600)) / 599)
    assert not (run.folder / "partial").exists()
    assert score(settings).skipped


def test_an_interrupted_run_goes_on_after_the_last_chunk(completions_file, tmp_path, monkeypatch):
    values = {"completions": str(completions_file), "scorers": ["length", "refusal"]}
    whole = score(ScoreSettings.make({**values, "output_dir": str(tmp_path / "whole")})).folder
    settings = ScoreSettings.make({**values, "output_dir": str(tmp_path / "torn")})
    real, sizes = RefusalRule.__call__, []

    def breaks(self, completions):
        sizes.append(len(completions))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return real(self, completions)

    monkeypatch.setattr(RefusalRule, "__call__", breaks)
    with pytest.raises(KeyboardInterrupt):
        score(settings)
    partial = tmp_path / "torn" / "partial" / "1.jsonl"
    partial.write_bytes(partial.read_bytes() + b'{"id": "c256", "by": "refusal", "value": 0.0, "reason": ""}\n{"id": "c2')
    monkeypatch.setattr(LengthRule, "__call__", None)  # finished before the kill: not asked again
    resumed = score(settings).folder
    assert sizes == [256, 256, 256, 88]
    assert (resumed / "verdicts.jsonl").read_bytes() == (whole / "verdicts.jsonl").read_bytes()


def test_bad_settings_are_said(completions_file, tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'reward_model'"):
        ScoreSettings.make({"completions": "x", "scorers": ["reward_modle"]})
    with pytest.raises(UsageError, match="Did you mean 'model_name_or_path'"):
        ScoreSettings.make({"completions": "x", "scorers": [{"scorer": "reward_model", "model_name_or_pth": "y"}]})
    twice = ScoreSettings.make({"completions": str(completions_file), "scorers": ["length", "length"], "output_dir": str(tmp_path / "x")})
    with pytest.raises(UsageError, match="Two scorers sign as 'length'"):
        score(twice)
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        score(ScoreSettings.make({"completions": "nowhere.jsonl"}))


def test_both_verbs_from_prompts_to_verdicts(policy, encoder, byte_tokenizer, word_tokenizer, tmp_path, capsys):
    policy.save_pretrained(tmp_path / "policy")
    byte_tokenizer.save_pretrained(tmp_path / "policy")
    encoder.save_pretrained(tmp_path / "judge")
    word_tokenizer.save_pretrained(tmp_path / "judge")
    prompts = tmp_path / "prompts.jsonl"
    write_jsonl(prompts, ({"id": f"p{n}", "prompt": "bread ?", "axis": "helpful"} for n in range(3)))

    def told(*arguments):
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    shared = ("--set", "sampling.max_new_tokens=8", "--set", "generator.device=cpu")
    made = told("generate", tmp_path / "policy", "--prompts", prompts, "-o", tmp_path / "made", *shared)
    assert (made["schema_version"], made["skipped"], made["results"]["completions"]) == (1, False, 3)
    scored = told("score", tmp_path / "made" / "completions.jsonl", "--reward-model", tmp_path / "judge", "-o", tmp_path / "scored")
    assert set(scored["results"]["scorers"]) == {"invalid", "refusal", "length", "reward"}
    assert scored["results"]["scorers"]["reward"]["n"] == 3
    echoed = told("generate", "echo", "--prompts", prompts, "-o", tmp_path / "echo")
    assert echoed["results"]["empty"] == 0
    assert told("score", tmp_path / "echo", "--scorer", "invalid", "-o", tmp_path / "e")["results"]["verdicts"] == 3, "a folder will do"
    assert main(["generate", "echo", "--prompts", str(tmp_path / "none.jsonl"), "-o", str(tmp_path / "n")]) == 1
    assert main(["score", "--set", "completion=x"]) == 2
    assert "Did you mean 'completions'" in capsys.readouterr().err
    assert main(["score", str(tmp_path / "made" / "completions.jsonl"), "-o", str(tmp_path / "for-people")]) == 0
    assert "verdicts.jsonl" in capsys.readouterr().out


def test_a_policy_is_tried_on_pairs_from_the_command_line(policy, base, byte_tokenizer, tmp_path, capsys):
    for name, model in (("policy", policy), ("base", base)):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer.save_pretrained(tmp_path / name)
    pairs = tmp_path / "pairs.jsonl"
    write_jsonl(pairs, ({"prompt": f"bread {n} ?", "chosen": "yes please, " * (n + 1), "rejected": "no"} for n in range(5)))
    pair = ("--implicit", str(tmp_path / "policy"), "--base", str(tmp_path / "base"))
    assert main(["score", "--pairs", str(pairs), *pair, "-o", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["results"]["counts"]["pairs"] == 5
    assert found["results"]["counts"]["missing"] == 0
    assert found["results"]["pair_accuracy"]["value"] == pytest.approx(20.0 * found["results"]["counts"]["correct"])
    assert found["results"]["length_baseline"]["value"] == 100.0
    assert main(["score", "--pairs", str(pairs), *pair, "-o", str(tmp_path / "run")]) == 0
    assert "was already done" in capsys.readouterr().out
    # The same scorer, on completions.
    completions = tmp_path / "completions.jsonl"
    write_jsonl(completions, [Completion("c", (Message("user", "Why?"),), "Because.").as_json()])
    assert main(["score", str(completions), *pair, "-o", str(tmp_path / "scored"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"]["scorers"]["implicit"]["n"] == 1
    assert main(["score", str(completions), *pair[:2]]) == 2
    assert main(["score", "--pairs", str(pairs)]) == 2
    assert "one scorer" in capsys.readouterr().err
    assert main(["score", "--pairs", str(pairs), "--scorer", "length"]) == 2
    assert "preference data has texts" in capsys.readouterr().err
    kl = "scorers=[{scorer: kl_to_base, model_name_or_path: POLICY, base_model_name_or_path: POLICY}]".replace("POLICY", pair[1])
    assert main(["score", "--pairs", str(pairs), "--set", kl, "-o", str(tmp_path / "kl")]) == 0
    assert "No pair got a verdict" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("foo", "there are invalid, refusal, length"),
        ("rules", "there are invalid, refusal, length"),
        ("implicit", "--implicit POLICY --base REFERENCE"),
        ("reward_model", "--reward-model MODEL"),
        ("kl_to_base", "--set 'scorers=[{scorer: kl_to_base, …}]'"),
    ],
)
def test_a_scorer_that_is_no_rule_says_how_it_is_asked_for(name, said, capsys):
    assert main(["score", "completions.jsonl", "--scorer", name]) == 2
    assert said in capsys.readouterr().err
