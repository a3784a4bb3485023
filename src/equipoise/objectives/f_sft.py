"""Supervised fine-tuning under an f-divergence: demonstrations lose weight as the policy leaves the reference for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored, masked

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Divergence:
    """φ_f(s) = inf_u (s·u + f(u)), its slope w_f(s) = argmin_u, and where (as a function of w) that slope is reached."""

    phi: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]
    where: Callable[[float], float]


def _root(s: Tensor) -> Tensor:
    return torch.sqrt(1 + s)


# f(u) of u = π/π_E in the comment; forms that keep their digits near s = 0.
_DIVERGENCES: Mapping[str, _Divergence] = {
    # ½|u − 1|, in its linear part |s| ≤ ½
    "total_variation": _Divergence(lambda s: s, torch.ones_like, lambda weight: -math.inf),
    # (u − 1)²; u ≥ 0 makes φ flat beyond s = 2
    "pearson": _Divergence(
        lambda s: s.clamp(max=2) * (1 - s.clamp(max=2) / 4), lambda s: 1 - s.clamp(max=2) / 2, lambda weight: 2 - 2 * weight
    ),
    # (√u − 1)²
    "hellinger": _Divergence(lambda s: s / (1 + s), lambda s: (1 + s) ** -2, lambda weight: weight**-0.5 - 1),
    # −log u + u − 1
    "forward_kl": _Divergence(torch.log1p, lambda s: 1 / (1 + s), lambda weight: 1 / weight - 1),
    # u log u − u + 1
    "reverse_kl": _Divergence(lambda s: -torch.expm1(-s), lambda s: torch.exp(-s), lambda weight: -math.log(weight)),
    # u log u − (u + 1) log((u + 1)/2)
    "jensen_shannon": _Divergence(
        lambda s: torch.log1p(-torch.expm1(-s)),
        lambda s: torch.exp(-s) / (2 - torch.exp(-s)),
        lambda weight: math.log((1 + 1 / weight) / 2),
    ),
    # (1 − u)²/u
    "neyman": _Divergence(lambda s: 2 * s / (1 + _root(s)), lambda s: 1 / _root(s), lambda weight: weight**-2 - 1),
}


class FSFT(Objective):
    """L = −φ_f(s)/β, s = β log π_θ/π_ref of a demonstration; its gradient is −w_f(s) ∇log π_θ with w_f(0) = 1.

    φ_f comes from min_π D_f(π ‖ π_E) + β KL(π ‖ π_ref), π_E the expert who wrote the demonstrations. At the reference
    the gradient is SFT's whatever f; total variation is SFT (φ = s, up to the constant log π_ref), and so is β → 0. All
    others weigh a demonstration down as s grows (Pearson: L = −Δ + β/4 Δ², Δ = s/β) and up where s is negative.

    Levels: `sequence` puts φ on the reply's summed log-ratio, `sequence_mean` on its mean per token, `token` on each
    token's, summed. A unit's loss is in nats; the constant log π_ref keeps it below the negative log-likelihood.
    """

    paper: ClassVar[str] = "derived by this package from the variational principle of arXiv 2507.00018 (abstract)"
    departures: ClassVar[str] = (
        "Derived, not read: the paper's own expressions, level, direction of D_f, place of β and treatment of the value V(x) are unknown "
        "here. Choices made: V(x) = 0; division by β, so that the gradient at the reference is SFT's; the linear part of total variation; "
        "φ goes on along its tangent where w would exceed max_weight; Pearson is flat beyond s = 2. `sequence` is divided by the step's "
        "tokens like SFT, where the derivation has a mean over sequences."
    )
    needs: ClassVar[Needs] = Needs(roles=("gold",), reference="stored")

    divergence: Literal["pearson", "hellinger", "forward_kl", "reverse_kl", "jensen_shannon", "neyman", "total_variation"] = Field(
        default="pearson",
        description="D_f(policy ‖ expert): forward_kl is KL(expert ‖ policy), reverse_kl is KL(policy ‖ expert), total_variation is SFT",
    )
    beta: float = Field(
        default=1.0, gt=0, description="strength of the pull to the reference (1/nats); smaller for `sequence`, whose s sums"
    )
    level: Literal["token", "sequence", "sequence_mean"] = Field(
        default="token", description="what one log-ratio is: a token's, a reply's sum (as derived), or a reply's mean per token"
    )
    max_weight: float = Field(
        default=10.0,
        gt=1,
        le=1000,
        description="largest weight of a demonstration relative to SFT's (no unit); bounds replies the policy has lost",
    )

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of gold replies. Raises DataError where one has no token to learn."""
        gold = scored.side("gold")
        lengths, total = gold.lengths(), gold.logratios()
        nll = -gold.policy_logps().detach()
        if self.level == "token":
            tokens = gold.token_logps("policy") - gold.token_logps("reference")
            value, weight = self._link(self.beta * tokens)
            value, weight = masked(value, gold.mask).sum(1), masked(weight, gold.mask).sum(1) / lengths
        else:
            value, weight = self._link(self.beta * (total if self.level == "sequence" else total / lengths))
        meters = {"logps/gold": -nll, "nll": nll / lengths, "rewards/gold": self.beta * total.detach(), "weight": weight}
        return Losses(-value / self.beta, meters)

    def count(self, marks: Mapping[str, NDArray[np.bool_]], facts: Mapping[str, float]) -> float:
        """Learned tokens of the gold reply, as for SFT; 1 where the log-ratio is already a mean."""
        return 1.0 if self.level == "sequence_mean" else float(marks["gold"].sum())

    def _link(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """φ(s) and, without gradient, its slope w(s), both elementwise."""
        divergence = _DIVERGENCES[self.divergence]
        end = divergence.where(self.max_weight)
        inner = s.clamp(min=end)
        # Not max_weight (s − inner): its two gradients cancel but for rounding, which at a large weight is all that is left.
        return divergence.phi(inner) - self.max_weight * torch.relu(end - s), divergence.weight(inner.detach())
