"""Efficient exact optimization on lists of scored replies: reverse KL to the distribution their scores ask for."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Scored
from equipoise.objectives._lists import ListObjective


class EXOList(ListObjective):
    """L = KL(p ‖ q) = Σ_k p_k (log p_k − log q_k) over a prompt's K replies, p = softmax_k(βr_k), q = softmax_k(R_k/β_r).

    r = log π_θ/π_ref of a reply, summed [nats], R the score of a reply, higher is better.
    """

    paper: ClassVar[str] = "arXiv 2402.00856 (K replies with rewards); formula as in public code (haozheji/exact-optimization)"
    departures: ClassVar[str] = "none known; β is the paper's β_π. Both defaults are this package's: the scale of scores is the user's."

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")
    temperature: float = Field(
        default=1.0, gt=0, description="β_r: difference of scores at which the better reply is asked for e times as often"
    )

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of lists. Raises DataError where a list has fewer than two replies or a reply no score."""
        made = self.lists(scored, self.beta)
        asked, wanted = made.log_softmax(made.rewards), made.log_softmax(made.score / self.temperature)
        return made.losses(made.sum(asked.exp() * (asked - wanted)))
