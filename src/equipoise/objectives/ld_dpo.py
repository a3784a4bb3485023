"""Length-desensitised DPO: what a reply has beyond the shorter one counts less."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, ratio_pair


class LDDPO(Objective):
    """L = −log σ(βh), h = the difference of log-ratios in which tokens after the first min(n_w, n_l) weigh α [nats].

    α = 1 is DPO; α = 0 compares both replies over their common length.
    """

    paper: ClassVar[str] = "arXiv 2409.06411"
    departures: ClassVar[str] = (
        "The weight applies to policy and reference alike, as current TRL has it; older TRL weighted the policy only."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")
    alpha: float = Field(default=0.5, ge=0, le=1, description="α: weight of tokens beyond the shorter reply")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta)
        shared = torch.minimum(pair.chosen.lengths(), pair.rejected.lengths())
        tails = [_tail(side, shared) for side in (pair.chosen, pair.rejected)]
        cut = [(1 - self.alpha) * self.beta * tail for tail in tails]
        desensitised = replace(pair, chosen_rewards=pair.chosen_rewards - cut[0], rejected_rewards=pair.rejected_rewards - cut[1])
        return desensitised.losses(logistic(desensitised.margin))


def _tail(side: Scored, shared: torch.Tensor) -> torch.Tensor:
    """[U] summed log-ratio of the tokens after the first `shared` judged ones, nats."""
    beyond = side.mask.bool() & (side.mask.cumsum(1) > shared[:, None])
    return replace(side, mask=beyond).logratios()
