"""Token-level DPO: the margin is corrected by how far the policy has left the reference along each reply."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, ratio_pair


class TDPO1(Objective):
    """L = −log σ(β(h − (K_l − K_w))), K(y) = Σ_t KL(π_ref ‖ π_θ) of the next-token distributions along y [nats].

    h is the difference of summed log-ratios [nats]. Gradient flows through both K. Reported rewards are β(r + K).
    """

    paper: ClassVar[str] = "arXiv 2404.11999 (TDPO₁); formula as in public code (Vance0124/Token-level-Direct-Preference-Optimization)"
    departures: ClassVar[str] = "none known"
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="live", stats=frozenset({"kl_ref"}))

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, 1.0)
        chosen, rejected = (side.stat("kl_ref").sum(1) for side in (pair.chosen, pair.rejected))
        corrected = replace(
            pair,
            chosen_rewards=self.beta * (pair.chosen_rewards + chosen),
            rejected_rewards=self.beta * (pair.rejected_rewards + rejected),
        )
        return corrected.losses(logistic(corrected.margin), **{"kl/chosen": chosen, "kl/rejected": rejected})
