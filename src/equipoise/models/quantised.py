"""Bases held in 4 bits by bitsandbytes, under LoRA (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

A quantised base is as fixed as any other: its bytes are fingerprinted with their scales, and one kernel serves the policy and
its reference, so log-probs with the adapter off equal the stored ones. What stays in floating point (embeddings, norms, head)
keeps the dtype it is loaded in: float32 unless asked otherwise, as PEFT's `prepare_model_for_kbit_training` would have it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from equipoise.core.errors import UsageError

_LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class FourBit:
    """How a base is quantised while it loads. double_quant: quantise the scales too (0.4 bits a weight less).

    compute_dtype: each weight matrix is brought back to it for its product.
    """

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = False
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def config(self) -> Any:
        """The `transformers.BitsAndBytesConfig`. Raises UsageError where bitsandbytes is not installed."""
        require_bitsandbytes()
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self.compute_dtype,
        )


def require_bitsandbytes() -> None:
    """Raise UsageError where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("load_in_4bit needs bitsandbytes, which is not installed: pip install 'equipoise[quant]'.")


def is_quantised(model: Any) -> bool:
    """Whether the weights of this model (or of the model under its adapter) are quantised."""
    return bool(getattr(model, "is_quantized", False)) or any(_quantised(parameter) for parameter in model.parameters())


def settle(model: Any) -> None:
    """Do at once what bitsandbytes would do to a model's tensors during its first forward pass, or switch it off.

    Otherwise the same weights have one fingerprint before and another after, and evaluation another kernel than training:
    on CPUs with AVX512-BF16 weights are packed anew in evaluation mode; biases are cast to the compute dtype.
    """
    for module in _quantised_linears(model):
        module.support_avx512bf16_for_cpu = False
        if module.bias is not None and module.compute_dtype is not None:
            module.bias.data = module.bias.data.to(module.compute_dtype)


def quantised_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What a quantised weight is besides its packed bytes: scales, code book, block sizes; by the names they are saved under."""
    return {
        f"{name}.{part}": value
        for name, parameter in model.named_parameters()
        if _quantised(parameter)
        for part, value in parameter.quant_state.as_dict(packed=True).items()
    }


def compute_dtypes(model: Any) -> list[str]:
    """Names of the dtypes that quantised weights of this model are brought back to; empty where none is quantised."""
    return sorted({str(module.compute_dtype).removeprefix("torch.") for module in _quantised_linears(model)})


def in_low_precision(model: Any) -> bool:
    """Whether any product of this model runs in 16 bits: by the dtype of a weight, or the dtype a quantised one is brought back to."""
    return any(parameter.dtype in _LOW for parameter in model.parameters()) or any(
        module.compute_dtype in _LOW for module in _quantised_linears(model)
    )


def _quantised_linears(model: Any) -> Iterator[Any]:
    """Modules that own a quantised weight. (A LoRA layer around one shows it as its own, so attributes will not do.)"""
    return (module for module in model.modules() if _quantised(module._parameters.get("weight")))


def _quantised(parameter: Any) -> bool:
    return getattr(parameter, "quant_state", None) is not None
