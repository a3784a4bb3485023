"""Alignment via optimal transport on pairs: the margins' distribution is to lie above the reference's."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, of_same_rank, ratio_pair


class AOT(Objective):
    """L_i = −(1−ε) log σ(βd) − ε log σ(−βd), d = m_(i) − m^ref_(i): the i-th smallest margins of the step.

    m = log π_θ(y_w|x) − log π_θ(y_l|x) and m^ref the same under the reference, summed over tokens [nats], are sorted over
    the whole step separately, so a pair's margin meets the reference's margin of some other pair: the objective is
    coupled. L_i is the loss of the pair whose policy margin is m_(i). A step of one pair is DPO.
    """

    paper: ClassVar[str] = "arXiv 2406.05882 (paired); formula as in public code (huggingface/trl)"
    departures: ClassVar[str] = (
        "Sorted over the whole optimizer step (all micro-batches and ranks); common code sorts within a micro-batch."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored", coupled=True)

    beta: float = Field(default=0.01, gt=0, description="strength of the pull to the reference (1/nats)")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="ε: probability that a preference label is flipped")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta)
        margins = pair.chosen.policy_logps() - pair.rejected.policy_logps()
        reference = pair.chosen.reference_logps() - pair.rejected.reference_logps()
        gap = self.beta * (margins - of_same_rank(margins, reference))
        return pair.losses((1 - self.label_smoothing) * logistic(gap) + self.label_smoothing * logistic(-gap))
