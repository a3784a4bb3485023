"""Binary classifier optimization on labels: good replies are 1, bad ones 0, around a shift shared by the whole step."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import desirable, label_meters, logistic


class BCO(Objective):
    """L = −w log σ(βr − δ) for a desirable reply, −w log σ(δ − βr) for an undesirable one.

    r = log π_θ/π_ref of the reply, summed [nats]. δ = ½ (mean of βr over the step's desirable replies + mean over its
    undesirable ones), without gradient; where the step has one kind only, its mean. Because δ is a statistic of the
    step, the objective is coupled.

    w is the fact `weight` of the reply, 1 where it has none: for undesirable replies the density ratio
    p(desirable | prompt)/p(undesirable | prompt) of a classifier of prompts, where the two kinds answer different prompts.
    """

    paper: ClassVar[str] = "arXiv 2404.04656; loss and bounds of the weight as in public code (huggingface/trl)"
    departures: ClassVar[str] = (
        "δ is of this optimizer step alone (all micro-batches and ranks), since a loss has no memory; the paper and common code keep a "
        "running mean over steps. The density ratio is computed beforehand and comes as a fact."
    )
    needs: ClassVar[Needs] = Needs(roles=("sample",), reference="stored", facts=("label",), coupled=True)

    beta: float = Field(default=0.01, gt=0, description="strength of the pull to the reference (1/nats)")
    min_density_ratio: float = Field(default=0.5, ge=0, le=1, description="smallest weight of a reply (no unit)")
    max_density_ratio: float = Field(default=10.0, ge=1, description="largest weight of a reply (no unit)")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of labelled replies. Raises DataError where a label is missing."""
        sample = scored.side("sample")
        sample.lengths()
        good = desirable(sample, "BCO")
        rewards = self.beta * sample.logratios()
        shift = _shift(rewards.detach(), good)
        loss = self._weight(sample, rewards) * logistic(torch.where(good, rewards - shift, shift - rewards))
        return Losses(loss, {**label_meters(sample, good, rewards), "delta": shift.expand_as(rewards)})

    def _weight(self, sample: Scored, rewards: torch.Tensor) -> torch.Tensor:
        """[U] weights within their bounds, 1 where a reply has none."""
        if "weight" not in sample.facts:
            return torch.ones_like(rewards)
        weight = sample.facts["weight"].to(rewards.dtype)
        return torch.nan_to_num(weight, nan=1.0).clamp(self.min_density_ratio, self.max_density_ratio)


def _shift(rewards: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
    """Mean over kinds (desirable, undesirable) of the mean reward of each kind that is there."""
    kinds = torch.stack([good, ~good]).to(rewards.dtype)
    sizes = kinds.sum(1)
    means = (kinds * rewards).sum(1) / sizes.clamp(min=1)
    return means.sum() / (sizes > 0).sum()
