"""Sequence likelihood calibration: a margin between log-probs and an SFT term, no reference."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import Reduction, negative_log_likelihood, policy_pair


class SLiC(Objective):
    """L = max(0, δ − ℓ_w + ℓ_l) + λ·NLL(y_w), ℓ = summed log-prob of a reply [nats]."""

    paper: ClassVar[str] = "arXiv 2305.10425 (SLiC-HF)"
    departures: ClassVar[str] = "The SFT target is the chosen reply (as in public code); the paper also takes the best of several samples."
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"))

    margin: float = Field(default=1.0, gt=0, description="δ: gap of summed log-probs to reach (nats)")
    sft_weight: float = Field(default=0.1, ge=0, description="λ: weight of the SFT term on the chosen reply")
    sft_reduction: Reduction = Field(default="sum", description="SFT term per token (mean) or per reply (sum), nats")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = policy_pair(scored, 1.0, "sum")
        sft = negative_log_likelihood(pair.chosen, self.sft_reduction)
        return pair.losses((self.margin - pair.margin).clamp(min=0) + self.sft_weight * sft)
