"""Tiny real tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

WORDS = [f"w{number}" for number in range(60)]
SPECIAL = ["<s>", "</s>", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} <|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@pytest.fixture(scope="session")
def word_tokenizer() -> Callable[..., Any]:
    """A WordLevel tokenizer over w0 … w59: one token per word, so that lengths can be counted by hand."""

    def make(template: str | None = CHAT, bos: bool = False, encoder: bool = False, eos: str | None = "<|end|>") -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        extra = ["Human:", "Assistant:", "sys", "a", "b", "?"]
        vocabulary = {token: index for index, token in enumerate([*SPECIAL, *WORDS, *extra])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if bos:
            backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
        names: dict[str, Any] = {"unk_token": "[UNK]", "additional_special_tokens": SPECIAL[6:]}
        if encoder:
            pieces = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
            backend.post_processor = processors.TemplateProcessing(
                single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=pieces
            )
            names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        else:
            names |= {"eos_token": eos} | ({"bos_token": "<s>"} if bos else {})
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
        tokenizer.chat_template = None if encoder else template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """A byte-level BPE tokenizer with merges (across spaces and newlines too), trained on a few lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    lines = [
        "\n\nHuman: hello there\n\nAssistant: hello you, how are you?\n\n",
        "the model answers the question\n",
        "naïve café 東京 🙂",
    ] * 8
    special = ["<|user|>", "<|system|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", additional_special_tokens=special[:3])
    tokenizer.chat_template = CHAT.replace("> {{", ">\n{{").replace("}} <", "}}<").replace("|> {%", "|>\n{%")
    return tokenizer


@pytest.fixture(scope="session")
def metaspace_tokenizer() -> Any:
    """A tokenizer that, like Llama 2's, puts a space in front of every text it is given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=list("abcdefghij\n:HumanAsist▁"))
    backend.train_from_iterator(["abc def ghi\nabc", "abc abc"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content }}"
        "{% if loop.last and message.role == 'assistant' %}</s>{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    )
    return tokenizer
