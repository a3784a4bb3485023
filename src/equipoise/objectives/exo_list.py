"""Efficient exact optimization on lists of scored replies: reverse KL to the distribution their scores ask for."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from equipoise.core.errors import DataError
from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import pair_meters


class EXOList(Objective):
    """L = KL(p ‖ q) = Σ_k p_k (log p_k − log q_k) over a prompt's K replies, p = softmax_k(βr_k), q = softmax_k(R_k/β_r).

    r_k = log π_θ/π_ref of a reply, summed [nats]; R_k is its fact `score`, higher is better. Meters compare the replies
    with the highest and the lowest score.
    """

    paper: ClassVar[str] = "arXiv 2402.00856 (K replies with rewards); formula as in public code (haozheji/exact-optimization)"
    departures: ClassVar[str] = "none known; β is the paper's β_π. Both defaults are this package's: the scale of scores is the user's."
    needs: ClassVar[Needs] = Needs(roles=("sample",), reference="stored", facts=("score",), many=True)

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")
    temperature: float = Field(
        default=1.0, gt=0, description="β_r: difference of scores at which the better reply is asked for e times as often"
    )

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of lists. Raises DataError where a list has fewer than two replies or a reply no score."""
        losses, best, worst = [], [], []
        for group in scored.groups():
            score = group.facts["score"]
            if len(score) < 2:
                raise DataError(f"A list needs at least two replies; one has {len(score)}.")
            if bool(torch.isnan(score).any()):
                raise DataError("EXO needs the fact `score` on every reply of a list.")
            group.lengths()
            rewards = self.beta * group.logratios()
            wanted = torch.log_softmax(score.to(rewards.dtype) / self.temperature, 0)
            asked = torch.log_softmax(rewards, 0)
            losses.append((asked.exp() * (asked - wanted)).sum())
            best.append(rewards[score.argmax()])
            worst.append(rewards[score.argmin()])
        return Losses(torch.stack(losses), pair_meters(torch.stack(best), torch.stack(worst)))
