"""DPO-positive: DPO that pays for letting the chosen reply become less likely."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, ratio_pair


class DPOP(Objective):
    """L = −log σ(β(h − λ max(0, −r_w))), r = summed log-ratio of a reply, h = r_w − r_l [nats].

    The reported rewards are βr, without the penalty.
    """

    paper: ClassVar[str] = "arXiv 2402.13228 (Smaug), the DPO-Positive loss"
    departures: ClassVar[str] = (
        "none; the default of the penalty is the low end of a range remembered from the paper (5 to 50), not checked"
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")
    penalty: float = Field(default=5.0, ge=0, description="λ: weight of the chosen reply's lost log-probability")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta)
        return pair.losses(logistic(pair.margin - self.penalty * (-pair.chosen_rewards).clamp(min=0)))
