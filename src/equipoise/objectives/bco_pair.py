"""Binary classifier optimization on pairs: chosen is 1, rejected is 0."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, ratio_pair


class BCOPair(Objective):
    """L = −log σ(βr_w) − log σ(−βr_l), r = summed log-ratio of a reply [nats]."""

    paper: ClassVar[str] = "arXiv 2404.04656"
    departures: ClassVar[str] = (
        "Without the running shift δ of the rewards (δ = 0), so that a unit's loss depends on no other unit; paper and older code keep it."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.01, gt=0, description="strength of the pull to the reference (1/nats)")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta)
        return pair.losses(logistic(pair.chosen_rewards) + logistic(-pair.rejected_rewards))
