"""The local generator on a real chat model."""

from __future__ import annotations

import pytest
import torch

from equipoise.core.assets import ready_folder
from equipoise.core.records import Message
from equipoise.data.settings import TokeniseSettings
from equipoise.data.tokenise import prompt_ids
from equipoise.generation._base import Prompt, Sampling
from equipoise.generation._text import turn_end
from equipoise.generation.local import LocalGenerator
from equipoise.models.load import load_causal, load_tokenizer

NAME = "smollm2-135m-instruct"
QUESTIONS = ["What is the capital of France?", "Name three fruits, nothing else.", "Say hello."]


@pytest.mark.smollm2
def test_greedy_replies_are_those_of_generate():
    if not (ready_folder(NAME) / "source.json").is_file():
        pytest.skip(f"{NAME} is not in the cache; `equipoise doctor` says how to get it")
    model, tokenizer = load_causal(NAME, device="cpu"), load_tokenizer(NAME)
    prompts = [Prompt(str(number), (Message("user", text),)) for number, text in enumerate(QUESTIONS)]
    assert tokenizer.convert_ids_to_tokens(list(turn_end(tokenizer))) == ["<|im_end|>"]
    completions = LocalGenerator(model, tokenizer)(prompts, Sampling(max_new_tokens=24))
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.from_numpy(prompt_ids(prompt.messages, tokenizer, TokeniseSettings())).long()[None]
        with torch.inference_mode():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert list(completion.token_ids) == whole[0, ids.shape[1] :].tolist()
    assert "Paris" in completions[0].text
    assert completions[0].finish_reason == "stop"
    assert "<|im_end|>" not in completions[0].text
