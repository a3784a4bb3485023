"""Models and tokenizers from a name: an asset (`smollm2-135m-instruct`), a local folder, a PEFT adapter, or a hub name.

The only place that calls `from_pretrained`. Code that ships with a model is never run unless `trust_remote_code` is set.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from equipoise.core import assets
from equipoise.core.errors import EquipoiseError, UsageError, nearest
from equipoise.core.files import read_json, write_json
from equipoise.core.progress import console, say
from equipoise.models.identity import weights_fingerprint
from equipoise.models.quantised import FourBit, settle

DType = Literal["float32", "bfloat16", "auto"]
DTYPES: dict[str, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": "auto"}
ADAPTER_CONFIG = "adapter_config.json"
_CLASSIFIER = "SEQ_CLS"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


# ---- names


def resolve_model(name: str | Path) -> str:
    """What `from_pretrained` takes for this name: the folder of an asset, a checked local folder, or the hub name as it is.

    A folder that is gone but ends in an asset's name counts as that asset, so adapters trained on it can be moved between machines.
    Raises UsageError for a path that does not exist or is not a model folder.
    """
    text = str(name)
    if text in assets.ASSETS:
        return str(asset_path(text))
    folder = Path(text).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return str(folder)
    if folder.name in assets.ASSETS:
        return str(asset_path(folder.name))
    looks_like_a_path = folder.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or (os.sep != "/" and os.sep in text)
    if looks_like_a_path or folder.exists():
        raise UsageError(f"{text} is not a folder. Give a model folder, a hub name (owner/model) or one of: {', '.join(assets.ASSETS)}.")
    if "/" not in text:
        # Old hub names have no owner (gpt2); a mistyped asset is likelier to be meant when it is close.
        close = nearest(text, assets.ASSETS)
        if "Did you mean" in close:
            raise UsageError(f"There is no model named {text!r}.{close}")
    return text


def asset_path(name: str) -> Path:
    """The `save_pretrained` folder of an asset, downloaded and converted on first use."""
    ready = assets.ready_folder(name)
    if (ready / "source.json").is_file():
        return ready
    raw = assets.fetch(name)
    if not raw.weights.endswith(".gguf"):
        return raw.folder
    with assets.lock(f"{name}.ready"):
        if not (ready / "source.json").is_file():
            _convert(raw, ready)
    return ready


def _convert(raw: assets.Raw, ready: Path) -> None:
    """Turn a GGUF file into a float32 `save_pretrained` folder with its tokenizer, in one atomic step."""
    try:
        import gguf  # noqa: F401  (transformers reads GGUF through it)
    except ImportError as error:
        raise UsageError("Converting a GGUF file needs the gguf package: pip install 'equipoise[gguf]'.") from error
    say(f"converting {raw.weights} once (about half a minute)")
    # The GGUF reader draws its bar into pipes too, and has no switch for it.
    with contextlib.nullcontext() if console.is_terminal else contextlib.redirect_stderr(io.StringIO()):
        model = _load(AutoModelForCausalLM, str(raw.folder), gguf_file=raw.weights, dtype=torch.float32)
        tokenizer = _load(AutoTokenizer, str(raw.folder), gguf_file=raw.weights)
    # The weights are plain float32 from here on; what is left of the quantiser would make transformers refuse to train or save them.
    for owner in (model.config, model):
        for mark in ("quantization_config", "_pre_quantization_dtype", "hf_quantizer", "quantization_method", "is_quantized"):
            if mark in vars(owner):
                delattr(owner, mark)
    tokenizer.model_max_length = model.config.max_position_embeddings
    ready.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=ready.parent, prefix=f".{ready.name}."))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "source.json", {"source": raw.source, "weights": raw.weights, "fingerprint": weights_fingerprint(model)})
        os.chmod(temporary, 0o755)
        shutil.rmtree(ready, ignore_errors=True)
        os.replace(temporary, ready)
    except OSError as error:
        raise EquipoiseError(f"Could not write {ready}: {error.strerror or error}. Nothing was changed.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_adapter(name: str | Path) -> bool:
    """Whether a local folder holds a PEFT adapter."""
    return (Path(name) / ADAPTER_CONFIG).is_file()


def base_of(name: str | Path) -> str:
    """The model an adapter folder was trained on, as its `adapter_config.json` says."""
    base = read_json(Path(name) / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise UsageError(
            f"{name}/{ADAPTER_CONFIG} does not say base_model_name_or_path: add it, or load the base and pass adapter={str(name)!r}."
        )
    return str(base)


def _adapter_task(folder: str) -> str | None:
    """What PEFT says an adapter is for: CAUSAL_LM, SEQ_CLS, …; None where it does not say."""
    task: str | None = read_json(Path(folder) / ADAPTER_CONFIG).get("task_type")
    return task


def _check_folder(folder: Path) -> None:
    """Raise UsageError unless the folder can be loaded, saying what is missing and where a model might be instead."""
    if is_adapter(folder):
        if not any((folder / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
            raise UsageError(f"{folder} is an unfinished adapter: it has {ADAPTER_CONFIG} but no adapter_model.safetensors.")
        return
    has_config = (folder / "config.json").is_file()
    if has_config and any((folder / name).is_file() for name in WEIGHTS):
        return
    found = sorted(item.name for item in folder.iterdir())[:8]
    inside = [child.name for child in sorted(folder.iterdir()) if (child / "config.json").is_file() or is_adapter(child)]
    hint = f" Did you mean {folder / inside[-1]}?" if inside else ""
    missing = "model.safetensors" if has_config else "config.json"
    raise UsageError(
        f"{folder} is not a model folder: {missing} is missing. A model folder holds config.json and model.safetensors, "
        f"an adapter folder {ADAPTER_CONFIG} and adapter_model.safetensors. Found: {', '.join(found) or 'nothing'}.{hint}"
    )


# ---- loading


def load_tokenizer(name: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or adapter folder (its base's, where it has none), with a pad token set."""
    resolved = resolve_model(name)
    if is_adapter(resolved) and not (Path(resolved) / "tokenizer_config.json").is_file():
        resolved = resolve_model(base_of(resolved))
    tokenizer: Any = _load(AutoTokenizer, resolved, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_config(name: str | Path, trust_remote_code: bool = False) -> Any:
    """The config of a model folder or hub name: its shape, without its weights."""
    return _load(AutoConfig, resolve_model(name), trust_remote_code=trust_remote_code)


def load_causal(
    name: str | Path,
    dtype: DType = "float32",
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
    adapter: str | Path | None = None,
    trainable: bool = False,
    trust_remote_code: bool = False,
    four_bit: FourBit | None = None,
) -> PreTrainedModel:
    """A causal language model in eval mode; with its adapter on top (a `PeftModel`) where `name` or `adapter` is one.

    Args:
        name: asset, folder, adapter folder or hub name.
        dtype: of the weights; `auto` keeps the checkpoint's.
        device: None takes the accelerator where there is one, else the CPU.
        attn_implementation: falls back to `eager`, saying so, for families without it.
        adapter: a PEFT adapter folder to put on `name`.
        trainable: whether the adapter's weights ask for gradients.
        trust_remote_code: run code that ships with the model. Off unless you trust its authors.
        four_bit: quantise the weights of its linear layers while they load (needs bitsandbytes).
    """
    resolved = resolve_model(name)
    if is_adapter(resolved):
        if adapter is not None:
            raise UsageError(f"{name} is itself an adapter; it cannot carry a second one ({adapter}).")
        if _adapter_task(resolved) == _CLASSIFIER:
            raise UsageError(f"{name} is the adapter of a reward model: it gives scores, and no language model.")
        adapter, resolved = resolved, resolve_model(base_of(resolved))
    model = _load_with_attention(
        AutoModelForCausalLM,
        resolved,
        attn_implementation,
        dtype=_dtype(dtype),
        trust_remote_code=trust_remote_code,
        **_quantising(four_bit, device),
    )
    settle(model)
    if adapter is not None:
        model = _with_adapter(model, resolve_model(adapter), trainable)
    model = model.to(_device(device))
    model.eval()
    return model


def load_sequence_classifier(
    name: str | Path,
    num_labels: int = 1,
    from_backbone: bool = False,
    dtype: DType = "float32",
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
    seed: int = 0,
    trainable: bool = False,
    trust_remote_code: bool = False,
    four_bit: FourBit | None = None,
) -> PreTrainedModel:
    """A sequence classifier in eval mode: a reward model (num_labels=1) or any `AutoModelForSequenceClassification` checkpoint.

    With `from_backbone` any encoder or causal model serves, and gets a fresh head drawn from `seed`; without it a
    checkpoint that lacks a head is an error, since scoring with random weights looks like scoring.
    A reward model's adapter is put on its base, and brings the head with it (a `PeftModel`; trainable: as in `load_causal`).
    `config.pad_token_id` is always set: causal backbones read the score at the last token that is not padding.
    """
    resolved, adapter = resolve_model(name), None
    if is_adapter(resolved):
        if _adapter_task(resolved) != _CLASSIFIER:
            raise UsageError(f"{name} is the adapter of a language model, and has no classification head.")
        adapter, resolved, from_backbone = resolved, resolve_model(base_of(resolved)), True
    config = _load(AutoConfig, resolved, trust_remote_code=trust_remote_code)
    trained = any("SequenceClassification" in str(item) for item in config.architectures or ())
    if not trained and not from_backbone:
        raise UsageError(
            f"{name} has no classification head (it is a {', '.join(config.architectures or ['plain model'])}). "
            "Give a reward model, or train one on this backbone first (from_backbone=True)."
        )
    if trained and not from_backbone and num_labels != config.num_labels:
        raise UsageError(f"{name} gives {config.num_labels} scores a text, asked for {num_labels}.")
    with _no_load_report():
        model, info = _load_with_attention(
            AutoModelForSequenceClassification,
            resolved,
            attn_implementation,
            dtype=_dtype(dtype),
            num_labels=num_labels,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=from_backbone,
            **_quantising(four_bit, device),
        )
    settle(model)
    fresh = {*info["missing_keys"], *(item[0] for item in info.get("mismatched_keys", ()))}
    if fresh and not from_backbone:
        raise UsageError(f"{name} is incomplete: it lacks {', '.join(sorted(fresh)[:4])}.")
    _draw(model, fresh, seed)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = load_tokenizer(name, trust_remote_code).pad_token_id
    if adapter is not None:
        model = _with_adapter(model, adapter, trainable)
    model = model.to(_device(device))
    model.eval()
    return model


def _draw(model: PreTrainedModel, names: Iterable[str], seed: int) -> None:
    """Fill fresh weights from their own seeded stream (normal, 0.02; biases 0; norm scales 1), whatever the library left in them."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in sorted(names):
            parameter = parameters.get(name)
            if parameter is None:
                continue
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _with_adapter(model: Any, adapter: str, trainable: bool) -> Any:
    from peft import PeftModel

    if not is_adapter(adapter):
        raise UsageError(f"{adapter} is not an adapter folder: {ADAPTER_CONFIG} is missing.")
    try:
        with renaming_is_known():
            return PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UsageError(f"The adapter {adapter} does not fit its base model: {error}") from error


def _load_with_attention(kind: Any, resolved: str, attn_implementation: str, **arguments: Any) -> Any:
    """Load, and load again with eager attention where the family does not know the one asked for."""
    try:
        return _load(kind, resolved, attn_implementation=attn_implementation, **arguments)
    except UsageError as error:
        if attn_implementation == "eager" or "attention" not in str(error).lower():
            raise
        say(f"{resolved}: {attn_implementation} attention is not available for this family; using eager")
        return _load(kind, resolved, attn_implementation="eager", **arguments)


def _load(kind: Any, resolved: str, **arguments: Any) -> Any:
    """`kind.from_pretrained`, with errors for people: a folder not to be read, a family this kind does not have, code not trusted."""
    _quiet()
    try:
        return kind.from_pretrained(resolved if Path(resolved).is_dir() or _hub_answers() else _cached(resolved), **arguments)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(
            f"{resolved} could not be loaded: {first}\nGive a model folder, a hub name, or one of: {', '.join(assets.ASSETS)}."
        ) from error


def _quantising(four_bit: FourBit | None, device: str | torch.device | None) -> dict[str, Any]:
    """Arguments of `from_pretrained`. Weights are quantised where they will stay, one after the other, so the whole model never exists."""
    return {} if four_bit is None else {"quantization_config": four_bit.config(), "device_map": {"": _device(device)}}


@functools.cache
def _hub_answers() -> bool:
    return assets.hub_reachable()


def _cached(name: str) -> str:
    """The folder of a hub model in the hub's own cache: without a network, asking for each file takes a minute of retries."""
    try:
        return snapshot_download(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise OSError("the hub cannot be reached, and its cache on this machine does not hold the model.") from error


def _dtype(name: str) -> Any:
    if name not in DTYPES:
        raise UsageError(f"Unknown dtype {name!r}.{nearest(name, DTYPES)}")
    return DTYPES[name]


def _device(device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _quiet() -> None:
    """transformers draws progress bars into pipes too; ours stay silent there."""
    if not console.is_terminal:
        transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def renaming_is_known() -> Iterator[None]:
    """PEFT still asks for `is_gradient_checkpointing`, which transformers is renaming: nothing a user could act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


@contextlib.contextmanager
def _no_load_report() -> Iterator[None]:
    """Missing weights are judged here, so the library's table of them is left out."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextlib.contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Within this block a model's adapter is off. Afterwards what was frozen of it is frozen, which PEFT's own switch forgets."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, trained in wanted:
            parameter.requires_grad_(trained)
