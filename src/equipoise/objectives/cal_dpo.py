"""Calibrated DPO: the implicit rewards are also held to a scale."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, ratio_pair


class CalDPO(Objective):
    """L = −log σ(h) + c[(r_w − 1/(2β))² + (r_l + 1/(2β))²], r = summed log-ratio of a reply, h = r_w − r_l [nats].

    There is no β inside the sigmoid: β sets only where the log-ratios should go.
    """

    paper: ClassVar[str] = "arXiv 2412.14516; formula as in public code (tengxiao1/Cal-DPO)"
    departures: ClassVar[str] = "none known; c = ½ is the authors' code, others use 1"
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.002, gt=0, description="the log-ratios are drawn to ±1/(2β) (1/nats)")
    calibration_weight: float = Field(default=0.5, ge=0, description="c: weight of the calibration term (1/nats²)")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, 1.0)
        target = 1 / (2 * self.beta)
        calibration = (pair.chosen_rewards - target).square() + (pair.rejected_rewards + target).square()
        return pair.losses(logistic(pair.margin) + self.calibration_weight * calibration)
