"""Robust DPO: an unbiased loss under labels flipped at a known rate."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, ratio_pair


class Robust(Objective):
    """L = [−(1−ε) log σ(βh) + ε log σ(−βh)] / (1−2ε), h = the difference of summed log-ratios [nats].

    Averaged over labels that are flipped with probability ε, L is the DPO loss of the true labels. L has no lower bound.
    """

    paper: ClassVar[str] = "arXiv 2403.00409 (provably robust DPO)"
    departures: ClassVar[str] = "none"
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")
    label_smoothing: float = Field(default=0.1, ge=0, lt=0.5, description="ε: probability that a preference label is flipped")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta)
        right, flipped = logistic(pair.margin), logistic(-pair.margin)
        return pair.losses(((1 - self.label_smoothing) * right - self.label_smoothing * flipped) / (1 - 2 * self.label_smoothing))
