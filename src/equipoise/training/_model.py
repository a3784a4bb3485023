"""The policy as a run trains it: adapters, frozen weights, dropout."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from equipoise.core.errors import UsageError
from equipoise.core.files import file_fingerprint
from equipoise.models.load import is_adapter, load_causal, load_sequence_classifier, renaming_is_known, resolve_model, weights_fingerprint
from equipoise.models.quantised import FourBit, compute_dtypes, is_quantised, settle
from equipoise.training.settings import TrainSettings

_DROPOUT_FIELDS = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "hidden_dropout",
    "layerdrop",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
)


def model_identity(settings: TrainSettings, model: Any) -> str:
    """Fingerprint of the start weights: of the object in memory, of a local folder's files, else the hub name."""
    if model is not None:
        return weights_fingerprint(model, skip_adapters=False)
    resolved = resolve_model(settings.model_name_or_path)
    if not Path(resolved).is_dir():
        return resolved
    parts = [file_fingerprint(resolved)]
    if is_adapter(resolved):
        from equipoise.models.load import base_of

        parts.append(file_fingerprint(resolve_model(base_of(resolved))))
    return "+".join(parts)


def load_policy(settings: TrainSettings, readout: str, device: torch.device) -> Any:
    """The start model of a run, on the device; on the CPU where it is cut afterwards, as it may fit no single device whole."""
    device = torch.device("cpu") if settings.fsdp else device
    bits = four_bit(settings)
    if readout == "score":
        return load_sequence_classifier(
            settings.model_name_or_path, from_backbone=True, dtype=settings.dtype, device=device, seed=settings.seed, four_bit=bits
        )
    return load_causal(settings.model_name_or_path, dtype=settings.dtype, device=device, trainable=settings.use_peft, four_bit=bits)


def four_bit(settings: TrainSettings) -> FourBit | None:
    """How the settings want the base quantised; None: not at all."""
    if not settings.load_in_4bit:
        return None
    compute = settings.bnb_4bit_compute_dtype or ("bfloat16" if settings.bf16 else settings.dtype)
    return FourBit(settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant, compute)


def forward_dtype(settings: TrainSettings, model: Any) -> str:
    """The dtypes of a model's forward pass, as the reference store's context names them."""
    weights = "/4bit-".join([settings.dtype, *compute_dtypes(model)])
    return f"autocast-bfloat16/{weights}" if settings.bf16 else weights


def make_trainable(model: Any, settings: TrainSettings, readout: str) -> tuple[Any, bool]:
    """Put LoRA on, freeze what is not to be trained, switch dropout off. Returns the model and whether its adapter is fresh.

    A model that already carries an adapter goes on training that one (use_peft) or has it merged in (full fine-tuning).
    """
    fresh = False
    settle(model)
    if settings.use_peft and not hasattr(model, "peft_config"):
        from peft import LoraConfig, get_peft_model

        targets: Any = settings.lora_target_modules
        torch.manual_seed(settings.seed)
        adapter = LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="SEQ_CLS" if readout == "score" else "CAUSAL_LM",
        )
        with renaming_is_known():
            model = get_peft_model(model, adapter)
        fresh = True
    elif not settings.use_peft:
        if is_quantised(model):
            raise UsageError("A quantised model cannot be trained itself, only adapters on it: set use_peft=true.")
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    if settings.trainable is not None:
        pattern = re.compile(settings.trainable)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and pattern.search(name) is not None)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"No weight is left to train: trainable={settings.trainable!r} matches none.")
    if not settings.dropout:
        switch_dropout_off(model)
    return model, fresh


def switch_dropout_off(model: torch.nn.Module) -> None:
    """Set every dropout of the model itself to 0; LoRA's stays as its own setting says."""
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for field in _DROPOUT_FIELDS:
            if isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)


def autocast_for(settings: TrainSettings, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """The context of a forward pass: bfloat16 autocast where asked for."""
    if not settings.bf16:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
