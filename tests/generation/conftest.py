"""Tiny models and a byte tokenizer, made in memory: no download, and every text round-trips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from equipoise.core.files import write_jsonl
from equipoise.core.records import Message
from equipoise.generation._base import Prompt

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    """One token a byte (ids 0 to 255), then </s>, <|im_start|>, <|im_end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def tiny(family: str, seed: int = 0) -> Any:
    """A random model whose greedy replies vary and sometimes end."""
    torch.manual_seed(seed)
    if family == "llama":
        config: Any = LlamaConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
        model: Any = LlamaForCausalLM(config)
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=512))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = model.config.eos_token_id = 256
    model.generation_config.bos_token_id = model.config.bos_token_id = None
    model.generation_config.pad_token_id = model.config.pad_token_id = 256
    return model.eval()


@pytest.fixture
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(chat=False)


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(chat=True)


@pytest.fixture
def make_model() -> Callable[..., Any]:
    return tiny


@pytest.fixture
def prompts() -> list[Prompt]:
    texts = ["Hi", "What is a fugue, and who wrote the best?", "Name a river.", "?", "Tell me of the sea at night.", "Why?", "Go on."]
    return [Prompt(f"p{number}", (Message("user", text),), "helpful") for number, text in enumerate(texts)]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    tiny("llama").save_pretrained(folder)
    byte_tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts_file(tmp_path: Path, prompts: list[Prompt]) -> Path:
    path = tmp_path / "prompts.jsonl"
    write_jsonl(path, (prompt.as_json() for prompt in prompts))
    return path
