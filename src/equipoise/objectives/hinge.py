"""The hinge link on the DPO margin."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import ratio_pair


class Hinge(Objective):
    """L = max(0, 1 − βh), h = the difference of the summed log-ratios of chosen and rejected reply [nats].

    Zero, and without gradient, once h exceeds 1/β.
    """

    paper: ClassVar[str] = (
        "arXiv 2309.06657 (hinge-norm of statistical rejection sampling); the link of SLiC-HF, arXiv 2305.10425, on log-ratios"
    )
    departures: ClassVar[str] = "none; 1/β is the margin, the paper's γ is beta here"
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.05, gt=0, description="strength of the pull to the reference (1/nats)")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta)
        return pair.losses((1 - pair.margin).clamp(min=0))
