"""Noise-contrastive alignment on lists of scored replies: absolute likelihood, not only differences."""

from __future__ import annotations

from typing import ClassVar

from equipoise.objectives._base import Losses, Scored
from equipoise.objectives._lists import NoiseContrastive
from equipoise.objectives._parts import logistic


class NCAList(NoiseContrastive):
    """L = −Σ_k q_k log σ(βr_k) − (1/K) Σ_k log σ(−βr_k) over a prompt's K replies, q = softmax_k(R_k/α).

    r is a summed log-ratio [nats], R the score of a reply, higher is better. With two replies and α → 0 it is `nca`.
    """

    paper: ClassVar[str] = "arXiv 2402.05369 (NCA, its form for rewards)"

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of lists. Raises DataError where a list has fewer than two replies or a reply no score."""
        made = self.lists(scored, self.beta)
        return made.losses(made.sum(self.targets(made) * logistic(made.rewards)) + made.mean(logistic(-made.rewards)))
