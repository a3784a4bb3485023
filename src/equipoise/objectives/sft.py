"""Supervised fine-tuning: the negative log-likelihood of demonstrations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from equipoise.objectives._base import Losses, Needs, Objective, Scored


class SFT(Objective):
    """L = −Σ_t log π_θ(y_t | x, y_<t), divided by the tokens of the whole step.

    A unit's loss is the sum over its learned tokens [nats]; its count is their number, so the step's loss is the mean
    per token however the batch was cut.
    """

    paper: ClassVar[str] = "maximum likelihood; the SFT stage of arXiv 2203.02155, section 3.5"
    departures: ClassVar[str] = "none"
    needs: ClassVar[Needs] = Needs(roles=("gold",))

    def __call__(self, scored: Scored) -> Losses:
        """[U] summed negative log-likelihood of each gold reply, nats."""
        gold = scored.side("gold")
        lengths = gold.lengths()
        loss = -gold.policy_logps()
        return Losses(loss, {"logps/gold": -loss.detach(), "nll": loss.detach() / lengths})

    def count(self, marks: Mapping[str, NDArray[np.bool_]], facts: Mapping[str, float]) -> float:
        """Learned tokens of the gold reply."""
        return float(marks["gold"].sum())
