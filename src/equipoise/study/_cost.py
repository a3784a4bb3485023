"""How long things take: a stated, simple cost model on a measured matrix product.

FLOPs: a forward pass costs 2 a parameter and token, a backward 4 (Kaplan et al. 2020, "Scaling Laws for Neural Language
Models", §2.1, without the attention's own term); a LoRA backward leaves out the frozen weights' gradients, so 2.
The shares of the measured matrix peak that each kind of work reaches were measured with SmolLM2-135M on two cores; they
are rough elsewhere, and a run corrects its estimate by what its own stages took.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from equipoise.core import assets
from equipoise.core.files import read_json

TRAIN_SHARE = 0.45
"""Share of the matrix peak a training step reaches."""
FORWARD_SHARE = 0.5
"""Share of the matrix peak a forward pass reaches."""
GENERATE_SHARE = 0.22
"""Share of the matrix peak that batched token-by-token generation reaches."""
_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([MmBb])(?![A-Za-z0-9])")
_MINILM = 10_700_000  # without its embeddings


def parameters_of(name: str, expected: Mapping[str, float] | None = None, head: bool = True) -> int | None:
    """Weights of a model that take part in matrix products; None where nothing is known of it.

    Counted where its config is at hand (input embeddings are looked up, so they do not count; with `head`, a language
    model's output layer does); else as `expected`, or read off its name (`opt-350m`).
    """
    folder = local_folder(name)
    if folder is None:
        if expected and name in expected:
            return int(expected[name])
        found = _SIZE.search(name)
        if found:
            return int(float(found.group(1)) * (1e9 if found.group(2) in "bB" else 1e6))
        return _MINILM if "minilm-l6" in name.lower() else None
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        return parameters_of(str(base), expected, head) if base else None
    weights, embeddings = _counted(folder)
    return weights if head else weights - embeddings


@cache
def _counted(folder: Path) -> tuple[int, int]:
    """All weights of a local model without its output layer, and those of its input embeddings (as large as an output layer)."""
    import torch
    from transformers import AutoModel

    from equipoise.models.load import load_config

    with torch.device("meta"):
        model = AutoModel.from_config(load_config(folder))
    return sum(parameter.numel() for parameter in model.parameters()), model.get_input_embeddings().weight.numel()


def local_folder(name: str) -> Path | None:
    """The folder of a model that needs no download, or None."""
    folder = assets.ready_folder(name) if name in assets.ASSETS else Path(name).expanduser()
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return folder
    if name in assets.ASSETS and (assets.raw_folder(name) / "config.json").is_file() and not assets.ASSETS[name].gguf:
        return assets.raw_folder(name)
    return None


def train_flops(parameters: int, tokens: float, lora: bool, reference: bool) -> float:
    """FLOPs of training on `tokens` unique tokens (each pass counted), with a forward of the reference where it is needed."""
    return parameters * tokens * ((4 if lora else 6) + (2 if reference else 0))


def forward_flops(parameters: int, tokens: float) -> float:
    """FLOPs of one forward pass, also of generating `tokens` one by one."""
    return 2.0 * parameters * tokens
