"""What makes two models one and the same: fingerprints of weights, and of all that a forward pass depends on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from equipoise.core.files import fingerprint
from equipoise.models.quantised import quantised_tensors


def weights_fingerprint(model: torch.nn.Module, skip_adapters: bool = True) -> str:
    """16 hex digits of the SHA-256 over every parameter and buffer: name, dtype, shape, bytes.

    With `skip_adapters`, LoRA weights are left out and PEFT's wrapping is undone in the names, so a model and the same
    model under an adapter agree. Buffers count because rotary frequencies change log-probs as weights do, and so do the
    scales of a quantised weight.
    About a second for 135 M float32 parameters on one core; tied weights are read once.
    """
    digest = hashlib.sha256()
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters()), **quantised_tensors(model)}
    if skip_adapters:
        tensors = {_plain_name(name): tensor for name, tensor in tensors.items() if _plain_name(name)}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def forward_fingerprint(model: Any, skip_adapters: bool = True) -> str:
    """16 hex digits of all that a forward pass depends on: `weights_fingerprint`, the config, and the settings of adapters that count.

    A window, a scale or an ε stands in the config alone, and LoRA's α in the adapter's: the same weights give other numbers.
    """
    adapters = {} if skip_adapters else getattr(model, "peft_config", None) or {}
    active: Any = getattr(model, "active_adapters", ()) if adapters else ()
    if callable(active):  # a transformers model, which may carry adapters itself
        active = active() if model._hf_peft_config_loaded else ()
    configs = [json.loads(model.config.to_json_string(use_diff=False)), *(adapters[name].to_dict() for name in active)]
    told = [{key: value for key, value in config.items() if key not in _SAYS_NOTHING} for config in configs]
    return fingerprint([weights_fingerprint(model, skip_adapters), told])


# Where a model came from and how it is asked; dtypes show in the weights.
_SAYS_NOTHING = {
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_mapping",
    "base_model_name_or_path",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "inference_mode",
    "pad_token_id",
    "peft_version",
    "revision",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def _plain_name(name: str) -> str:
    """The name a weight has without PEFT around it; empty for the adapter's own weights."""
    parts = name.removeprefix("base_model.model.").split(".")
    if any(part.startswith(("lora_", "modules_to_save")) for part in parts):
        return ""
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))
