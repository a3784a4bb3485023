"""Self-play preference optimization with hard labels: each log-ratio to its own target."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import ratio_pair


class SPPO(Objective):
    """L = (r_w − 1/(2β))² + (r_l + 1/(2β))², r = summed log-ratio of a reply [nats]. beta is the paper's 1/η."""

    paper: ClassVar[str] = "arXiv 2405.00675, eq. 4.7, winning probabilities set to 1 and 0"
    departures: ClassVar[str] = "Hard labels on given pairs; the paper samples its pairs anew each round and estimates the probabilities."
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.001, gt=0, description="strength of the pull to the reference (1/nats)")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta)
        target = 1 / (2 * self.beta)
        chosen, rejected = pair.chosen_rewards / self.beta, pair.rejected_rewards / self.beta
        return pair.losses((chosen - target).square() + (rejected + target).square())
