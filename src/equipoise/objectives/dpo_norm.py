"""Length-normalised DPO."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, ratio_pair


class DPONorm(Objective):
    """L = −log σ(β(r_w/n_w − r_l/n_l)), r/n = mean log-ratio log π_θ/π_ref per token of a reply [nats/token]."""

    paper: ClassVar[str] = "arXiv 2411.15124 (Tülu 3), length-normalised DPO"
    departures: ClassVar[str] = "The default beta is remembered from that recipe, not checked against its text."
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=5.0, gt=0, description="strength of the pull to the reference (tokens/nat)")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta, "mean")
        return pair.losses(logistic(pair.margin))
