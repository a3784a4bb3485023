"""InfoNCA: the replies of a list as one classification, whose targets are their scores."""

from __future__ import annotations

from typing import ClassVar

from equipoise.objectives._base import Losses, Scored
from equipoise.objectives._lists import NoiseContrastive


class InfoNCA(NoiseContrastive):
    """L = −Σ_k q_k log softmax_k(βr_k) over a prompt's K replies, q = softmax_k(R_k/α), r = summed log-ratio [nats].

    R is the score of a reply, higher is better. With two replies and α → 0 it is DPO, the better-scored reply chosen.
    """

    paper: ClassVar[str] = "arXiv 2402.05369 (InfoNCA, its form for rewards)"

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of lists. Raises DataError where a list has fewer than two replies or a reply no score."""
        made = self.lists(scored, self.beta)
        return made.losses(-made.sum(self.targets(made) * made.log_softmax(made.rewards)))
