"""Simple preference optimization: mean log-probs as rewards, a target margin, no reference."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, policy_pair


class SimPO(Objective):
    """L = −log σ(β(ℓ_w/n_w − ℓ_l/n_l) − γ), ℓ/n = mean log-prob per token of a reply [nats/token]."""

    paper: ClassVar[str] = "arXiv 2405.14734, eq. 6"
    departures: ClassVar[str] = "none; γ is given itself, where the authors' code takes the ratio γ/β"
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"))

    beta: float = Field(default=2.0, gt=0, description="scale of the mean log-probs (tokens/nat)")
    gamma: float = Field(default=1.0, ge=0, description="γ: target margin of the rewards; the authors search γ/β from 0.1 to 0.8")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = policy_pair(scored, self.beta, "mean")
        return pair.losses(logistic(pair.margin - self.gamma))
