"""Kahneman–Tversky optimization: labels instead of pairs, and a baseline shared by the whole step."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import desirable, label_meters


class KTO(Objective):
    """L = λ_D (1 − σ(β(r − z))) for a desirable reply, λ_U (1 − σ(β(z − r))) for an undesirable one.

    r = log π_θ/π_ref of the reply, summed [nats]. z = max(0, mean of r over the step's mismatched replies), without
    gradient: an estimate of KL(π_θ ‖ π_ref). Because z is a statistic of the step, the objective is coupled.
    """

    paper: ClassVar[str] = "arXiv 2402.01306, eq. 7 and 8"
    departures: ClassVar[str] = (
        "z averages over the whole optimizer step (all micro-batches and ranks); common code averages over a micro-batch. "
        "The paper's loss is λ_y − v(x, y); v is written out here, which is the same value."
    )
    needs: ClassVar[Needs] = Needs(roles=("sample", "mismatched"), reference="stored", facts=("label",), coupled=True)

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")
    desirable_weight: float = Field(default=1.0, ge=0, description="λ_D")
    undesirable_weight: float = Field(default=1.0, ge=0, description="λ_U")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of labelled replies. Raises DataError where a label is missing."""
        sample, mismatched = scored.side("sample"), scored.side("mismatched")
        good = desirable(sample, "KTO")
        ratio = sample.logratios()
        baseline = mismatched.logratios().mean().clamp(min=0).detach()
        rewards = self.beta * (ratio - baseline)
        # 1 − σ(u) = σ(−u), which keeps its digits when u is large.
        loss = torch.where(
            good,
            self.desirable_weight * torch.sigmoid(-rewards),
            self.undesirable_weight * torch.sigmoid(rewards),
        )
        return Losses(loss, {**label_meters(sample, good, self.beta * ratio), "kl": baseline.expand_as(ratio)})
