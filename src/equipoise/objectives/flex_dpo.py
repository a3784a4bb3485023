"""Flex-DPO: a strength of its own for each side of the pair."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, ratio_pair


class FlexDPO(Objective):
    """L = −log σ(β⁺ r_w − β⁻ r_l), r = summed log-ratio of a reply [nats]. β⁻ < β⁺ slows the fall of the rejected reply."""

    paper: ClassVar[str] = "arXiv 2406.07327"
    departures: ClassVar[str] = (
        "The formula is taken from reviews of the paper, whose rule for adapting the strengths is not known: here they are two constants."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta_chosen: float = Field(default=0.1, gt=0, description="β⁺: strength on the chosen reply (1/nats)")
    beta_rejected: float = Field(default=0.08, gt=0, description="β⁻: strength on the rejected reply (1/nats)")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, 1.0)
        chosen, rejected = self.beta_chosen * pair.chosen_rewards, self.beta_rejected * pair.rejected_rewards
        rewards = replace(pair, chosen_rewards=chosen, rejected_rewards=rejected)
        return rewards.losses(logistic(rewards.margin))
