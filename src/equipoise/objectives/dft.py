"""Dynamic fine-tuning: SFT in which each token counts as much as the model already believes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise.objectives._base import Losses, Needs, Objective, Scored, masked


class DFT(Objective):
    """L = −Σ_t p_t log π_θ(y_t | x, y_<t), p_t = π_θ(y_t | x, y_<t) without gradient, divided by the tokens of the whole step.

    The gradient of a token is −∇π_θ(y_t): SFT's without its factor 1/π_θ. A unit's loss is the sum over its learned
    tokens [nats]; its count is their number, as for SFT.
    """

    paper: ClassVar[str] = "arXiv 2508.05629; formula as its abstract says and public code has it (yongliang-wu/DFT, huggingface/trl)"
    departures: ClassVar[str] = "none known"
    needs: ClassVar[Needs] = Needs(roles=("gold",))

    def __call__(self, scored: Scored) -> Losses:
        """[U] summed weighted negative log-likelihood of each gold reply, nats."""
        gold = scored.side("gold")
        lengths, logps = gold.lengths(), gold.token_logps("policy")
        # No probability is above 1, whatever rounding makes of log-probs near 0.
        weight = masked(torch.exp(logps.detach().clamp(max=0)), gold.mask)
        total = logps.detach().sum(1)
        return Losses(-(weight * logps).sum(1), {"logps/gold": total, "nll": -total / lengths, "weight": weight.sum(1) / lengths})

    def count(self, marks: Mapping[str, NDArray[np.bool_]], facts: Mapping[str, float]) -> float:
        """Learned tokens of the gold reply."""
        return float(marks["gold"].sum())
