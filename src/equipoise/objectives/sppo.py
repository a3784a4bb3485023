"""Self-play preference optimization: each log-ratio to its own target, by label or by winning probability."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from equipoise.core.errors import DataError
from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import ratio_pair


class SPPO(Objective):
    """L = (r_w − 1/(2β))² + (r_l + 1/(2β))², r = summed log-ratio of a reply [nats]. beta is the paper's 1/η.

    With `labels="soft"` the targets are (P − ½)/β, P the fact `win_probability` of each reply: how probably it beats a
    reply of the policy to the same prompt. P = 1 and 0 are the hard labels.
    """

    paper: ClassVar[str] = "arXiv 2405.00675, eq. 4.7; hard labels are winning probabilities of 1 and 0"
    departures: ClassVar[str] = (
        "Given pairs; the paper samples its pairs anew each round and estimates the probabilities. The sum of both squares, as for hard "
        "labels; the authors' code (uclaml/SPPO) halves it."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.001, gt=0, description="strength of the pull to the reference (1/nats)")
    labels: Literal["hard", "soft"] = Field(default="hard", description="targets by label, or by the fact win_probability of each reply")

    def facts(self) -> tuple[str, ...]:
        """The winning probability, where the labels are soft."""
        return ("win_probability",) if self.labels == "soft" else ()

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs. Raises DataError where soft labels lack a probability."""
        pair = ratio_pair(scored, self.beta)
        loss = torch.zeros_like(pair.margin)
        for side, rewards, hard in ((pair.chosen, pair.chosen_rewards, 1.0), (pair.rejected, pair.rejected_rewards, 0.0)):
            win = hard if self.labels == "hard" else _win_probability(side).to(rewards.dtype)
            loss = loss + ((rewards - (win - 0.5)) / self.beta).square()
        return pair.losses(loss)


def _win_probability(side: Scored) -> torch.Tensor:
    """[U] the fact `win_probability`. Raises DataError where it is missing or outside 0 to 1."""
    win = side.facts.get("win_probability")
    if win is None or not bool(((win >= 0) & (win <= 1)).all()):
        raise DataError("SPPO with soft labels needs the fact `win_probability`, between 0 and 1, on both replies of every pair.")
    return win
