"""Alignment via optimal transport without pairs: the chosen rewards' distribution is to lie above the rejected ones'."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, of_same_rank, ratio_pair


class AOTUnpaired(Objective):
    """L_i = −(1−ε) log σ(βd) − ε log σ(−βd), d = r_w(i) − r_l(i): the i-th smallest log-ratios of the step's two sides.

    r = log π_θ/π_ref of a reply, summed [nats]. Chosen and rejected replies are sorted over the whole step separately;
    which of them share a prompt does not matter, so the objective is coupled. L_i is the loss of the unit whose chosen
    reply has r_w(i). A step of one pair is DPO.
    """

    paper: ClassVar[str] = "arXiv 2406.05882 (unpaired); formula as in public code (huggingface/trl)"
    departures: ClassVar[str] = (
        "Sorted over the whole optimizer step (all micro-batches and ranks); common code sorts within a micro-batch. "
        "Both sides have as many replies, since units bring one of each."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored", coupled=True)

    beta: float = Field(default=0.01, gt=0, description="strength of the pull to the reference (1/nats)")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="ε: probability that a preference label is flipped")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of units."""
        pair = ratio_pair(scored, self.beta)
        gap = pair.chosen_rewards - of_same_rank(pair.chosen_rewards, pair.rejected_rewards)
        return pair.losses((1 - self.label_smoothing) * logistic(gap) + self.label_smoothing * logistic(-gap))
