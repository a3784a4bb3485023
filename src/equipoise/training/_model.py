"""The policy as a run trains it, and its reference: adapters, frozen weights, dropout, and who fills the store."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from equipoise.core.errors import UsageError
from equipoise.core.files import file_fingerprint
from equipoise.data.rows import TokenRow
from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.load import is_adapter, load_causal, load_sequence_classifier, renaming_is_known, resolve_model, weights_fingerprint
from equipoise.models.logps import unwrapped
from equipoise.models.quantised import FourBit, compute_dtypes, is_quantised, settle
from equipoise.reference.build import build, check
from equipoise.reference.key import Context
from equipoise.reference.store import ReferenceStore
from equipoise.training._ranks import Ranks
from equipoise.training._streams import Forward
from equipoise.training.settings import TrainSettings
from equipoise.training.sharding import shard
from equipoise.training.start_check import choose_form

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
CHECKED_ROWS = 2


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


def stored_tolerance(report: dict[str, Any]) -> float:
    """Mean nats a token by which log-probs from other batch shapes may differ: twice what the start check allowed, at least 1e-3."""
    return float(max(2 * report["tolerance"], 1e-3))


def reference_identity(model: Any, fresh_adapter: bool) -> tuple[str, str]:
    """Fingerprint of the start weights as a reference, and what their adapter is. Read before the model is cut."""
    adapter = "active" if hasattr(model, "peft_config") and not fresh_adapter else "none"
    return weights_fingerprint(model, skip_adapters=fresh_adapter), adapter


def fill_store(
    settings: TrainSettings,
    model: Any,
    identity: tuple[str, str] | None,
    rows: Sequence[TokenRow],
    forward: Forward,
    tolerance: float,
    root: Path,
    ranks: Ranks,
) -> tuple[ReferenceStore, dict[str, float]]:
    """The store with the reference's log-probs of these rows, filled by all ranks. Returns it with what building it cost.

    identity: what `reference_identity` said of the start model. tolerance: mean nats a token by which entries already
    there may differ from what the model gives now. The reference is the start model (its fresh adapter off), or the
    model that `reference_model` names, which is loaded for its fingerprint even where the store has every row, and let
    go of again.
    """
    form, device, autocast = forward.form, forward.device, forward.autocast
    adapter_off: Callable[[], AbstractContextManager[Any]] = forward.live_reference or nullcontext
    reference = model
    if settings.reference_model is not None:
        register()
        where = torch.device("cpu") if settings.fsdp else device
        reference = load_causal(settings.reference_model, dtype=settings.dtype, device=where, four_bit=four_bit(settings))
        adapter_off = nullcontext
        identity = ranks.first(lambda: reference_identity(reference, fresh_adapter=False))
        if settings.fsdp and ranks.size > 1:
            shard(reference, device)
        else:
            reference.to(device)
        form, report = choose_form(reference, rows, settings.attention, device, autocast)
        tolerance = stored_tolerance(report)
    assert identity is not None
    context = Context(*identity, forward_dtype(settings, reference), f"{form}/{device.type}")
    store = ReferenceStore(root, context)
    # No rank may start writing before all have listed what is missing: they deal out one and the same list.
    ranks.wait()
    assert isinstance(settings.token_budget, int), "decided when the run began"
    known = [row for row in rows[:CHECKED_ROWS] if not store.missing([row])]
    with adapter_off(), nullcontext() if form == "padded" else attention_of(unwrapped(reference), NAME):
        if known:
            check(reference, known, store, form, device, autocast, tolerance)
        cost = build(reference, rows, store, form, settings.token_budget, device, autocast, ranks.rank, ranks.size)
    everyone = ranks.gather(cost)
    store.reload()
    return store, {"tokens": sum(mine["tokens"] for mine in everyone), "seconds": max(mine["seconds"] for mine in everyone)}
