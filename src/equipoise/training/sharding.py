"""FSDP2: weights, gradients and optimizer state cut over the processes, saved and resumed through torch's distributed checkpoint.

`fully_shard` is applied here rather than by accelerate, before the start check and the reference pass, so both run on
the sharded model, and on CPU too (accelerate shards on GPU-like devices only, and on gloo silently falls back to DDP).
Per-parameter-sharding FSDP: PyTorch RFC 114299.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from equipoise.core.errors import UsageError
from equipoise.models.gradients import gradients_in_place
from equipoise.models.logps import unwrapped

SHARDS = "sharded"
# Of an adapter's run only the adapter is saved, as in an ordinary checkpoint.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def shard(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Cut every decoder layer, then the rest, over all processes, in place. `model` may still be on the CPU: layers move one by one.

    Layers are the classes the family names in `_no_split_modules`. Raises UsageError where it names none.
    """
    names = set(getattr(unwrapped(model), "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UsageError(f"{type(unwrapped(model)).__name__} does not say which modules are its layers, so fsdp=true cannot cut it.")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def check_accelerate(device: torch.device) -> bool:
    """Whether accelerate shards (`accelerate launch` with an FSDP config). Raises UsageError where it would not, and say nothing."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and device.type == "cpu":
        raise UsageError("accelerate's FSDP needs GPUs; on CPU it would use DDP without saying so. Launch without it and set fsdp=true.")
    return asked


def whole_weights(model: torch.nn.Module) -> dict[str, Any]:
    """The whole weights in host memory, on rank 0 (empty elsewhere). Every rank must call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@contextmanager
def _any_number() -> Iterator[None]:
    """torch warns that one process saves and loads alone: here that is meant, as a run may go on with fewer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is .*assuming the intent", category=UserWarning)
        yield


class ShardedCheckpoints(Trainer):
    """The Trainer's saving and loading where `fsdp` is on. Where it is off, or accelerate shards, the library's own.

    A checkpoint holds `sharded/` (weights, optimizer and schedule) in place of `model.safetensors`, `optimizer.pt` and
    `scheduler.pt`. Any number of processes reads it, one with its model whole included.
    """

    fsdp: bool

    @property
    def sharded(self) -> bool:
        """Whether checkpoints are ours."""
        return self.fsdp and not self.is_fsdp_enabled

    def create_accelerator_and_postprocess(self) -> None:
        """A sharded model exchanges its own gradients: accelerate must not put DDP around it."""
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model

        def without_ddp(model: Any, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
            return prepare(model, device_placement=device_placement, evaluation_mode=evaluation_mode or isinstance(model, FSDPModule))

        if not self.is_fsdp_enabled:
            self.accelerator.prepare_model = without_ddp

    @contextmanager
    def exchange(self, model: Any, last: bool) -> Iterator[None]:
        """Around a micro-batch. DDP exchanges gradients after the last one only; FSDP2 after each, or it would hold them whole."""
        shards = isinstance(model, FSDPModule) or self.is_fsdp_enabled or self.is_deepspeed_enabled
        if shards or (last and isinstance(model, DistributedDataParallel)):
            yield
        else:
            with self.accelerator.no_sync(model), gradients_in_place():
                yield

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """An ordinary `save_pretrained` folder. Inside a checkpoint (`_internal_call`) the shards hold the weights."""
        if self.sharded and _internal_call:
            return
        if self.sharded or (self.is_fsdp_enabled and not _internal_call):
            weights = whole_weights(self.model) if self.sharded else self.accelerator.get_state_dict(self.model)
            if self.args.should_save:
                self._save(output_dir, state_dict=weights)
        else:
            super().save_model(output_dir, _internal_call)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm over all shards: a sharded gradient's norm comes as a DTensor, each rank holding its part."""
        norm = super()._get_grad_norm(model, grad_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds, as views of the live tensors: loading writes into them."""
        weights, optimizer = get_state_dict(self.model, self._plain_optimizer, options=_TRAINED)
        return {"model": weights, "optimizer": optimizer, "schedule": self.lr_scheduler.state_dict()}

    @property
    def _plain_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharded:
            with _any_number():
                save(self._state(), checkpoint_id=Path(output_dir) / SHARDS)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Weights, optimizer and schedule together, whatever number of processes wrote them."""
        if not self.sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            state = self._state()
            with _any_number():
                load(state, checkpoint_id=Path(checkpoint) / SHARDS)
            set_state_dict(
                self.model,
                self._plain_optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
                options=_TRAINED,
            )
            self.lr_scheduler.load_state_dict(state["schedule"])

    def _load_best_model(self) -> None:
        if not self.sharded:
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            weights = get_model_state_dict(self.model, options=_TRAINED)
            with _any_number():
                load({"model": weights}, checkpoint_id=Path(self.state.best_model_checkpoint) / SHARDS)
            self.model.load_state_dict(weights, strict=False)
