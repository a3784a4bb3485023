"""Preference-oriented SFT: demonstrations on which the model should score above aligned models."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from equipoise.core.errors import DataError
from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic


class PoFT(Objective):
    """L = −log σ(β(ℓ_g/n_g − a) + γ), ℓ_g/n_g = mean log-prob per token of the gold reply [nats/token].

    a is the fact `aligned_logps` of the reply: the same mean under aligned models, averaged over them, each with its own
    chat template and tokenizer. The gradient is SFT's, weighted by how far the model scores below them.
    """

    paper: ClassVar[str] = "arXiv 2412.12865"
    departures: ClassVar[str] = (
        "Formula as in the authors' code; the aligned models' mean log-prob is one number per reply, computed beforehand."
    )
    needs: ClassVar[Needs] = Needs(roles=("gold",), facts=("aligned_logps",))

    beta: float = Field(default=1.0, gt=0, description="scale of the gap of mean log-probs (tokens/nat)")
    gamma: float = Field(default=0.0, description="γ: added to the scaled gap")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of demonstrations. Raises DataError where the fact is missing."""
        gold = scored.side("gold")
        logps = gold.policy_logps()
        aligned = gold.facts["aligned_logps"].to(logps.dtype)
        if bool(torch.isnan(aligned).any()):
            raise DataError("PoFT needs the fact `aligned_logps` (mean log-prob per token under aligned models) on every gold reply.")
        gap = logps / gold.lengths() - aligned
        return Losses(
            logistic(self.beta * gap + self.gamma),
            {"logps/gold": logps.detach(), "gap": gap.detach(), "accuracies": (gap > 0).to(gap.dtype)},
        )
