"""The policy as a run trains it: adapters, frozen weights, dropout."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from equipoise.core.errors import UsageError
from equipoise.core.files import file_fingerprint
from equipoise.models.identity import forward_fingerprint
from equipoise.models.load import base_of, is_adapter, load_causal, load_sequence_classifier, renaming_is_known, resolve_model
from equipoise.models.logps import unwrapped
from equipoise.models.quantised import FourBit, compute_dtypes, is_quantised, settle
from equipoise.training.settings import TrainSettings


def model_identity(settings: TrainSettings, model: Any) -> str:
    """Fingerprint of the start model: of the object in memory, of a local folder's files, else the hub name."""
    if model is not None:
        return forward_fingerprint(model, skip_adapters=False)
    resolved = resolve_model(settings.model_name_or_path)
    if not Path(resolved).is_dir():
        return resolved
    parts = [file_fingerprint(resolved)]
    if is_adapter(resolved):
        parts.append(file_fingerprint(resolve_model(base_of(resolved))))
    return "+".join(parts)


def load_policy(settings: TrainSettings, readout: str, device: torch.device) -> Any:
    """The start model of a run, on the device; on the CPU where it is cut afterwards, as it may fit no single device whole."""
    device = torch.device("cpu") if settings.fsdp else device
    bits = four_bit(settings)
    if readout == "score":
        return load_sequence_classifier(
            settings.model_name_or_path,
            from_backbone=True,
            dtype=settings.dtype,
            device=device,
            seed=settings.seed,
            trainable=settings.use_peft,
            four_bit=bits,
        )
    return load_causal(settings.model_name_or_path, dtype=settings.dtype, device=device, trainable=settings.use_peft, four_bit=bits)


def four_bit(settings: TrainSettings) -> FourBit | None:
    """How the settings want the base quantised; None: not at all."""
    if not settings.load_in_4bit:
        return None
    compute = settings.bnb_4bit_compute_dtype or ("bfloat16" if settings.bf16 else settings.dtype)
    return FourBit(settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant, compute)


def dtype_label(settings: TrainSettings, model: Any) -> str:
    """The dtypes of a model's forward pass, as the reference store's context names them."""
    weights = "/4bit-".join([settings.dtype, *compute_dtypes(model)])
    return f"autocast-bfloat16/{weights}" if settings.bf16 else weights


def make_trainable(model: Any, settings: TrainSettings, readout: str) -> tuple[Any, bool]:
    """Put LoRA on, freeze what is not to be trained. Returns the model and whether its adapter is fresh.

    A model that already carries an adapter goes on training that one (use_peft) or has it merged in (full fine-tuning).
    What a caller froze in a model of theirs stays frozen.
    """
    fresh = False
    settle(model)
    _check_adapters(model)
    if settings.use_peft and not hasattr(model, "peft_config"):
        model, fresh = _with_lora(model, settings, readout), True
    elif not settings.use_peft:
        if is_quantised(model):
            raise UsageError("A quantised model cannot be trained itself, only adapters on it: set use_peft=true.")
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
            for parameter in model.parameters():  # under the adapter they were frozen
                parameter.requires_grad_(True)
    if settings.trainable is not None:
        pattern = re.compile(settings.trainable)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and pattern.search(name) is not None)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        why = "all of them were frozen before" if settings.trainable is None else f"trainable={settings.trainable!r} matches none"
        raise UsageError(f"No weight is left to train: {why}.")
    return model, fresh


@contextmanager
def made_trainable(model: Any, settings: TrainSettings, readout: str, given: bool) -> Iterator[tuple[Any, bool]]:
    """`make_trainable` for as long as a run lasts. A caller's own model (given) is theirs again afterwards, however the run ends.

    An adapter of ours is taken off it, and frozen is what was frozen before: the next run on the same object starts from the
    same base.
    """
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()] if given else []
    ours = given and settings.use_peft and not hasattr(model, "peft_config")
    try:
        yield make_trainable(model, settings, readout)
    finally:
        if ours:
            _take_adapter_off(model)
        for parameter, wanted in frozen:
            parameter.requires_grad_(wanted)


def _take_adapter_off(model: Any) -> None:
    """Put back the layers that PEFT wrapped in a model: those under an adapter, and a head of which it trained a copy."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "original_module"):
            model.set_submodule(name, module.original_module)
        elif _is_adapter_layer(module):
            model.set_submodule(name, module.base_layer)
    vars(model).pop("peft_config", None)


def _with_lora(model: Any, settings: TrainSettings, readout: str) -> Any:
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
    try:
        with renaming_is_known():
            return get_peft_model(model, adapter)
    except ValueError as error:
        raise UsageError(f"LoRA cannot be put on this model (lora_target_modules={targets!r}): {error}") from error


def _is_adapter_layer(module: Any) -> bool:
    """Whether PEFT put this module around a layer of the model."""
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters")


def _check_adapters(model: Any) -> None:
    """Raise UsageError for a base that holds adapter layers without being the model that trains, switches and saves them."""
    if hasattr(model, "merge_and_unload") or getattr(model, "_hf_peft_config_loaded", False):
        return
    if any(map(_is_adapter_layer, model.modules())):
        raise UsageError(
            "This model holds the layers of an adapter: hand over the PeftModel around it, or take the adapter off (unload())."
        )


def not_trained_on(model: Any) -> list[str]:
    """What a model's config asks of a training loop and this one does not do, to be said before the run goes on."""
    if getattr(unwrapped(model).config, "output_router_logits", False):
        return ["output_router_logits: the loss that balances a mixture of experts is not added, the objective alone is trained on"]
    return []


@contextmanager
def left_as_found(model: Any) -> Iterator[None]:
    """After this block a model attends, keeps a cache and recomputes activations as before it; the Trainer only ever sets the last two."""
    base = unwrapped(model)
    attention = base.config._attn_implementation
    cache, hooked = getattr(base.config, "use_cache", None), bool(getattr(base, "_require_grads_hooks", ()))
    recomputing = [(module, module.gradient_checkpointing) for module in base.modules() if hasattr(module, "gradient_checkpointing")]
    try:
        yield
    finally:
        if base.config._attn_implementation != attention:
            base.set_attn_implementation(attention)
        if cache is not None:
            base.config.use_cache = cache
        for module, before in recomputing:
            module.gradient_checkpointing = before
        if not hooked:  # recomputation makes the embedding's output ask for gradients
            base.disable_input_require_grads()


@contextmanager
def no_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Within this block every dropout of the model itself is 0; LoRA's stays as its own setting says.

    Modules keep their rates under many names, all of which say "drop", and some families read the config in every forward.
    """
    changed: list[tuple[Any, str, float]] = []
    modules = [module for name, module in model.named_modules() if "lora_dropout" not in name]
    configs = [config for module in modules if isinstance(config := getattr(module, "config", None), PreTrainedConfig)]
    for owner in [*modules, *configs]:
        for name, value in list(vars(owner).items()):
            rate = "drop" in name or (name == "p" and isinstance(owner, torch.nn.modules.dropout._DropoutNd))
            if rate and isinstance(value, float) and value > 0:
                changed.append((owner, name, value))
                setattr(owner, name, 0.0)
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def autocast_for(settings: TrainSettings, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """The context of a forward pass: bfloat16 autocast where asked for."""
    if not settings.bf16:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
