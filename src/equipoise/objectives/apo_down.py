"""Anchored preference optimization, down: both replies down, the rejected one further."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import ratio_pair


class APODown(Objective):
    """L = σ(βr_w) + 1 − σ(β(r_w − r_l)), r = summed log-ratio of a reply [nats]. For a model better than the chosen replies."""

    paper: ClassVar[str] = "arXiv 2408.06266, eq. 8"
    departures: ClassVar[str] = "none"
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta)
        return pair.losses(torch.sigmoid(pair.chosen_rewards) + torch.sigmoid(-pair.margin))
