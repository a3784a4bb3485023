"""Mixed preference optimization: preference, quality and generation in one weighted sum."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, negative_log_likelihood, ratio_pair


class MPO(Objective):
    """L = w_p(−log σ(βh)) + w_q(−log σ(βr_w) − log σ(−βr_l)) + w_g·NLL(y_w).

    r = summed log-ratio of a reply, h = r_w − r_l [nats]; NLL = mean per token of the chosen reply [nats/token].
    """

    paper: ClassVar[str] = "arXiv 2411.10442"
    departures: ClassVar[str] = "The quality term is BCO without its running shift of the rewards, as in the method bco_pair."
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")
    preference_weight: float = Field(default=0.8, ge=0, description="w_p: weight of the DPO term")
    quality_weight: float = Field(default=0.2, ge=0, description="w_q: weight of the BCO term")
    sft_weight: float = Field(default=1.0, ge=0, description="w_g: weight of the SFT term on the chosen reply")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta)
        quality = logistic(pair.chosen_rewards) + logistic(-pair.rejected_rewards)
        sft = negative_log_likelihood(pair.chosen, "mean")
        return pair.losses(self.preference_weight * logistic(pair.margin) + self.quality_weight * quality + self.sft_weight * sft)
