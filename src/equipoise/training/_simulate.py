"""One micro-batch of a run on shapes alone: the engine's own code over a model without weights, every allocation counted.

Model and batch are fake tensors (shape, dtype, device, no data), so a model of any size runs in seconds in no memory, and
the numbers follow the engine when it changes: nothing here knows a family, an attention or a head.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from equipoise.core.errors import UsageError
from equipoise.data.rows import Branch, TokenRow
from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.batch import Form, PackedBatch, pack
from equipoise.models.gradients import gradients_in_place
from equipoise.models.heads import can_replace
from equipoise.models.layers import lean_layers, watching
from equipoise.models.load import base_of, is_adapter, load_config, resolve_model
from equipoise.models.logps import policy_logps, scores, takes_logits_to_keep, token_logps, unwrapped
from equipoise.training._model import autocast_for, make_trainable, no_dropout
from equipoise.training.settings import TrainSettings

Lengths = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Footprint:
    """What one micro-batch takes. Bytes do not include the weights.

    tokens: positions. kept: bytes the forward pass leaves for the backward pass. peak: bytes at the worst moment of both,
    gradients included. flops: of matrix products and attention. moved: bytes that all other operations read and write.
    forward_flops, forward_moved: the forward pass's part of both.
    """

    tokens: int
    kept: int
    peak: int
    flops: float
    moved: float
    forward_flops: float
    forward_moved: float


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes of the storages that live, by their birth and death, and the work of every operation inside the block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.flops = self.moved = 0.0
        self._known: dict[int, weakref.ref[Any]] = {}

    def ignore(self, tensors: Sequence[torch.Tensor]) -> None:
        """Storages that are no part of the count (the weights)."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[id(storage)] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then enter what it made."""
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # questions about a tensor, no work
            return result
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        elif not func.is_view:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.moved += sum(leaf.numel() * leaf.element_size() for leaf in [*made, *read])
        for tensor in made:
            self._enter(tensor.untyped_storage())
        return result

    def _enter(self, storage: Any) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


