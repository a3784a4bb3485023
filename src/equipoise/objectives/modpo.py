"""Multi-objective DPO: preferences on one objective, with the rewards of the others as a margin."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from equipoise.core.errors import DataError
from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import Pair, logistic


class MODPO(Objective):
    """L = −log σ(m), m = [βh − Σ_k w_k (R_k(y_w) − R_k(y_l))]/w, w = 1 − Σ_k w_k; or max(0, 1 − m).

    The pairs are preferences on one objective, whose weight is w; R_k is the reward of another one, higher is better.
    h = r_w − r_l, summed log-ratios [nats]. Meters show the reward this implies for the pairs' own objective,
    (βr − Σ_k w_k R_k)/w, and order by it.

    R_k is any number the data gives for each reply: columns `score_chosen` and `score_rejected` make the fact `score`, and
    where they hold mappings, each name in them is a fact. The paper's R_k is the implicit reward β log π(y|x)/π_ref(y|x)
    of a model trained by DPO on objective k: `equipoise data replies --model M`, `equipoise score` with the scorer
    `implicit`, then `data.verdicts` with what it wrote, and `weights: {implicit: …}`, the name the verdicts are signed with.
    """

    paper: ClassVar[str] = "arXiv 2310.03708 (MODPO); the hinge as in the authors' code (modpo_trainer.py)"
    departures: ClassVar[str] = (
        "Rewards are read from the data, where the authors' code computes them while training. They are taken as they are: for the "
        "weights to mean shares, R_k and βr must be on one scale."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored", facts=("score",))

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")
    weights: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        default={"score": 0.5}, min_length=1, description="w_k: fact that holds a reward → its weight; the rest to 1 is the pairs' own"
    )
    link: Literal["logistic", "hinge"] = Field(default="logistic", description="−log σ(m), or max(0, 1 − m)")

    @model_validator(mode="after")
    def _shares(self) -> Self:
        """Something must be left for the pairs' own objective."""
        if sum(self.weights.values()) >= 1:
            raise ValueError("the weights of the other objectives must sum to less than 1; the rest is that of the pairs' own")
        return self

    def facts(self) -> tuple[str, ...]:
        """The rewards of the other objectives."""
        return tuple(self.weights)

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs. Raises DataError where a reward is missing."""
        chosen, rejected = scored.side("chosen"), scored.side("rejected")
        pair = Pair(chosen, rejected, *(self._rewards(side) for side in (chosen, rejected)))
        return pair.losses(logistic(pair.margin) if self.link == "logistic" else torch.relu(1 - pair.margin))

    def _rewards(self, side: Scored) -> torch.Tensor:
        """[U] reward of the pairs' own objective that the policy implies: what is left of βr without the others, over its weight."""
        side.lengths()
        rewards = self.beta * side.logratios()
        for name, weight in self.weights.items():
            value = side.facts.get(name)
            if value is None or bool(torch.isnan(value).any()):
                raise DataError(f"MODPO needs the fact {name!r}, the reward of another objective, on both replies of every pair.")
            rewards = rewards - weight * value.to(rewards.dtype)
        return rewards / (1 - sum(self.weights.values()))
