"""Anchored supervised fine-tuning: cross-entropy weighted by the policy's own probability, and a pull to the reference.

Not to be taken for *aligned* supervised fine-tuning, which shares the abbreviation ASFT: that one is `asft`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored, masked
from equipoise.objectives._parts import log1mexp

Tensor = torch.Tensor


class AnchoredSFT(Objective):
    """L = Σ_t [(1 − p_t) + α·k_t], p_t = π_θ(y_t | …), q_t = π_ref(y_t | …).

    1 − p_t has the gradient of the weighted cross-entropy −sg(p_t) log p_t (sg: no gradient), which is −p_t ∇log p_t.
    k_t = q_t log(q_t/p_t) + (1 − q_t) log((1 − q_t)/(1 − p_t)) is the KL divergence of two outcomes, the demonstration's
    token and any other [nats]. It is never more than KL(π_ref ‖ π_θ) over the vocabulary, and equal to it where the other
    tokens keep their proportions.
    """

    paper: ClassVar[str] = (
        "arXiv 2509.23753 (abstract) and its authors' released train.py; the weighting alone is dynamic fine-tuning, arXiv 2508.05629"
    )
    departures: ClassVar[str] = (
        "Objectives see the demonstration's tokens only, so the KL over the vocabulary is replaced by its two-outcome lower bound k_t, "
        "blind to how the other tokens are reordered; its direction, KL(π_ref ‖ π_θ), and α = 0.1 are those of the authors' code. "
        "The weighted cross-entropy is written as 1 − p_t: another value, the same gradient."
    )
    needs: ClassVar[Needs] = Needs(roles=("gold",), reference="stored")

    alpha: float = Field(default=0.1, ge=0, description="α: weight of the pull to the reference (no unit); 0 is dynamic fine-tuning (DFT)")

    def __call__(self, scored: Scored) -> Losses:
        """[U] summed losses of gold replies. Raises DataError where one has no token to learn."""
        gold = scored.side("gold")
        lengths = gold.lengths()
        policy = gold.token_logps("policy").clamp(max=0)
        reference = gold.token_logps("reference").clamp(max=0)
        other = log1mexp(reference) - log1mexp(policy)
        divergence = reference.exp() * (reference - policy) - torch.expm1(reference) * other
        divergence = masked(divergence, gold.mask).sum(1)
        loss = masked(-torch.expm1(policy), gold.mask).sum(1) + self.alpha * divergence
        nll = -gold.policy_logps().detach()
        return Losses(
            loss,
            {
                "logps/gold": -nll,
                "nll": nll / lengths,
                "weight": masked(policy.detach().exp(), gold.mask).sum(1) / lengths,
                "kl": divergence.detach() / lengths,
            },
        )

    def count(self, marks: Mapping[str, NDArray[np.bool_]], facts: Mapping[str, float]) -> float:
        """Learned tokens of the gold reply."""
        return float(marks["gold"].sum())
