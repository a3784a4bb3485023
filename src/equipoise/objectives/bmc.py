"""Bridging and modelling correlations: DPO that weighs the tokens in which the replies differ by the policy's own doubt."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field

from equipoise.core.errors import NumericsError
from equipoise.objectives._base import Losses, Needs, Objective, Scored, masked
from equipoise.objectives._parts import Pair, logistic


class BMC(Objective):
    """L = −log σ(R_w − R_l), R = β Σ_t λ_t log(π_θ/π_ref)(y_t), λ_t = 1 + d_t min(1/π_θ(y_t), δ).

    d_t is 1 where a token is not part of what the two replies have in common, in order (the mark `differs`), else 0. λ
    carries no gradient. At δ = 0 it is DPO. Meters show R; `weights` is the mean λ of the pair's tokens.
    """

    paper: ClassVar[str] = "arXiv 2408.07471 (BMC, the modelling step); δ and the difference as in the authors' code"
    departures: ClassVar[str] = (
        "λ is the policy's in both terms, so R is a reward on log-ratios; the authors' code weighs the reference's log-probs by the "
        "reference's own 1/π. The code leaves out stop words from d; tokens here are ids, so they are not. The bridging step (a rejected "
        "reply edited towards the chosen one) is the data's: any pairs train. β is 0.01 in the code's chat recipes."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored", marks=frozenset({"differs"}))

    beta: float = Field(default=0.01, gt=0, description="strength of the pull to the reference (1/nats)")
    delta: float = Field(default=2.0, ge=0, description="δ: most that a differing token gains in weight; 0 is DPO")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        if "differs" not in scored.marks:
            raise NumericsError("BMC needs the mark `differs`, and the engine gave none.")
        chosen, rejected = scored.side("chosen"), scored.side("rejected")
        weights = [self._weights(side) for side in (chosen, rejected)]
        ratios = [side.token_logps("policy") - side.token_logps("reference") for side in (chosen, rejected)]
        rewards = [self.beta * (weight * ratio).sum(1) for weight, ratio in zip(weights, ratios, strict=True)]
        pair = Pair(chosen, rejected, *rewards)
        losses = pair.losses(logistic(pair.margin))
        mean = (weights[0].sum(1) + weights[1].sum(1)) / (chosen.lengths() + rejected.lengths())
        return Losses(losses.sum, {**losses.meters, "weights": mean})

    def _weights(self, side: Scored) -> torch.Tensor:
        """[U, T] λ of each token, without gradient; 0 outside the mask."""
        logps = side.token_logps("policy").detach()
        # min(1/π, δ), with the exponent capped first: e^x would overflow.
        gain = torch.exp((-logps).clamp(max=math.log(self.delta))) if self.delta else torch.zeros_like(logps)
        return masked(1 + gain * side.marks["differs"], side.mask)
