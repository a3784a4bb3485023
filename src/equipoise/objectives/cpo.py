"""Contrastive preference optimization: DPO without its reference, kept in place by an SFT term."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import Reduction, logistic, negative_log_likelihood, policy_pair


class CPO(Objective):
    """L = −log σ(β(ℓ_w − ℓ_l)) + w·NLL(y_w), ℓ = summed log-prob of a reply [nats]."""

    paper: ClassVar[str] = "arXiv 2401.08417"
    departures: ClassVar[str] = (
        "The SFT term is a mean per token by default, as in common code; `sft_reduction='sum'` is the likelihood of the whole reply."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"))

    beta: float = Field(default=0.1, gt=0, description="scale of the log-probs (1/nats)")
    sft_weight: float = Field(default=1.0, ge=0, description="weight of the SFT term on the chosen reply")
    sft_reduction: Reduction = Field(default="mean", description="SFT term per token (mean) or per reply (sum), nats")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = policy_pair(scored, self.beta, "sum")
        sft = negative_log_likelihood(pair.chosen, self.sft_reduction)
        return pair.losses(logistic(pair.margin) + self.sft_weight * sft)
