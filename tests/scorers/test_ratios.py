"""KL to the base and the implicit reward, against plain forwards worked token by token."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from equipoise.core.records import Message, Record, Reply
from equipoise.data.settings import TokeniseSettings
from equipoise.generation._base import Completion, Prompt, Sampling
from equipoise.generation.local import LocalGenerator
from equipoise.scorers._ratios import LogRatios, length_batches
from equipoise.scorers.implicit import ImplicitReward
from equipoise.scorers.kl_to_base import KlToBase, KlToBaseSettings
from equipoise.scorers.reward_model import pair_accuracy


def plain_logps(model, tokenizer, completion):
    """Token by token, from one forward per position."""
    ids = tokenizer(f"\n\nHuman: {completion.prompt[0].content}\n\nAssistant:")["input_ids"]
    total = 0.0
    for token in completion.token_ids:
        with torch.no_grad():
            total += torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)[token].item()
        ids = [*ids, token]
    return total


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_ratios_are_those_of_plain_forwards(policy, base, byte_tokenizer, completions, batch_tokens):
    ratios = LogRatios(policy, base, byte_tokenizer, batch_tokens=batch_tokens)
    expected = [plain_logps(policy, byte_tokenizer, item) - plain_logps(base, byte_tokenizer, item) for item in completions]
    kl = [verdict.value for verdict in KlToBase(ratios)(completions)]
    assert kl == pytest.approx([value / len(item.token_ids) for value, item in zip(expected, completions, strict=True)], abs=1e-4)
    implicit = ImplicitReward(ratios, beta=0.25)(completions)
    assert [verdict.value for verdict in implicit] == pytest.approx([0.25 * value for value in expected], abs=1e-3)
    assert {verdict.by for verdict in implicit} == {"implicit"}


def test_a_model_is_at_no_distance_from_itself(policy, byte_tokenizer, completions):
    verdicts = KlToBase(LogRatios(policy, copy.deepcopy(policy), byte_tokenizer))(completions)
    assert [verdict.value for verdict in verdicts] == [0.0, 0.0, 0.0]


def test_replies_to_one_prompt_run_it_once_and_score_as_each_alone(policy, base, byte_tokenizer, completions):
    samples = [replace(completions[0], id=str(number), token_ids=(*b"sample", 65 + number, 256)) for number in range(5)]
    seen = []
    hook = policy.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True)
    found = LogRatios(policy, base, byte_tokenizer)([samples[0], completions[1], *samples[1:]])
    hook.remove()
    for item, ratio in zip([samples[0], completions[1], *samples[1:]], found, strict=True):
        expected = plain_logps(policy, byte_tokenizer, item) - plain_logps(base, byte_tokenizer, item)
        assert ratio.nats == pytest.approx(expected, abs=1e-4)
    prompts = [len(byte_tokenizer(f"\n\nHuman: {item.prompt[0].content}\n\nAssistant:")["input_ids"]) for item in completions[:2]]
    # Two forwards of 4 tokens try the head, two the packing; then each prompt runs once with all its replies: five of 8 tokens,
    # and one of 3 (b"no" and the end).
    assert seen[-1] == prompts[0] + 5 * 8 + prompts[1] + 3
    assert seen[:2] == [4, 4]
    assert len(seen) == 5
    assert policy.config._attn_implementation == "sdpa"


def test_an_attention_that_cannot_be_packed_is_padded(policy, base, byte_tokenizer, completions, monkeypatch):
    items = [*completions, replace(completions[0], id="again")]  # a prompt twice, or packing would not be tried
    expected = LogRatios(policy, base, byte_tokenizer)(items)

    def fails(model, name):
        raise ValueError("this family's attention cannot be replaced")

    monkeypatch.setattr("equipoise.models.attention.attention_of", fails)
    found = LogRatios(policy, base, byte_tokenizer)(items)
    assert [ratio.nats for ratio in found] == pytest.approx([ratio.nats for ratio in expected], abs=1e-4)


def test_without_tokens_there_is_no_verdict(policy, base, byte_tokenizer, completions):
    items = [completions[0], replace(completions[1], token_ids=()), completions[2]]
    first, second, third = KlToBase(LogRatios(policy, base, byte_tokenizer))(items)
    assert (second.value, second.reason) == (None, "no token ids")
    assert None not in (first.value, third.value)
    assert KlToBase(LogRatios(policy, base, byte_tokenizer))([]) == []


def test_sampled_replies_estimate_the_kl_divergence(policy, base, byte_tokenizer, completions):
    # One token a reply: the mean of log π − log π_base over samples is then KL(π ‖ π_base) of one distribution, known exactly.
    prompts = [Prompt(str(number), completions[1].prompt) for number in range(1500)]
    samples = LocalGenerator(policy, byte_tokenizer, stop=())(prompts, Sampling(max_new_tokens=1, temperature=1.0))
    ids = torch.tensor([byte_tokenizer("\n\nHuman: bread ?\n\nAssistant:")["input_ids"]])
    with torch.no_grad():
        ours, theirs = (torch.log_softmax(model(ids).logits[0, -1].double(), -1) for model in (policy, base))
    exact = (ours.exp() * (ours - theirs)).sum().item()
    spread = ((ours.exp() * (ours - theirs) ** 2).sum().item() - exact**2) ** 0.5
    values = [verdict.value for verdict in KlToBase(LogRatios(policy, base, byte_tokenizer))(samples)]
    assert sum(values) / 1500 == pytest.approx(exact, abs=4 * spread / 1500**0.5)
    assert exact > 0.1


def test_settings_load_both_models(policy, base, byte_tokenizer, completions, tmp_path):
    for name, model in (("policy", policy), ("base", base)):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer.save_pretrained(tmp_path / name)
    settings = KlToBaseSettings(model_name_or_path=str(tmp_path / "policy"), base_model_name_or_path=str(tmp_path / "base"), device="cpu")
    values = [verdict.value for verdict in settings.build()(completions)]
    assert values == [verdict.value for verdict in KlToBase(LogRatios(policy, base, byte_tokenizer))(completions)]
    assert set(settings.inputs()) == {"policy", "base"}


def test_rows_are_batched_longest_first_within_the_budget():
    assert list(length_batches([3, 9, 5, 5], 15, spare=99)) == [[1], [2, 3, 0]]
    assert list(length_batches([3, 99], 10, spare=99)) == [[1], [0]]
    assert list(length_batches([], 10, spare=99)) == []


def test_a_batch_ends_before_it_is_mostly_padding():
    # 9, 9, 7: 2 padded positions; the 3 would add 6. Then 3 and 1 with 2.
    assert list(length_batches([9, 3, 7, 1, 9], 99, spare=3)) == [[0, 4, 2], [1, 3]]
    assert list(length_batches([9, 3, 9], 99, spare=0)) == [[0, 2], [1]]


def test_the_implicit_reward_reads_texts_where_there_are_no_tokens(policy, base, byte_tokenizer, completions):
    """As a reward model is used: on any text, its end included, as training lays it out."""
    spelt = [replace(item, token_ids=(*byte_tokenizer(f" {item.text}")["input_ids"], 256)) for item in completions]
    expected = [verdict.value for verdict in ImplicitReward(LogRatios(policy, base, byte_tokenizer))(spelt)]
    bare = [replace(item, token_ids=()) for item in completions]
    missing, always = (ImplicitReward(LogRatios(policy, base, byte_tokenizer, text=text)) for text in ("missing", "always"))
    assert [verdict.value for verdict in missing(bare)] == pytest.approx(expected, abs=1e-4)
    # Ids that are there may be another tokenizer's: `always` does not look at them.
    assert [verdict.value for verdict in always(completions)] == pytest.approx(expected, abs=1e-4)
    assert [verdict.value for verdict in missing([bare[0], spelt[1]])] == pytest.approx(expected[:2], abs=1e-4)
    (empty,) = missing([replace(bare[0], text="")])
    assert empty.value is not None


def test_a_text_beyond_the_limit_gets_no_verdict_and_says_why(policy, base, byte_tokenizer, completions):
    bare = [replace(completions[1], token_ids=()), replace(completions[1], token_ids=(), text="flour " * 40)]
    ratios = LogRatios(policy, base, byte_tokenizer, TokeniseSettings(max_length=60), text="missing")
    short, long = ImplicitReward(ratios)(bare)
    assert short.value is not None
    assert long.value is None
    assert "max_length (60 tokens)" in long.reason


@pytest.mark.parametrize("text", ["never", "missing", "always"])
def test_a_reply_beyond_the_limit_or_a_refused_prompt_costs_only_its_own_verdict(policy, base, byte_tokenizer, completions, text):
    byte_tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m['content'] }}\n{% endfor %}"
    )
    long = replace(completions[0], text="flour " * 20, token_ids=tuple(b"flour " * 20))
    # The reply leaves room for its prompt's end only: the oldest tokens go, as in training.
    tight = replace(completions[0], text="y" * 30, token_ids=(*b"y" * 30, 256))
    alone = replace(completions[0], prompt=(Message("system", "bread"), Message("assistant", "?"), Message("user", "how ?")))
    ratios = LogRatios(policy, base, byte_tokenizer, TokeniseSettings(max_length=50), text=text)
    for told in (ratios([completions[1], long, tight, alone]), ratios.rewards([completions[1], long, tight, alone], 0.1)):
        assert [isinstance(item, str) for item in told] == [False, True, False, True]
        assert told[1] == "a reply is too long for max_length (50 tokens)"
        assert told[3] == "the chat template refuses this conversation"


def test_a_conversation_without_turns_costs_only_its_own_verdict(policy, base, byte_tokenizer, completions):
    silent = replace(completions[0], prompt=(), token_ids=(*b"y" * 50, 256))
    told = LogRatios(policy, base, byte_tokenizer, TokeniseSettings(max_length=50))([silent, completions[1]])
    assert [isinstance(item, str) for item in told] == [True, False]


def test_pair_accuracy_of_an_implicit_reward(policy, base, byte_tokenizer):
    """The policy's own preference between two texts, as a reward model's would be counted."""
    scorer = ImplicitReward(LogRatios(policy, base, byte_tokenizer, text="missing"))
    texts = [("yes please", "no"), ("flour and salt", "wait then")]
    pairs = [
        Record(str(number), (Message("user", "bread ?"),), (Reply(first, "chosen"), Reply(second, "rejected")))
        for number, (first, second) in enumerate(texts)
    ]
    values = [scorer([Completion("x", (Message("user", "bread ?"),), text)])[0].value for pair in texts for text in pair]
    found = pair_accuracy(scorer, pairs, [])
    assert (found["pairs"], found["missing"]) == (2, 0)
    assert found["correct"] == (values[0] > values[1]) + (values[2] > values[3])
