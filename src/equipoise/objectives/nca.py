"""Noise-contrastive alignment on pairs: absolute likelihood, not only its difference."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, ratio_pair


class NCA(Objective):
    """L = −log σ(βr_w) − ½ log σ(−βr_w) − ½ log σ(−βr_l), r = summed log-ratio of a reply [nats]."""

    paper: ClassVar[str] = "arXiv 2402.05369 (NCA, its pairwise form)"
    departures: ClassVar[str] = "Two replies with preference labels only; the form for K scored replies is `nca_list`."
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.01, gt=0, description="strength of the pull to the reference (1/nats)")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta)
        chosen, rejected = pair.chosen_rewards, pair.rejected_rewards
        return pair.losses(logistic(chosen) + 0.5 * logistic(-chosen) + 0.5 * logistic(-rejected))
