"""The decoding loop against transformers' own `generate`, and sampling against distributions worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from equipoise.generation._base import Sampling, stream
from equipoise.generation._decode import choose, decode
from equipoise.generation._rows import POSITIONS, groups, joins

V = 97
SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)),
    "mistral with a window": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=6)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=6)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=48)),
}
ENDS = frozenset(range(3, 11))
PROMPTS = [np.random.default_rng(size).integers(11, V, size=size).astype(np.int32) for size in (3, 9, 5, 12, 1, 7)]


def model_of(family: str):
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.pad_token_id = 0
    return model.eval()


def theirs(model, prompt, **options):
    ids = torch.tensor(prompt)[None].long()
    mask = torch.ones_like(ids)
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=sorted(ENDS), **options)
    return whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_says_what_generate_says_one_at_a_time(family):
    model = model_of(family)
    expected = [theirs(model, prompt) for prompt in PROMPTS]
    replies = decode(model, PROMPTS, Sampling(max_new_tokens=20), np.zeros((len(PROMPTS), 20)), ENDS)
    assert [reply.ids for reply in replies] == expected
    assert [reply.ended for reply in replies] == [ids[-1] in ENDS for ids in expected]
    assert len({tuple(ids) for ids in expected}) > 1


def test_a_family_without_keys_and_values_to_keep_runs_again_from_the_start():
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    model.generation_config.pad_token_id = 0
    assert not joins(model)
    for prompt in PROMPTS[:3]:
        (reply,) = decode(model, [prompt], Sampling(max_new_tokens=20), np.zeros((1, 20)), ENDS)
        assert reply.ids == theirs(model, prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_waiting_prompts_take_the_places_of_finished_replies(family):
    model = model_of(family)
    prompts = [np.random.default_rng(100 + size).integers(11, V, size=1 + size % 14).astype(np.int32) for size in range(24)]
    expected = [theirs(model, prompt) for prompt in prompts]
    with Watched(model) as calls:
        # 14 tokens of the longest prompt and 20 of a reply: five rows at a time.
        replies = decode(model, prompts, Sampling(max_new_tokens=20), np.zeros((24, 20)), ENDS, batch_tokens=5 * 34)
    assert [reply.ids for reply in replies] == expected
    steps = [rows for rows, new, _ in calls if new == 1]
    assert max(rows * width for rows, _, width in calls) <= 5 * 34
    # Rows run at every step, tokens written after the first of each: places are filled again while prompts wait.
    assert len(steps) < 20 * -(-24 // 5)
    assert family == "gemma3" or len({len(ids) for ids in expected}) > 1


def test_a_reply_that_ended_early_never_runs_past_the_context():
    # 26 positions learned: 6 of the prompt and 20 of the reply. The rows that ended stay for a while beside those that go on.
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=26)).eval()
    prompts = [np.random.default_rng(size).integers(11, V, size=6).astype(np.int32) for size in range(12)]
    free = decode(model, prompts, Sampling(max_new_tokens=20), np.zeros((12, 20)), frozenset())
    ends = frozenset({free[0].ids[1]})
    replies = decode(model, prompts, Sampling(max_new_tokens=20), np.zeros((12, 20)), ends, batch_tokens=5 * 26)
    for reply, whole in zip(replies, free, strict=True):
        cut = next((place + 1 for place, token in enumerate(whole.ids) if token in ends), 20)
        assert reply.ids == whole.ids[:cut]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mistral with a window"])
def test_what_prompts_share_is_run_once(family):
    model = model_of(family)
    start = np.random.default_rng(5).integers(11, V, size=30).astype(np.int32)
    prompts = [np.concatenate([start, prompt]) for prompt in (*PROMPTS, PROMPTS[0], PROMPTS[0])]
    with Watched(model) as calls:
        replies = decode(model, prompts, Sampling(max_new_tokens=20), np.zeros((8, 20)), ENDS)
    assert [reply.ids for reply in replies] == [theirs(model, prompt) for prompt in prompts]
    prefilled = [rows * new for rows, new, _ in calls if new > 1]
    if "window" in family:
        assert sum(prefilled) >= 6 * 30
    else:
        # The start by itself; then what follows it, 12 tokens at most, of the six prompts that differ, in groups of like length.
        assert prefilled[0] == 30
        assert 0 < sum(prefilled[1:]) <= 6 * 12


def test_samples_of_one_prompt_differ_by_their_draws_only():
    model = model_of("llama")
    sampling = Sampling(max_new_tokens=20, temperature=1.2)
    draws = np.stack([stream(7, str(number)).random(20) for number in range(4)])
    together = [reply.ids for reply in decode(model, [PROMPTS[1]] * 4, sampling, draws, ENDS)]
    assert together == [decode(model, [PROMPTS[1]], sampling, draws[[number]], ENDS)[0].ids for number in range(4)]
    assert len(set(map(tuple, together))) == 4


def test_prompts_are_grouped_so_that_little_is_padded():
    assert groups([9, 9, 7, 4, 4], spare=4) == [[0, 1, 2], [3, 4]]
    assert groups([9, 9, 7, 4, 4], spare=0) == [[0, 1], [2], [3, 4]]
    assert groups([9, 9, 7, 4, 4], spare=99) == [[0, 1, 2, 3, 4]]
    assert groups([POSITIONS + 1, POSITIONS // 2, POSITIONS // 2, 1], spare=10 * POSITIONS) == [[0], [1, 2], [3]]
    assert groups([], spare=4) == []


class Watched:
    """Notes rows, new tokens and width so far of every forward of a model."""

    def __init__(self, model):
        self._model, self._calls = model, []

    def __enter__(self):
        def note(_, args, inputs):
            self._calls.append((*inputs["input_ids"].shape, inputs["attention_mask"].shape[1]))

        self._hook = self._model.register_forward_pre_hook(note, with_kwargs=True)
        return self._calls

    def __exit__(self, *_):
        self._hook.remove()


def test_repetition_penalty_is_transformers_penalty():
    model = model_of("llama")
    expected = [theirs(model, prompt, repetition_penalty=1.7) for prompt in PROMPTS]
    replies = decode(model, PROMPTS, Sampling(max_new_tokens=20, repetition_penalty=1.7), np.zeros((len(PROMPTS), 20)), ENDS)
    assert [reply.ids for reply in replies] == expected
    assert expected != [theirs(model, prompt) for prompt in PROMPTS]


def test_a_sampled_reply_does_not_depend_on_its_batch():
    model = model_of("llama")
    sampling = Sampling(max_new_tokens=20, temperature=1.2, top_p=0.95)
    draws = np.stack([stream(7, str(number)).random(20) for number in range(len(PROMPTS))])
    together = decode(model, PROMPTS, sampling, draws, ENDS)
    order = [4, 0, 5, 2]
    apart = decode(model, [PROMPTS[index] for index in order], sampling, draws[order], ENDS)
    assert [reply.ids for reply in apart] == [together[index].ids for index in order]
    alone = [decode(model, [prompt], sampling, draws[[index]], ENDS)[0].ids for index, prompt in enumerate(PROMPTS)]
    assert alone == [reply.ids for reply in together]


LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))


@pytest.mark.parametrize(
    ("sampling", "draw", "token"),
    [
        # In vocabulary order the mass ends at 0.1, 0.5, 0.7, 1.0.
        (Sampling(temperature=1.0), 0.0, 0),
        (Sampling(temperature=1.0), 0.0999, 0),
        (Sampling(temperature=1.0), 0.1001, 1),
        (Sampling(temperature=1.0), 0.69, 2),
        (Sampling(temperature=1.0), 0.9999999999999999, 3),
        # Sorted: 1 (0.4), 3 (0.3), 2 (0.2), 0 (0.1). Nucleus 0.6 keeps 1 and 3, whose mass ends at 4/7.
        (Sampling(temperature=1.0, top_p=0.6), 0.57, 1),
        (Sampling(temperature=1.0, top_p=0.6), 0.58, 3),
        (Sampling(temperature=1.0, top_p=0.6), 0.9999999999999999, 3),
        # Top 3 keeps 1, 3, 2 with masses 4/9, 3/9, 2/9; a nucleus of 0.5 of those keeps 1 and 3.
        (Sampling(temperature=1.0, top_k=3), 0.78, 2),
        (Sampling(temperature=1.0, top_k=3, top_p=0.5), 0.58, 3),
        (Sampling(temperature=1.0, top_k=1), 0.99, 1),
        (Sampling(temperature=1.0, top_p=1e-9), 0.99, 1),
        # Half the temperature squares the masses: 1, 16, 4, 9 of 30.
        (Sampling(temperature=0.5), 0.56, 1),
        (Sampling(temperature=0.5), 0.57, 2),
        (Sampling(temperature=0.0), 0.99, 1),
    ],
)
def test_a_draw_becomes_the_token_worked_by_hand(sampling, draw, token):
    assert choose(LOGITS, sampling, torch.tensor([draw], dtype=torch.float64)).tolist() == [token]


def test_draws_spread_over_tokens_as_their_probabilities():
    draws = torch.from_numpy(np.random.default_rng(0).random(20_000))
    tokens = choose(LOGITS.expand(20_000, 4), Sampling(temperature=1.0, top_k=3), draws)
    shares = torch.bincount(tokens, minlength=4) / 20_000
    # Standard error of a share near 4/9 is 0.0035.
    assert shares.tolist() == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=0.015)


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    for draw in (0.0, 0.5, 0.9999999999999999):
        assert choose(logits, Sampling(temperature=1.0), torch.tensor([draw], dtype=torch.float64)).tolist() == [1]


def test_streams_differ_by_seed_and_by_prompt_only():
    first = stream(0, "a").random(3)
    assert np.array_equal(first, stream(0, "a").random(3))
    assert not np.array_equal(first, stream(1, "a").random(3))
    assert not np.array_equal(first, stream(0, "b").random(3))
