"""CPO-SimPO: the SimPO loss with an SFT term on the chosen reply."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, negative_log_likelihood, policy_pair


class CPOSimPO(Objective):
    """L = −log σ(β(ℓ_w/n_w − ℓ_l/n_l) − γ) + w·NLL(y_w), NLL = −ℓ_w/n_w, all means per token [nats/token]."""

    paper: ClassVar[str] = "SimPO, arXiv 2405.14734, eq. 6, with the SFT term of CPO, arXiv 2401.08417; public code fe1ixxu/CPO_SIMPO"
    departures: ClassVar[str] = "none"
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"))

    beta: float = Field(default=10.0, gt=0, description="scale of the mean log-probs (tokens/nat)")
    gamma: float = Field(default=5.4, ge=0, description="γ: target margin of the rewards")
    sft_weight: float = Field(default=0.05, ge=0, description="weight of the SFT term on the chosen reply")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = policy_pair(scored, self.beta, "mean")
        sft = negative_log_likelihood(pair.chosen, "mean")
        return pair.losses(logistic(pair.margin - self.gamma) + self.sft_weight * sft)
