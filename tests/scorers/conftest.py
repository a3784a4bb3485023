"""Tiny models and tokenizers made in memory: byte-level for causal models, word-level with [CLS] and [SEP] for encoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast as Fast

from equipoise.core.records import Message
from equipoise.generation._base import Completion

TEXT = "how do i bake bread at home mix flour with water and salt then wait no yes please thank you . ?"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture
def byte_tokenizer() -> Fast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return Fast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")


@pytest.fixture
def word_tokenizer() -> Fast:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *TEXT.split()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return Fast(
        tokenizer_object=core,
        model_max_length=24,
        model_input_names=inputs,
        **{f"{n}_token": t for n, t in zip(names, SPECIAL, strict=True)},
    )


def _random(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def encoder() -> Any:
    torch.manual_seed(0)
    return _random(BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=1, max_position_embeddings=24, **SMALL)))


@pytest.fixture
def causal_classifier() -> Any:
    torch.manual_seed(0)
    return _random(LlamaForSequenceClassification(LlamaConfig(vocab_size=257, num_labels=1, pad_token_id=256, **SMALL)))


@pytest.fixture
def policy() -> Any:
    torch.manual_seed(1)
    return _random(LlamaForCausalLM(LlamaConfig(vocab_size=257, pad_token_id=256, eos_token_id=256, **SMALL)))


@pytest.fixture
def base() -> Any:
    torch.manual_seed(2)
    return _random(LlamaForCausalLM(LlamaConfig(vocab_size=257, pad_token_id=256, eos_token_id=256, **SMALL)))


@pytest.fixture
def completions() -> list[Completion]:
    asked = ["how do i bake bread ?", "bread ?", "how do i mix flour with water ?"]
    texts = ["mix flour with water .", "no", "yes thank you . mix flour and salt then wait ."]
    return [
        Completion(f"c{number}", (Message("user", question),), text, token_ids=(*text.encode()[:6], 256))
        for number, (question, text) in enumerate(zip(asked, texts, strict=True))
    ]
