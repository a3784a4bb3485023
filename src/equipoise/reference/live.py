"""References that are run beside the policy: in memory, and some of them following it.

`stored` references are cheaper wherever they will do. A live one is needed for a statistic over the whole vocabulary
(TDPO's divergence), and where the reference follows the policy: TR-DPO (arXiv 2404.09656) mixes the policy into it every
so many steps, which every step makes an exponential moving average.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from equipoise.core.errors import DataError
from equipoise.models.batch import PackedBatch
from equipoise.models.logps import by_reply, evaluating, policy_logps, reply_logits, token_logps

Tensor = torch.Tensor
FILE = "reference.safetensors"


@dataclass
class LiveReference:
    """A reference whose log-probs are computed beside the policy's.

    model: the reference model; None: the policy itself, within `context` (its fresh adapter switched off).
    """

    model: Any = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def read(self, policy: Any, batch: PackedBatch, logits: bool = False) -> tuple[Tensor, Tensor | None]:
        """[N, T] log-probs of the replies without gradient, and where asked for the [R, V] logits they come from."""
        model = policy if self.model is None else self.model
        with self.context(), torch.no_grad(), evaluating(model):
            if not logits:
                return policy_logps(model, batch), None
            table = reply_logits(model, batch)
            return by_reply(batch, token_logps(table, batch.target)), table


class FollowingReference(LiveReference):
    """A frozen copy of the policy that is moved towards it. Weights that are not trained are shared, not copied.

    For LoRA this mixes the adapters' factors, not their products: exact where the reference is replaced (mixup 1).
    """

    def __init__(self, policy: Any) -> None:
        super().__init__(frozen_copy(policy))
        self._policy = policy

    def move(self, mixup: float) -> None:
        """θ_ref ← mixup · θ + (1 − mixup) · θ_ref, for every trained weight."""
        with torch.no_grad():
            for name, theirs in self._trained():
                theirs.lerp_(self._policy.get_parameter(name).to(theirs.dtype), mixup)

    def save(self, folder: Path) -> None:
        """Write the weights that differ from the policy's frozen ones."""
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in self._trained()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises DataError where the checkpoint has none, or one of another model."""
        from safetensors.torch import load_file

        path = folder / FILE
        if not path.is_file():
            raise DataError(f"{folder} holds no {FILE}: it was written without sync_ref_model. Start afresh in another output folder.")
        values, mine = load_file(path), dict(self._trained())
        if values.keys() != mine.keys():
            raise DataError(f"{path} is of another model, or other weights were trained: start afresh in another output folder.")
        with torch.no_grad():
            for name, value in values.items():
                mine[name].copy_(value)

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if self._policy.get_parameter(name).requires_grad:
                yield name, parameter.data


def frozen_copy(model: Any) -> Any:
    """A copy in eval mode without gradients. Weights that are not trained, and buffers, are the same tensors, not copies."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    other = copy.deepcopy(model, shared)
    for parameter in other.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    return other.eval()
