"""DPO under another divergence from the reference than reverse KL."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, power_score, ratio_pair


class FDPO(Objective):
    """L = −log σ(β f′(u_w) − β f′(u_l)), u = π_θ/π_ref of a whole reply, with r = log u [nats]:

    - forward_kl: f′ = −e^(−r)
    - jensen_shannon: f′ = log(2u/(1+u)) = log σ(r) + log 2
    - alpha: f′ = (1 − e^(−αr))/α; α → 0 is DPO (reverse KL), α = 1 is forward KL

    Reported rewards are β f′(u).
    """

    paper: ClassVar[str] = "arXiv 2309.16240"
    departures: ClassVar[str] = (
        "Formulas as in public code (alecwangcq/f-divergence-dpo). α follows that convention; TRL's is 1 − α of it. "
        "Exponents are capped at 80, where the gradient ends."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")
    divergence: Literal["forward_kl", "jensen_shannon", "alpha"] = Field(default="alpha", description="divergence from the reference")
    alpha: float = Field(default=0.5, ge=0, le=1, description="α of the alpha divergence: 0 reverse KL, 1 forward KL")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, 1.0)
        chosen, rejected = (self.beta * self._slope(ratios) for ratios in (pair.chosen_rewards, pair.rejected_rewards))
        rewards = replace(pair, chosen_rewards=chosen, rejected_rewards=rejected)
        return rewards.losses(logistic(rewards.margin))

    def _slope(self, ratios: torch.Tensor) -> torch.Tensor:
        """f′(u) from r = log u, elementwise."""
        if self.divergence == "jensen_shannon":
            return math.log(2) - logistic(ratios)
        # −e^(−r) is the α = 1 form less 1.
        return power_score(ratios, 1.0) - 1 if self.divergence == "forward_kl" else power_score(ratios, self.alpha)
