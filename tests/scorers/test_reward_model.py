"""Reward models against plain forwards of transformers, and pair accuracy worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from equipoise.core.errors import DataError, UsageError
from equipoise.core.records import Message, Record, Reply
from equipoise.data.settings import TokeniseSettings
from equipoise.generation._base import Completion
from equipoise.scorers._base import Scorer, Verdict
from equipoise.scorers.reward_model import RewardModel, RewardModelSettings, pair_accuracy


def values(verdicts):
    return [verdict.value for verdict in verdicts]


def test_an_encoder_scores_prompt_and_reply_as_a_text_pair(encoder, word_tokenizer, completions):
    expected = []
    for completion in completions:
        inputs = word_tokenizer(completion.prompt[0].content, completion.text, return_tensors="pt")
        assert inputs["token_type_ids"].unique().tolist() == [0, 1]
        with torch.no_grad():
            expected.append(encoder(**inputs).logits[0, 0].item())
    verdicts = RewardModel(encoder, word_tokenizer)(completions)
    assert values(verdicts) == pytest.approx(expected, abs=1e-5)
    assert [verdict.id for verdict in verdicts] == ["c0", "c1", "c2"]
    assert {verdict.by for verdict in verdicts} == {"reward"}
    assert len(set(expected)) == 3


def test_a_causal_classifier_reads_the_whole_conversation(causal_classifier, byte_tokenizer, completions):
    expected = []
    for completion in completions:
        text = f"\n\nHuman: {completion.prompt[0].content}\n\nAssistant: {completion.text}"
        with torch.no_grad():
            expected.append(causal_classifier(torch.tensor([byte_tokenizer(text)["input_ids"] + [256]])).logits[0, 0].item())
    assert values(RewardModel(causal_classifier, byte_tokenizer)(completions)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_batches_do_not_change_scores(encoder, word_tokenizer, completions, batch_tokens):
    whole = values(RewardModel(encoder, word_tokenizer)(completions))
    cut = RewardModel(encoder, word_tokenizer, batch_tokens=batch_tokens)
    assert values(cut(completions)) == pytest.approx(whole, abs=1e-5)
    assert values(cut(completions[::-1])) == pytest.approx(whole[::-1], abs=1e-5)


def test_truncation_takes_the_oldest_of_the_prompt_and_keeps_the_reply(encoder, word_tokenizer, completions):
    long = replace(completions[0], prompt=(Message("user", "salt " * 40 + "how do i bake bread ?"),))
    # 24 positions: [CLS] P [SEP] and the reply's 5 tokens with [SEP] leave 16 for the prompt's newest words.
    prompt = "salt " * 10 + "how do i bake bread ?"
    inputs = word_tokenizer(prompt, long.text, return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 24)
    with torch.no_grad():
        expected = encoder(**inputs).logits[0, 0].item()
    assert values(RewardModel(encoder, word_tokenizer)([long])) == pytest.approx([expected], abs=1e-5)


def test_a_reply_beyond_the_limit_gets_no_verdict_and_the_others_do(encoder, word_tokenizer, completions):
    long = replace(completions[1], text="flour " * 40)
    first, second, third = RewardModel(encoder, word_tokenizer)([completions[0], long, completions[2]])
    assert second.value is None
    assert "max_length (24 tokens)" in second.reason
    assert None not in (first.value, third.value)
    cut = RewardModel(encoder, word_tokenizer, TokeniseSettings(overlong_reply="cut"))
    assert cut([long])[0].value is not None


def test_an_empty_reply_is_scored_too(encoder, word_tokenizer, completions):
    (verdict,) = RewardModel(encoder, word_tokenizer)([replace(completions[0], text="")])
    # [CLS] prompt [SEP] and a second text that is only its own [SEP] (id 3, token type 1).
    ids = torch.tensor([[*word_tokenizer(completions[0].prompt[0].content)["input_ids"], 3]])
    types = torch.zeros_like(ids)
    types[0, -1] = 1
    with torch.no_grad():
        assert verdict.value == pytest.approx(encoder(ids, token_type_ids=types).logits[0, 0].item(), abs=1e-5)


def test_checkpoints_load_by_settings(encoder, word_tokenizer, completions, tmp_path, policy):
    encoder.save_pretrained(tmp_path / "judge")
    word_tokenizer.save_pretrained(tmp_path / "judge")
    settings = RewardModelSettings(model_name_or_path=str(tmp_path / "judge"), name="deberta", device="cpu")
    verdicts = settings.build()(completions)
    assert values(verdicts) == pytest.approx(values(RewardModel(encoder, word_tokenizer)(completions)), abs=1e-6)
    assert {verdict.by for verdict in verdicts} == {"deberta"}
    assert len(settings.inputs()["model"]) == 16
    policy.save_pretrained(tmp_path / "policy")
    word_tokenizer.save_pretrained(tmp_path / "policy")
    with pytest.raises(UsageError, match="no classification head"):
        RewardModelSettings(model_name_or_path=str(tmp_path / "policy"), device="cpu").build()


class Liked(Scorer):
    """Scores a reply by the number written in it; none where there is none."""

    name = "liked"

    def __call__(self, completions):
        def number(text):
            return next((float(word) for word in text.split() if word.lstrip("-").isdigit()), None)

        return [Verdict(completion.id, self.name, number(completion.text)) for completion in completions]


def pair(chosen: str, rejected: str) -> Record:
    return Record("r", (Message("user", "q"),), (Reply(chosen, "chosen"), Reply(rejected, "rejected")))


def test_pair_accuracy_counts_worked_by_hand():
    pairs = [
        pair("2 long reply", "1"),  # right; longer
        pair("3", "1 a longer one"),  # right; shorter
        pair("1", "2 a longer one"),  # wrong; shorter
        pair("1", "1"),  # tie in both
        pair("none here", "1"),  # no verdict; longer
        pair(" 5 ", "4\n"),  # right; equal once stripped
    ]
    shorter = [pair("1", "2 longer"), pair("1", "2 longer"), pair("1 longer", "2")]
    found = pair_accuracy(Liked(), pairs, shorter)
    counts = {"pairs": 6, "correct": 3, "ties": 1, "missing": 1, "length_correct": 2, "length_ties": 2}
    assert found == counts | {"length_rule": "shorter", "length_unit": "characters"}
    # On a draw among the training pairs, longer is taken for better.
    assert pair_accuracy(Liked(), pairs, [])["length_rule"] == "longer"
    assert pair_accuracy(Liked(), pairs, [])["length_correct"] == 2


def test_pairs_must_be_pairs():
    with pytest.raises(DataError, match="no held-out pairs"):
        pair_accuracy(Liked(), [], [])
    lone = Record("lone", (Message("user", "q"),), (Reply("1", "chosen"),))
    with pytest.raises(DataError, match=r"lone.*rejected is missing"):
        pair_accuracy(Liked(), [lone], [])


def test_a_completion_without_a_user_turn_is_laid_out(encoder, word_tokenizer):
    completion = Completion("x", (Message("user", "bread ?"), Message("assistant", "no"), Message("user", "please ?")), "yes")
    assert RewardModel(encoder, word_tokenizer)([completion])[0].value is not None
