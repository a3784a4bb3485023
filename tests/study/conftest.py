"""Tiny random models, data of a few rows, and a whole study that runs in seconds."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import synthetic

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def words(number: int, count: int = 6) -> str:
    """Words nobody else gets: prompts must not look alike, or the judge is not independent."""
    return " ".join(hashlib.sha256(f"{number} {place}".encode()).hexdigest()[:5] for place in range(count))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny random models with byte-level tokenizers: `llama` (chat template), `opt` and `reward` (none)."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        OPTConfig,
        OPTForCausalLM,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("models")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>"]
    core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate([*specials, *letters])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    common = {"vocab_size": len(core.get_vocab()), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "llama": LlamaForCausalLM(LlamaConfig(**common, **shape)),
        "reward": LlamaForSequenceClassification(LlamaConfig(**common, **shape, num_labels=1)),
        "opt": OPTForCausalLM(
            OPTConfig(
                **common,
                hidden_size=16,
                word_embed_proj_dim=16,
                ffn_dim=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=1024,
            )
        ),
    }
    for name, model in made.items():
        tokenizer.chat_template = TEMPLATE if name == "llama" else None
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(first: int, count: int) -> list[dict[str, str]]:
    """Pairs whose prompts nobody else has."""
    return [
        {"prompt": f"{words(number)}?", "chosen": f"Gladly, it is {number}.", "rejected": f"No {number}!"}
        for number in range(first, first + count)
    ]


def write_files(folder: Path) -> dict[str, str]:
    """Training pairs, judge pairs and prompts, none of which overlap."""
    axes = ("helpful", "harmful", "benign")
    prompts = [
        {"id": f"{axis}-{number}", "prompt": f"{words(1000 * place + number)}?", "axis": axis}
        for place, axis in enumerate(axes, 1)
        for number in range(3)
    ]
    return {
        "pairs": write_lines(folder / "pairs.jsonl", pairs(0, 12)),
        "judge": write_lines(folder / "judge.jsonl", pairs(100, 8)),
        "held_out": write_lines(folder / "held_out.jsonl", pairs(200, 6)),
        "prompts": write_lines(folder / "prompts.jsonl", prompts),
    }


def study_values(tiny: dict[str, str], files: dict[str, str]) -> dict[str, Any]:
    """Settings of a whole tiny study: base, sft, dpo, sft_dpo."""
    quick = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01, "tokenise": {"max_length": 256}}
    return {
        "name": "tiny",
        "model_name_or_path": tiny["llama"],
        "data": {name: {"dataset_name": files[name]} for name in ("pairs", "judge", "held_out")},
        "training": quick,
        "stages": {
            "sft": {"objective": "sft", "data": "pairs"},
            "dpo": {"objective": {"name": "dpo", "beta": 0.5}, "data": "pairs", "training": {"use_peft": True, "lora_r": 2}},
        },
        "arms": {"base": [], "sft": ["sft"], "dpo": ["dpo"], "sft_dpo": ["sft", "dpo"]},
        "judge": {"model_name_or_path": tiny["llama"], "data": "judge", "held_out": "held_out", "training": quick},
        "evaluation": {
            "prompts": [{"source": files["prompts"]}],
            "sampling": {"max_new_tokens": 4},
            "settings": {"resamples": 1000, "flips": 1000, "sweep_points": 3},
        },
        "primary": [{"a": "sft_dpo", "b": "sft", "metric": "reward_harmful"}],
    }


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return write_files(tmp_path)


@pytest.fixture
def values(tiny: dict[str, str], files: dict[str, str]) -> dict[str, Any]:
    return study_values(tiny, files)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The reference store of these tests, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("EQUIPOISE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up finished study with its report. Tests that change it take a copy (`study`)."""
    from equipoise.study.report import build_report

    folder = synthetic.build_study(tmp_path_factory.mktemp("study") / "starter")
    build_report(folder)
    return Path(folder)


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished`, without its report."""
    shutil.copytree(finished, tmp_path / "study", ignore=shutil.ignore_patterns("report"))
    return tmp_path / "study"
