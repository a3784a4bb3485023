"""Token-level DPO, second form: only the rejected reply's divergence is trained, and a weight says how much it counts."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, ratio_pair


class TDPO2(Objective):
    """L = −log σ(β(h − α(K_l − sg K_w))), K(y) = Σ_t KL(π_ref ‖ π_θ) of the next-token distributions along y [nats].

    h is the difference of summed log-ratios [nats]; sg: K_w has no gradient, so the loss never asks for more divergence
    on the chosen reply. Reported rewards are β(r + αK).
    """

    paper: ClassVar[str] = "arXiv 2404.11999 (TDPO₂); formula as in public code (Vance0124/Token-level-Direct-Preference-Optimization)"
    departures: ClassVar[str] = "none known; the authors' code reports rewards β(r + K)."
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="live", stats=frozenset({"kl_ref"}))

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")
    alpha: float = Field(default=0.5, ge=0, description="α: weight of the difference of divergences; 0 is DPO")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, 1.0)
        chosen, rejected = (side.stat("kl_ref").sum(1) for side in (pair.chosen, pair.rejected))
        corrected = replace(
            pair,
            chosen_rewards=self.beta * (pair.chosen_rewards + self.alpha * chosen.detach()),
            rejected_rewards=self.beta * (pair.rejected_rewards + self.alpha * rejected),
        )
        return corrected.losses(logistic(corrected.margin), **{"kl/chosen": chosen, "kl/rejected": rejected})
