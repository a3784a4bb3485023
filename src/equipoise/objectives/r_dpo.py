"""Length-regularised DPO."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, ratio_pair


class RDPO(Objective):
    """L = −log σ(βh + α(n_w − n_l)), h = the difference of summed log-ratios [nats], n = tokens of a reply.

    A chosen reply that is longer than the rejected one has part of its margin for free, so it is pushed less.
    """

    paper: ClassVar[str] = "arXiv 2403.19159"
    departures: ClassVar[str] = (
        "The sign is derived: it follows from the reward minus α per token; a public re-implementation has the opposite one. "
        "The default of α is within the ranges of third-party code, not checked against the paper."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")
    alpha: float = Field(default=0.05, ge=0, description="α: price of one token of reply (1/token)")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta)
        extra = (pair.chosen.lengths() - pair.rejected.lengths()).to(pair.margin.dtype)
        return pair.losses(logistic(pair.margin + self.alpha * extra))
