"""Shapes of real models with random weights, and rows that need several blocks of 128."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from equipoise.data.rows import Branch, TokenRow

_NO_DROPOUT = {"attention_dropout": 0.0}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    # Norms after the block, embeddings of 512 projected to 1024.
    "opt-350m": (
        "OPTConfig",
        {
            "vocab_size": 50272,
            "hidden_size": 1024,
            "ffn_dim": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "word_embed_proj_dim": 512,
            "do_layer_norm_before": False,
            "max_position_embeddings": 2048,
            "dropout": 0.0,
        },
    ),
    # Seven query heads to a key head, a tied table of 151,936.
    "qwen2.5-0.5b": (
        "Qwen2Config",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.2-1b": (
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
    ),
    # Norms on queries and keys leave them in float32 under autocast; windows shorter than the rows; heads of 128.
    "gemma3": (
        "Gemma3TextConfig",
        {
            "vocab_size": 32000,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "sliding_window": 100,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
}


def model(name: str, layers: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cuda", **values: Any) -> Any:
    """A random model of a shape, in eval mode; `layers` cuts its depth, `values` change its configuration."""
    kind, given = SHAPES[name]
    wanted = given | _NO_DROPOUT | values
    if layers is not None:
        wanted["num_hidden_layers"] = layers
        if "layer_types" in wanted:
            wanted["layer_types"] = wanted["layer_types"][:layers]
    torch.manual_seed(0)
    with torch.device(device):
        made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**wanted), dtype=dtype)
    return made.eval()


def rows(lengths: list[tuple[int, tuple[int, ...]]], vocabulary: int = 32000) -> list[TokenRow]:
    """Rows of random tokens: prompt length, and each reply's."""
    generator = np.random.default_rng(0)

    def ids(size: int) -> np.ndarray:
        return generator.integers(3, vocabulary, size).astype(np.int32)

    roles = ("chosen", "rejected", "gold")
    return [
        TokenRow(
            f"row-{number}",
            ids(prompt),
            tuple(Branch(role, ids(size), {"learn": np.ones(size, dtype=bool)}) for role, size in zip(roles, replies, strict=False)),
        )
        for number, (prompt, replies) in enumerate(lengths)
    ]


# One to three replies, a prompt of one token, a reply of one, a row past several blocks and every window.
LENGTHS: list[tuple[int, tuple[int, ...]]] = [
    (120, (40, 55)),
    (1, (1, 70)),
    (300, (130, 17)),
    (60, (33, 20, 90)),
    (200, (64,)),
    (12, (140, 3)),
]
