"""Anchored preference optimization, zero: chosen up, rejected down, each against the reference."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import ratio_pair


class APOZero(Objective):
    """L = 1 − σ(βr_w) + σ(βr_l), r = summed log-ratio of a reply [nats]. For chosen replies better than the model's own."""

    paper: ClassVar[str] = "arXiv 2408.06266, eq. 7"
    departures: ClassVar[str] = "none"
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta)
        # 1 − σ(u) = σ(−u), which keeps its digits when u is large.
        return pair.losses(torch.sigmoid(-pair.chosen_rewards) + torch.sigmoid(pair.rejected_rewards))