class Simulation:
    """A run's model on fake tensors, as `fit` would train it.

    settings: the run's. readout: what its objectives read. device: type of the device it is to run on.
    config: of a model in memory; None: read from `model_name_or_path`. exchanged: whether gradients go to other processes.
    """

    def __init__(self, settings: TrainSettings, readout: str, device: str = "cpu", config: Any = None, exchanged: bool = False) -> None:
        self.settings, self.readout, self.device = settings, readout, torch.device(device)
        self.exchanged = exchanged
        register()
        self.mode = FakeTensorMode()
        self._watched = False
        self.model = _without_weights(settings, readout, config)
        _make_fake(self.model, self.mode, self.device)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All weights, adapters too; tied ones once."""
        return list(self.model.parameters())

    def form_of(self, rows: Sequence[Lengths]) -> Form:
        """The layout of the rows: the one that is asked for, else the first that the family runs at all."""
        if self.readout == "score":
            return "padded"
        if self.settings.attention != "auto":
            return self.settings.attention
        shares = any(len(branches) > 1 for _, branches in rows)
        for form in ("packed", "separate") if shares else ("separate",):
            try:
                self.run([(2, (2, 2) if form == "packed" else (2,))], form, training=False)
            except Exception:  # a family may fail in any way when its attention is replaced; the next form is the answer
                continue
            return form
        return "padded"

    def run(self, rows: Sequence[Lengths], form: Form, training: bool = True, accumulate: bool = True) -> Footprint:
        """What a micro-batch of rows of these lengths takes: forward and backward, or (training off) forward alone.

        accumulate: whether gradients of an earlier micro-batch of the step are there already.
        """
        self.model.train(training)
        for module in self.model.modules():
            if hasattr(module, "layerdrop"):  # it would draw a number for every layer, and here are none to compare
                module.training = False
        trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        batch = self._batch(rows, form)
        ledger = Ledger()
        with self.mode:
            ledger.ignore([*self.parameters, *self.model.buffers(), *_tensors(batch)])

        def attention() -> AbstractContextManager[Any]:
            return nullcontext() if form == "padded" else attention_of(unwrapped(self.model), NAME)

        gradients: AbstractContextManager[Any] = nullcontext() if self.exchanged else gradients_in_place()
        dropout: AbstractContextManager[Any] = nullcontext() if self.settings.dropout else no_dropout(self.model)
        if not self._watched and self.settings.bf16 and self.readout == "logps":
            with attention(), watching(self.model), self.mode, torch.no_grad(), autocast_for(self.settings, self.device)():
                self._values(batch)
            self._watched = True  # as the start check does before a run
        with attention(), gradients, dropout, lean_layers(self.model), self.mode, ledger, torch.set_grad_enabled(training):
            if form != "padded" and unwrapped(self.model).config._attn_implementation != NAME:
                raise UsageError(f"{type(unwrapped(self.model)).__name__} does not let its attention be replaced.")
            if training and accumulate:
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
            grads, ledger.flops, ledger.moved = ledger.live, 0.0, 0.0
            with autocast_for(self.settings, self.device)():
                values = self._values(batch)
            kept = ledger.live - grads
            forward = ledger.flops, ledger.moved
            if training:
                values.sum().backward()  # type: ignore[no-untyped-call]
        for parameter in trained:
            parameter.grad = None
        return Footprint(batch.tokens, kept, ledger.peak, ledger.flops, ledger.moved, *forward)

    def _values(self, batch: PackedBatch) -> torch.Tensor:
        if self.readout == "score":
            return scores(self.model, batch)
        # Without numbers the chunked head cannot be checked against the model's own: it is taken where it can be put in.
        chunked = can_replace(unwrapped(self.model).get_output_embeddings())
        if chunked or batch.padding is None:
            return policy_logps(self.model, batch, "chunked" if chunked else "logits")
        # Which columns hold replies is data, and there is none: the head runs on as many as there could be.
        columns = min(batch.ids.shape[1], len(batch.source))
        inputs = {"input_ids": batch.ids, "attention_mask": batch.padding.long(), "use_cache": False}
        kept = {"logits_to_keep": columns} if takes_logits_to_keep(self.model) else {}
        logits = self.model(**inputs, **kept).logits
        return token_logps(logits[torch.zeros_like(batch.source), torch.zeros_like(batch.source)], batch.target)

    def _batch(self, rows: Sequence[Lengths], form: Form) -> PackedBatch:
        made = [
            TokenRow(
                str(number), _ids(prompt), tuple(Branch("chosen", _ids(size), {"learn": np.ones(size, dtype=bool)}, {}) for size in sizes)
            )
            for number, (prompt, sizes) in enumerate(rows)
        ]
        batch = pack(made, form)
        with self.mode:
            moved: dict[str, Any] = {
                field.name: torch.empty(value.shape, dtype=value.dtype, device=self.device)
                for field in fields(batch)
                if isinstance(value := getattr(batch, field.name), torch.Tensor)
            }
        return replace(batch, **moved)


def _ids(size: int) -> np.ndarray:
    return np.ones(size, dtype=np.int32)


def _tensors(batch: PackedBatch) -> list[torch.Tensor]:
    return [value for field in fields(batch) if isinstance(value := getattr(batch, field.name), torch.Tensor)]


def _without_weights(settings: TrainSettings, readout: str, config: Any) -> Any:
    """The model `fit` would train, on the meta device: adapters on, frozen weights frozen, recomputation switched on."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    adapter = None
    if config is None:
        resolved = resolve_model(settings.model_name_or_path)
        if is_adapter(resolved):
            adapter, resolved = resolved, resolve_model(base_of(resolved))
        config = load_config(resolved)
    config = copy.deepcopy(config)
    kind: Any = AutoModelForCausalLM
    if readout == "score":
        kind = AutoModelForSequenceClassification
        config.num_labels = 1
        config.pad_token_id = getattr(config, "pad_token_id", None) or 0
    # A run's own random numbers must not depend on whether its memory was estimated before.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        dtype = getattr(torch, settings.dtype)
        try:
            model = kind.from_config(config, dtype=dtype, attn_implementation="sdpa")
        except ValueError as error:  # families without SDPA, as in load_causal
            first = str(error).strip().splitlines()[0]
            if "configuration class" in first:
                raise UsageError(f"{settings.model_name_or_path} cannot be trained so: {first}") from error
            model = kind.from_config(config, dtype=dtype, attn_implementation="eager")
        if adapter is not None and settings.use_peft:
            from peft import PeftConfig, get_peft_model

            model = get_peft_model(model, PeftConfig.from_pretrained(str(Path(adapter))))
        model, _ = make_trainable(model, settings, readout)
    if settings.gradient_checkpointing:
        # transformers is renaming it, and warns whenever the old name is spoken.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def _make_fake(model: torch.nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Put fake tensors on a device in the place of weights and buffers; tied weights stay tied."""
    made: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> Any:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            made[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else empty
        return made[id(tensor)]

    with mode:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = fake(tensor)
