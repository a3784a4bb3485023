"""Bi-factorial preference optimization: pairs ordered by helpfulness, with a target that the safety of both replies sets."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from equipoise.core.errors import DataError
from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import pair_meters


class BFPO(Objective):
    """L = (h − g/τ)², g = (B₁·safe(y_w) − safe(y_l))/(B₁ − 1) − α, h = r(y_w) − r(y_l), r = log π_θ/π_ref.

    y_w is the more *helpful* reply, whether it is safe or not; h is a difference of summed log-ratios [nats]. With the
    defaults g is ½ for (safe, safe), 1 for (safe, unsafe), −1 for (unsafe, safe) and −½ for (unsafe, unsafe): the last
    two reverse the order. `safe` is 1 or 0 on each reply, or a probability of being safe. Safe against safe at α = ½
    is IPO on summed log-ratios.

    The flags come with the data (PKU-SafeRLHF, ordered by `better`), from columns `chosen_safe` and `rejected_safe`, or from
    a scorer: `equipoise data replies`, `equipoise score`, then `data.verdicts` and `data.safe_when`. A buffer of helpful
    pairs without flags takes `data.assume_safe: true`.
    """

    paper: ClassVar[str] = (
        "arXiv 2408.15313; the loss and the labelling function as in the authors' code (trainer/bfpo.py) and formula images, "
        "restated by a later paper that uses it as a baseline"
    )
    departures: ClassVar[str] = (
        "Read in the authors' code, not in the paper's text. The code calls τ beta; its class default is 0.1 and its recipe 0.01, which is "
        "the default here. Safety may be a probability, which the code does not have: g is linear in it, so the target is the mean of g."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored", facts=("safe",))

    b1: float = Field(
        default=3.0, gt=1, description="B₁: how much more the helpful reply's safety counts than the other's; 3 in the theorem"
    )
    alpha: float = Field(default=0.5, description="α: subtracted from every label; shifts the safety reward by −2α")
    tau: float = Field(default=0.01, gt=0, description="τ: strength of the pull to the reference (1/nats); the target is g/τ nats")

    def label(self, chosen_safe: torch.Tensor, rejected_safe: torch.Tensor) -> torch.Tensor:
        """g, the labelling function: elementwise over safety (1 safe, 0 not) of the more and the less helpful reply."""
        return (self.b1 * chosen_safe - rejected_safe) / (self.b1 - 1) - self.alpha

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs. Raises DataError where a reply's safety is missing or outside 0 to 1."""
        chosen, rejected = scored.side("chosen"), scored.side("rejected")
        chosen_ratio, rejected_ratio = chosen.logratios(), rejected.logratios()
        safety = [side.facts["safe"].to(chosen_ratio.dtype) for side in (chosen, rejected)]
        if not all(bool(((value >= 0) & (value <= 1)).all()) for value in safety):
            raise DataError("BFPO needs the fact `safe`, between 0 (unsafe) and 1 (safe), on both replies of every pair.")
        label = self.label(*safety)
        margin = chosen_ratio - rejected_ratio
        loss = (margin - label / self.tau) ** 2
        side = (margin * label).detach().sign()
        meters = {
            **pair_meters(self.tau * chosen_ratio, self.tau * rejected_ratio, chosen.policy_logps(), rejected.policy_logps()),
            "label": label,
            "label/accuracies": (side + 1) / 2,
        }
        return Losses(loss, meters)
