"""Kahneman–Tversky optimization: labels instead of pairs, and a baseline shared by the whole step."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from equipoise.core.errors import DataError
from equipoise.objectives._base import Losses, Needs, Objective, Scored


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
        label = sample.facts["label"]
        if bool(torch.isnan(label).any()):
            raise DataError("KTO needs a label (true or false) for every reply.")
        desirable = label > 0.5
        ratio = sample.logratios()
        baseline = mismatched.logratios().mean().clamp(min=0).detach()
        rewards = self.beta * (ratio - baseline)
        # 1 − σ(u) = σ(−u), which keeps its digits when u is large.
        loss = torch.where(
            desirable,
            self.desirable_weight * torch.sigmoid(-rewards),
            self.undesirable_weight * torch.sigmoid(rewards),
        )
        missing = torch.full_like(ratio, torch.nan)
        reward, logps = self.beta * ratio.detach(), sample.policy_logps().detach()
        return Losses(
            loss,
            {
                "rewards/chosen": torch.where(desirable, reward, missing),
                "rewards/rejected": torch.where(desirable, missing, reward),
                "logps/chosen": torch.where(desirable, logps, missing),
                "logps/rejected": torch.where(desirable, missing, logps),
                "kl": baseline.expand_as(ratio),
            },
        )
