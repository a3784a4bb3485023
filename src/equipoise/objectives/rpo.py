"""Regularised preference optimization: DPO with an SFT term on the chosen reply."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import Reduction, logistic, negative_log_likelihood, ratio_pair


class RPO(Objective):
    """L = −log σ(βh) + w·NLL(y_w), h = the difference of summed log-ratios [nats]; NLL per token or per reply.

    With w and `sft_reduction` free this is also SFT-DPO and the loss of iterative RPO.
    """

    paper: ClassVar[str] = "arXiv 2405.16436"
    departures: ClassVar[str] = (
        "The SFT weight stands alone: the authors' first code multiplies it by β as well (0.005·β on the sum). "
        "Defaults are their later code's (0.2 on the mean, β = 0.5)."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.5, gt=0, description="strength of the pull to the reference (1/nats)")
    sft_weight: float = Field(default=0.2, ge=0, description="weight of the SFT term on the chosen reply")
    sft_reduction: Reduction = Field(default="mean", description="SFT term per token (mean) or per reply (sum), nats")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta)
        sft = negative_log_likelihood(pair.chosen, self.sft_reduction)
        return pair.losses(logistic(pair.margin) + self.sft_weight * sft)
