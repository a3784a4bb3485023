"""Pieces of objectives that read lists: K scored replies a unit, units of any length side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field

from equipoise.core.errors import DataError
from equipoise.objectives._base import Losses, Needs, Objective, Scored

Tensor = torch.Tensor


@dataclass(frozen=True)
class Lists:
    """The N replies of U lists. unit: [N], whose list each is in; rewards: [N], β·(log π_θ − log π_ref); score: [N], higher is better."""

    unit: Tensor
    units: int
    rewards: Tensor
    score: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """[U] sums of values [N] over each list."""
        return values.new_zeros(self.units).index_add(0, self.unit, values)

    def mean(self, values: Tensor) -> Tensor:
        """[U] means of values [N] over each list."""
        return self.sum(values) / self.sum(torch.ones_like(values))

    def log_softmax(self, values: Tensor) -> Tensor:
        """[N] log-softmax of values [N] within each list."""
        shifted = values - self._largest(values)[self.unit]
        return shifted - self.sum(shifted.exp()).log()[self.unit]

    def losses(self, loss: Tensor) -> Losses:
        """These losses [U] with the meters of a list.

        Chosen and rejected are the replies with the highest and the lowest score (their mean where several share it);
        accuracies: the share of reply pairs with different scores that the rewards order alike (½ at a tie).
        """
        rewards = self.rewards.detach()
        best = (self.score == self._largest(self.score)[self.unit]).to(rewards.dtype)
        worst = (self.score == -self._largest(-self.score)[self.unit]).to(rewards.dtype)
        chosen, rejected = (self.sum(side * rewards) / self.sum(side) for side in (best, worst))
        better = ((self.unit[:, None] == self.unit) & (self.score[:, None] > self.score)).to(rewards.dtype)
        difference = rewards[:, None] - rewards
        right = (difference > 0).to(rewards.dtype) + 0.5 * (difference == 0).to(rewards.dtype)
        meters = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": self.sum((better * right).sum(1)) / self.sum(better.sum(1)),
        }
        return Losses(loss, meters)

    def _largest(self, values: Tensor) -> Tensor:
        """[U] largest of values [N] in each list, without gradient."""
        lowest = torch.full((self.units,), -torch.inf, dtype=values.dtype, device=values.device)
        return lowest.scatter_reduce(0, self.unit, values.detach(), "amax")


class ListObjective(Objective):
    """An objective that reads K scored replies a unit, under whatever name the data gives their score."""

    needs: ClassVar[Needs] = Needs(roles=("sample",), reference="stored", facts=("score",), many=True)

    score: str = Field(default="score", min_length=1, description="name of the score R among the data's")

    def facts(self) -> tuple[str, ...]:
        """The score."""
        return (self.score,)

    def lists(self, scored: Scored, beta: float) -> Lists:
        """All replies as lists. Raises DataError where a list has fewer than two, or a reply has no such score."""
        value = scored.facts.get(self.score)
        if value is None or bool(torch.isnan(value).any()):
            raise DataError(f"{type(self).__name__} needs the fact {self.score!r}, a score, on every reply of a list.")
        sizes = torch.bincount(scored.unit)
        if bool((sizes < 2).any()):
            raise DataError(f"A list needs at least two replies; one has {int(sizes.min())}.")
        scored.lengths()
        rewards = beta * scored.logratios()
        return Lists(scored.unit, len(sizes), rewards, value.to(rewards.dtype))


class NoiseContrastive(ListObjective):
    """What InfoNCA and NCA share: the targets q = softmax_k(R_k/α) of a list's replies."""

    departures: ClassVar[str] = (
        "R is divided by α, as the authors' code does (reward_trainer.py), which takes α = 0.001, its recipe 0.0001: then nearly all "
        "of q is on the best reply. The default here is 1: the scale of scores is the data's. The code also adds 0.01 to the score "
        "of the first of four replies; left out, so replies that tie share q, and K is any number from 2."
    )

    beta: float = Field(default=0.01, gt=0, description="strength of the pull to the reference (1/nats)")
    alpha: float = Field(default=1.0, gt=0, description="α: difference of scores at which the better reply gets e times the weight")

    def targets(self, made: Lists) -> Tensor:
        """[N] q of each reply."""
        return made.log_softmax(made.score / self.alpha).exp()
