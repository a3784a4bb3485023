"""Triple preference optimization, length-controlled: TPO with mean log-probs and a target margin."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, negative_log_likelihood, policy_pair


class TPOL(Objective):
    """L = −log σ(β(ℓ_w/n_w − ℓ_l/n_l) − γ) + w·NLL(y_g), all means per token [nats/token], y_g the gold reply."""

    paper: ClassVar[str] = "arXiv 2405.16681 (TPO-L)"
    departures: ClassVar[str] = "none known; formula as in public code (sahsaeedi/TPO). Defaults are those for instruct models."
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected", "gold"))

    beta: float = Field(default=2.5, gt=0, description="scale of the mean log-probs (tokens/nat)")
    gamma: float = Field(default=0.5, ge=0, description="γ: target margin of the rewards")
    sft_weight: float = Field(default=0.05, ge=0, description="weight of the SFT term on the gold reply")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of triples."""
        pair = policy_pair(scored, self.beta, "mean")
        sft = negative_log_likelihood(scored.side("gold"), "mean")
        return pair.losses(logistic(pair.margin - self.gamma) + self.sft_weight * sft)
