"""Tiny random models and rows that several rooms' tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from equipoise.data.rows import Branch, TokenRow

VOCAB = 96
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MHA = {name: value for name, value in _SHAPE.items() if name != "num_key_value_heads"}
_GPT = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _config(name: str, **values: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, name)(**values)

    return make


# Families of the design's list, windowed ones with a window the rows below reach past.
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _config("LlamaConfig", **_SHAPE),
    "qwen2": _config("Qwen2Config", **_SHAPE),
    "qwen3": _config("Qwen3Config", **_SHAPE, head_dim=8),
    "gpt2": _config("GPT2Config", **_GPT, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "opt": _config(
        "OPTConfig", **_GPT, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128
    ),
    "opt350m": _config(
        "OPTConfig",
        **_GPT,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
    ),
    "mistral": _config("MistralConfig", **_SHAPE, sliding_window=8),
    "gemma3": _config("Gemma3TextConfig", **_SHAPE, head_dim=8, sliding_window=8),
    "phi3": _config("Phi3Config", **_SHAPE, sliding_window=8),
    "smollm3": _config("SmolLM3Config", **_SHAPE),
    "cohere": _config("CohereConfig", **_SHAPE),
    "olmo2": _config("Olmo2Config", **_SHAPE),
    "granite": _config("GraniteConfig", **_SHAPE),
    "neox": _config("GPTNeoXConfig", **_MHA),
}

# Families whose attention cannot be replaced, or would be silently wrong: the start check has to fall back.
DIFFICULT: dict[str, Callable[[], Any]] = {
    "stablelm": _config("StableLmConfig", **_SHAPE),
    "falcon": _config(
        "FalconConfig", **_GPT, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False, new_decoder_architecture=False
    ),
    "gpt_oss": _config(
        "GptOssConfig",
        **_SHAPE,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=8,
        layer_types=["full_attention"] * 2,
    ),
    "gemma2": _config("Gemma2Config", **_SHAPE, head_dim=8, sliding_window=8),
    "gptj": _config("GPTJConfig", **_GPT, n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4),
    "bloom": _config("BloomConfig", **_GPT, hidden_size=32, n_layer=2, n_head=4),
    "mamba": _config("MambaConfig", **_GPT, hidden_size=32, num_hidden_layers=2, state_size=4),
}


def tiny(name: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random model of a family, weights large enough that a wrong mask shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config((FAMILIES | DIFFICULT)[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model.eval()


def row(name: str, prompt: int, branches: dict[str, int], seed: int = 0, **facts: float) -> TokenRow:
    """A row of random tokens: prompt length and the length of each reply by role."""
    generator = np.random.default_rng([seed, prompt, *branches.values(), *name.encode()])

    def ids(size: int) -> np.ndarray:
        return generator.integers(3, VOCAB, size).astype(np.int32)

    return TokenRow(
        name,
        ids(prompt),
        tuple(Branch(role, ids(size), {"learn": np.ones(size, dtype=bool)}, facts) for role, size in branches.items()),
    )


def pairs(count: int = 8, seed: int = 0) -> list[TokenRow]:
    """Preference rows of very different lengths."""
    generator = np.random.default_rng(seed)
    return [
        row(
            f"row-{number}",
            int(generator.integers(1, 24)),
            {"chosen": int(generator.integers(1, 14)), "rejected": int(generator.integers(1, 14))},
            seed,
        )
        for number in range(count)
    ]


def tokenizer() -> Any:
    """A word-level chat tokenizer over `w0 … w79`: one token a word, `<|end|>` closes every turn."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "<|end|>", "[UNK]", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {token: index for index, token in enumerate([*special, *(f"w{number}" for number in range(80))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
    )
    made.chat_template = (
        "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} <|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    return made


def preference_dicts(count: int = 12, seed: int = 0) -> list[dict[str, str]]:
    """TRL's columns: what a user hands over in memory."""
    generator = np.random.default_rng(seed)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{word}" for word in generator.integers(0, 80, int(generator.integers(least, most))))

    return [{"prompt": words(3, 20), "chosen": words(2, 12), "rejected": words(2, 12)} for _ in range(count)]


def recipe(base: Any, out: Any, **values: Any) -> Any:
    """Training settings for a tiny model in a folder: a few large steps, the reference store beside the output folder."""
    from equipoise.training.settings import TrainSettings

    defaults = {
        "model_name_or_path": str(base),
        "output_dir": str(out),
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "token_budget": 100,
        "reference_store": str(out.parent / "store"),
    }
    return TrainSettings.make(defaults | values)
