"""The vLLM generator through a stand-in of its engine: what is asked of it, and how its outputs are read."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from equipoise.core.errors import UsageError
from equipoise.data.settings import TokeniseSettings
from equipoise.data.tokenise import prompt_ids
from equipoise.generation._base import Sampling
from equipoise.generation.vllm import VllmSettings


class Engine:
    """Answers each prompt with its own length; remembers how it was started and what it was asked."""

    def __init__(self, **options):
        self.options = options
        Engine.last = self

    def generate(self, inputs, parameters):
        self.inputs, self.parameters = inputs, parameters
        outputs = [
            SimpleNamespace(text=f" {len(item['prompt_token_ids'])} ", token_ids=[1, 2], finish_reason="length" if number == 1 else "stop")
            for number, item in enumerate(inputs)
        ]
        return [SimpleNamespace(outputs=[output]) for output in outputs]


@pytest.fixture
def vllm(monkeypatch):
    module = SimpleNamespace(LLM=Engine, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_prompts_go_in_as_tokens_and_each_has_its_seed(vllm, model_folder, prompts, chat_tokenizer):
    settings = VllmSettings(model_name_or_path=str(model_folder), tensor_parallel_size=2)
    sampling = Sampling(max_new_tokens=9, temperature=0.5, top_p=0.9, top_k=7, seed=3)
    completions = settings.build()(prompts, sampling)
    engine = Engine.last
    assert engine.options["tensor_parallel_size"] == 2
    expected = [prompt_ids(prompt.messages, chat_tokenizer, TokeniseSettings()).tolist() for prompt in prompts]
    assert [item["prompt_token_ids"] for item in engine.inputs] == expected
    assert [completion.text for completion in completions] == [str(len(ids)) for ids in expected]
    assert [completion.finish_reason for completion in completions[:3]] == ["stop", "length", "stop"]
    assert completions[0].weights == settings.inputs()["model"]
    first = engine.parameters[0]
    assert (first["max_tokens"], first["temperature"], first["top_p"], first["top_k"], first["stop"]) == (9, 0.5, 0.9, 7, [])
    assert first["stop_token_ids"] == [258]
    assert len({parameters["seed"] for parameters in engine.parameters}) == len(prompts)


def test_plain_transcripts_stop_at_the_next_human_turn(vllm, model_folder, prompts):
    settings = VllmSettings(model_name_or_path=str(model_folder), tokenise=TokeniseSettings(transcript="plain"))
    settings.build()(prompts, Sampling())
    assert Engine.last.parameters[0]["stop"] == ["\n\nHuman:"]
    assert Engine.last.parameters[0]["stop_token_ids"] == []


def test_without_the_package_it_says_what_to_install(monkeypatch, model_folder):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match="pip install vllm"):
        VllmSettings(model_name_or_path=str(model_folder)).build()
