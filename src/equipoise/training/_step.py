"""One optimizer step: every micro-batch forward and backward, the loss the same however the batch was cut.

Loss of a step = Σ_streams weight · Σ losses ÷ Σ counts, over all micro-batches and ranks. Coupled objectives make two
passes: log-probs of the whole step without gradient, the objective once for ∂loss/∂log-prob, then the micro-batches
with that cotangent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from equipoise.core.errors import NumericsError
from equipoise.data.plan import MicroBatch, Step
from equipoise.models.layers import lean_layers, rounded_once
from equipoise.objectives._base import Losses, Scored
from equipoise.training._streams import Forward, Stream, detached, join, row_names
from equipoise.training.meters import Meters

Tensor = torch.Tensor


RandomState = tuple[Tensor, Tensor | None]


class StepRunner:
    """Runs steps of a plan on one rank.

    backward: takes a scalar (accelerate's, or `Tensor.backward`). sync: context for a micro-batch; called with True for the
    last one of the step, whose backward exchanges gradients, and False for the others.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        forward: Forward,
        meters: Meters,
        backward: Callable[[Tensor], None],
        sync: Callable[[bool], AbstractContextManager[Any]],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.streams, self.forward, self.meters = streams, forward, meters
        self.backward, self.sync, self.rank, self.world_size = backward, sync, rank, world_size

    def run(self, model: Any, step: Step) -> Tensor:
        """Forward and backward of one step. Returns this rank's part of the loss times the number of ranks, detached.

        Gradients of ranks are averaged by DDP, so each rank's loss carries the factor `world_size`.
        Raises NumericsError naming the rows of a loss that is not finite.
        """
        with lean_layers(model, self.forward.kernels), rounded_once(model, self.forward.device):
            return self._run(model, step)

    def _run(self, model: Any, step: Step) -> Tensor:
        micro_batches = step.ranks[self.rank]
        scales = [
            stream.weight * self.world_size / stream.counts[list(rows)].sum() for stream, rows in zip(self.streams, step.rows, strict=True)
        ]
        cotangents, random_state = self._coupled(model, micro_batches)
        total = torch.zeros((), device=self.forward.device, dtype=torch.float32)
        seen: list[tuple[MicroBatch, Tensor]] = []
        for number, micro in enumerate(micro_batches):
            stream = self.streams[micro.stream]
            with self.sync(number == len(micro_batches) - 1):
                if number in random_state:
                    _set_random_state(random_state[number])
                scored = self.forward.scored(model, stream, micro.rows)
                if number in cotangents:
                    losses, gradient = cotangents[number]
                    values = scored.policy if scored.policy is not None else scored.score
                    assert values is not None
                    surrogate = (values * gradient).sum() * scales[micro.stream]
                else:
                    losses = stream.objective(scored)
                    surrogate = losses.sum.sum() * scales[micro.stream]
                seen.append((micro, losses.sum.detach()))
                self.backward(surrogate * 0.0 if micro.idle else surrogate)
            if not micro.idle:
                total += losses.sum.detach().sum().float() * scales[micro.stream]
                self.meters.add(losses.meters, f"{stream.name}/" if len(self.streams) > 1 else "")
        self._check(seen)
        return total

    def _coupled(self, model: Any, micro_batches: Sequence[MicroBatch]) -> tuple[dict[int, tuple[Losses, Tensor]], dict[int, RandomState]]:
        """First pass of coupled objectives: per micro-batch, its losses and ∂(sum of losses)/∂(log-probs) [N, T].

        Also the random state each micro-batch began with, so that dropout is the same in the second pass.
        """
        cotangents: dict[int, tuple[Losses, Tensor]] = {}
        states: dict[int, RandomState] = {}
        for index, stream in enumerate(self.streams):
            if not stream.objective.needs.coupled:
                continue
            mine = [number for number, micro in enumerate(micro_batches) if micro.stream == index]
            parts = []
            for number in mine:
                states[number] = _random_state(self.forward.device)
                with torch.no_grad():
                    parts.append(detached(self.forward.scored(model, stream, micro_batches[number].rows)))
            everyone, first = self._gather(parts, [micro_batches[number].idle for number in mine])
            values = everyone.policy if everyone.policy is not None else everyone.score
            assert values is not None
            values.requires_grad_()
            losses = stream.objective(everyone)
            (gradient,) = torch.autograd.grad(losses.sum.sum(), values)
            branch, unit = first
            for number, part in zip(mine, parts, strict=True):
                if micro_batches[number].idle:
                    cotangents[number] = (
                        Losses(torch.zeros(part.units, device=values.device)),
                        torch.zeros_like(part.mask, dtype=gradient.dtype),
                    )
                    continue
                branches, units = len(part.mask), part.units
                cut = gradient[branch : branch + branches]
                if cut.ndim == 2:
                    cut = cut[:, : part.mask.shape[1]]
                chosen = slice(unit, unit + units)
                cotangents[number] = (
                    Losses(losses.sum[chosen].detach(), {name: value[chosen] for name, value in losses.meters.items()}),
                    cut,
                )
                branch, unit = branch + branches, unit + units
        return cotangents, states

    def _gather(self, parts: Sequence[Scored], idle: Sequence[bool]) -> tuple[Scored, tuple[int, int]]:
        """The whole step's view over all ranks, and where this rank's branches and units begin in it."""
        real = [part for part, skip in zip(parts, idle, strict=True) if not skip]
        if self.world_size == 1:
            return join(real), (0, 0)
        everyone: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(everyone, real)
        before = [part for rank in everyone[: self.rank] for part in rank]
        joined = join([part for rank in everyone for part in rank])
        return joined, (sum(len(part.mask) for part in before), sum(part.units for part in before))

    def _check(self, seen: Sequence[tuple[MicroBatch, Tensor]]) -> None:
        """One read-back a step, before the optimizer moves anything; only a step that failed looks for its rows."""
        if bool(torch.stack([torch.isfinite(losses).all() for _, losses in seen]).all()):
            return
        for micro, losses in seen:
            stream = self.streams[micro.stream]
            bad = [stream.rows[micro.rows[index]].id for index in torch.nonzero(~torch.isfinite(losses)).flatten().tolist()]
            if bad:
                name = type(stream.objective).__name__
                raise NumericsError(
                    f"The {name} loss is not finite for rows {', '.join(bad[:8])} (micro-batch: {row_names(stream, micro)}). "
                    "The weights were not updated. Lower the learning rate, or look at these rows."
                )


def _random_state(device: torch.device) -> RandomState:
    """The random states a forward pass draws its dropout from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: RandomState) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
