"""Efficient exact optimization on pairs: reverse KL to the smoothed preference."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, ratio_pair


class EXO(Objective):
    """L = KL(p ‖ q), p = (σ(βh), σ(−βh)) by the model, q = (1−ε, ε) by the label; h in summed log-ratios [nats]."""

    paper: ClassVar[str] = "arXiv 2402.00856, eq. 16"
    departures: ClassVar[str] = (
        "Two replies with preference labels only. The formula is infinite at ε = 0, so ε must be given as more than 0."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")
    label_smoothing: float = Field(default=0.001, gt=0, lt=0.5, description="ε: probability that a preference label is flipped")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta)
        right = torch.sigmoid(pair.margin) * (-logistic(pair.margin) - math.log1p(-self.label_smoothing))
        wrong = torch.sigmoid(-pair.margin) * (-logistic(-pair.margin) - math.log(self.label_smoothing))
        return pair.losses(right + wrong)
