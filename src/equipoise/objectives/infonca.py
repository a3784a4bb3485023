"""InfoNCA: the replies of a list as one classification, whose targets are their scores."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._lists import lists


class InfoNCA(Objective):
    """L = −Σ_k q_k log softmax_k(βr_k) over a prompt's K replies, q = softmax_k(R_k/α), r = summed log-ratio [nats].

    R is the score of a reply, higher is better. With two replies and α → 0 it is DPO, the better-scored reply chosen.
    """

    paper: ClassVar[str] = "arXiv 2402.05369 (InfoNCA, its form for rewards)"
    departures: ClassVar[str] = (
        "R is divided by α, as the authors' code does (reward_trainer.py), which takes α = 0.001, its recipe 0.0001: then nearly all "
        "of q is on the best reply. The default here is 1: the scale of scores is the data's. The code also adds 0.01 to the score "
        "of the first of four replies; left out, so replies that tie share q, and K is any number from 2."
    )
    needs: ClassVar[Needs] = Needs(roles=("sample",), reference="stored", facts=("score",), many=True)

    beta: float = Field(default=0.01, gt=0, description="strength of the pull to the reference (1/nats)")
    alpha: float = Field(default=1.0, gt=0, description="α: difference of scores at which the better reply gets e times the weight")
    score: str = Field(default="score", min_length=1, description="name of the score R among the data's")

    def facts(self) -> tuple[str, ...]:
        """The score."""
        return (self.score,)

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of lists. Raises DataError where a list has fewer than two replies or a reply no score."""
        made = lists(scored, self.beta, self.score, "InfoNCA")
        wanted = made.log_softmax(made.score / self.alpha).exp()
        return made.losses(-made.sum(wanted * made.log_softmax(made.rewards)))
