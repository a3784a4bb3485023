"""Reward modelling: the Bradley–Terry likelihood of preferences."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from equipoise.core.errors import NumericsError
from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, pair_meters


class BradleyTerry(Objective):
    """L = −log σ(s_w − s_l − m) + c (s_w + s_l)², s the model's score of a reply, m the pair's margin where it has one.

    m is the fact `margin` of the chosen reply: a column `margin` of pairs.
    """

    paper: ClassVar[str] = "arXiv 2203.02155, eq. 1; margin: arXiv 2307.09288, eq. 2; centring: arXiv 2312.09244, section 3.1"
    departures: ClassVar[str] = "none; the margin is used only where the data carries a `margin` fact"
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), readout="score")

    center_rewards_coefficient: float = Field(default=0.0, ge=0, description="c: pulls the two scores of a pair to sum to zero")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs of scores."""
        chosen, rejected = scored.side("chosen"), scored.side("rejected")
        if chosen.score is None or rejected.score is None:
            raise NumericsError("bradley_terry reads scores; the engine gave none.")
        margin = torch.nan_to_num(chosen.facts["margin"], nan=0.0) if "margin" in chosen.facts else 0.0
        loss = logistic(chosen.score - rejected.score - margin)
        if self.center_rewards_coefficient:
            loss = loss + self.center_rewards_coefficient * (chosen.score + rejected.score) ** 2
        return Losses(loss, pair_meters(chosen.score, rejected.score))
