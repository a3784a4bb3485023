"""Discovered preference optimization: logistic and exponential loss, mixed by the margin itself."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, ratio_pair


class DiscoPOP(Objective):
    """L = (1−m)(−log σ(z)) + m e^(−z), m = σ(z/τ), z = βh, h = the difference of summed log-ratios [nats]."""

    paper: ClassVar[str] = "arXiv 2406.08414, eq. 5 (log-ratio modulated loss)"
    departures: ClassVar[str] = (
        "τ above 1 is refused: there m e^(−z) grows without bound as z falls. m is differentiated, as in the authors' code."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.05, gt=0, description="strength of the pull to the reference (1/nats)")
    temperature: float = Field(default=0.05, gt=0, le=1, description="τ: how sharply the margin switches the two losses")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta)
        switch = pair.margin / self.temperature
        # m·e^(−z) as one exponential: neither factor can overflow on its own.
        exponential = torch.exp(-logistic(switch) - pair.margin)
        return pair.losses(torch.sigmoid(-switch) * logistic(pair.margin) + exponential)
