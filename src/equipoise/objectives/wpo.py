"""Weighted preference optimization: DPO in which pairs the policy itself would write count more."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, ratio_pair


class WPO(Objective):
    """L = −w log σ(βh), h in summed log-ratios [nats]; w = w(y_w) w(y_l), w(y) = exp(mean_t(log π_θ(y_t) − log Σ_v π_θ(v)²)).

    Σ_v π_θ(v)² is the probability that the policy expects of its own next token, so w compares the reply with what the
    policy would have sampled. w has no gradient, and with `clamp` is 1 at most.
    """

    paper: ClassVar[str] = "arXiv 2406.11827, weight: eq. 2 (numbered as public code does); formula as in public code (wzhouad/WPO)"
    departures: ClassVar[str] = "none known; w is cut at 1 as in the authors' code, which current TRL does not do (`clamp=false`)."
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored", stats=frozenset({"log_sum_sq"}))

    beta: float = Field(default=0.01, gt=0, description="strength of the pull to the reference (1/nats)")
    clamp: bool = Field(default=True, description="whether the pair's weight w is cut at 1")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta)
        log_weight = _own(pair.chosen) + _own(pair.rejected)
        weight = torch.exp(log_weight.clamp(max=0) if self.clamp else log_weight)
        return pair.losses(weight * logistic(pair.margin), weight=weight)


def _own(side: Scored) -> torch.Tensor:
    """[U] log w(y) of each reply, nats, without gradient."""
    return ((side.token_logps("policy") - side.stat("log_sum_sq")).sum(1) / side.lengths()).detach()
