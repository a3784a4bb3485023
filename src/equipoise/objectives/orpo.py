"""Odds-ratio preference optimization: SFT and a preference term in one, no reference."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import log_odds, logistic, policy_pair


class ORPO(Objective):
    """L = −ℓ_w/n_w − λ log σ(o_w − o_l), o = log p̄ − log(1 − p̄), log p̄ = ℓ/n.

    ℓ/n is the mean log-prob per token of a reply [nats/token]. Reported rewards are λ·log p̄.
    """

    paper: ClassVar[str] = "arXiv 2403.07691, eq. 6 and 7"
    departures: ClassVar[str] = (
        "The SFT term covers the reply only; the authors' default covers the prompt as well. "
        "log(1 − p̄) is capped one rounding step short of p̄ = 1, where it is infinite."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"))

    beta: float = Field(default=0.1, ge=0, description="λ: weight of the odds-ratio term")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = policy_pair(scored, 1.0, "mean")
        odds = logistic(log_odds(pair.chosen_rewards) - log_odds(pair.rejected_rewards))
        rewards = replace(pair, chosen_rewards=self.beta * pair.chosen_rewards, rejected_rewards=self.beta * pair.rejected_rewards)
        return rewards.losses(self.beta * odds - pair.chosen_rewards)
