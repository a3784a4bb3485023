"""Anchored preference optimization, zero, on labels: good replies up and bad ones down, each against the reference."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import desirable, label_meters


class APOZeroUnpaired(Objective):
    """L = 1 − σ(βr) for a desirable reply, σ(βr) for an undesirable one, r = summed log-ratio of the reply [nats].

    `apo_zero` taken apart: the two sides of a pair as labelled replies have its loss between them. KTO without its baseline.
    """

    paper: ClassVar[str] = "arXiv 2408.06266, eq. 7, side by side; on labels as in public code (huggingface/trl, KTO's apo_zero_unpaired)"
    departures: ClassVar[str] = "The paper's loss is of pairs; replies with labels need none."
    needs: ClassVar[Needs] = Needs(roles=("sample",), reference="stored", facts=("label",))

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of labelled replies. Raises DataError where a label is missing."""
        sample = scored.side("sample")
        sample.lengths()
        good = desirable(sample, "APO-zero")
        rewards = self.beta * sample.logratios()
        # 1 − σ(u) = σ(−u), which keeps its digits when u is large.
        return Losses(torch.sigmoid(torch.where(good, -rewards, rewards)), label_meters(sample, good, rewards))
