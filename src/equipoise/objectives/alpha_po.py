"""AlphaPO: SimPO with a bent reward."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, policy_pair, power_score


class AlphaPO(Objective):
    """L = −log σ(β(s_w − s_l) − γ), s = (1 − p̄^(−α))/α, log p̄ = mean log-prob per token of a reply [nats/token].

    α → 0 is SimPO. Reported rewards are βs.
    """

    paper: ClassVar[str] = "arXiv 2501.03884"
    departures: ClassVar[str] = "The exponent is capped at 80, where the gradient ends."
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"))

    beta: float = Field(default=2.5, gt=0, description="scale of the rewards")
    gamma: float = Field(default=0.1, ge=0, description="γ: target margin of the rewards")
    alpha: float = Field(default=0.25, description="α: how the reward bends; 0 is SimPO, any sign")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = policy_pair(scored, 1.0, "mean")
        chosen, rejected = (self.beta * power_score(means, self.alpha) for means in (pair.chosen_rewards, pair.rejected_rewards))
        rewards = replace(pair, chosen_rewards=chosen, rejected_rewards=rejected)
        return rewards.losses(logistic(rewards.margin - self.gamma))
