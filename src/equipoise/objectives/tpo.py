"""Triple preference optimization: prefer chosen to rejected and imitate a third, gold reply."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, negative_log_likelihood, policy_pair


class TPO(Objective):
    """L = −log σ(β(ℓ_w − ℓ_l)) + w·NLL(y_g), ℓ = summed log-prob of a reply [nats], NLL = mean per token of the gold reply."""

    paper: ClassVar[str] = "arXiv 2405.16681"
    departures: ClassVar[str] = "none known; formula as in public code (sahsaeedi/TPO)"
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected", "gold"))

    beta: float = Field(default=0.01, gt=0, description="scale of the log-probs (1/nats)")
    sft_weight: float = Field(default=1.0, ge=0, description="weight of the SFT term on the gold reply")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of triples."""
        pair = policy_pair(scored, self.beta, "sum")
        sft = negative_log_likelihood(scored.side("gold"), "mean")
        return pair.losses(logistic(pair.margin) + self.sft_weight * sft)
