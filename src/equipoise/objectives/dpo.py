"""Direct preference optimization, with conservative label smoothing."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic, pair_meters


class DPO(Objective):
    """L = −(1−ε) log σ(βh) − ε log σ(−βh), h = r(y_w) − r(y_l), r = log π_θ/π_ref.

    r is summed over a reply's tokens [nats]. At the reference L = ln 2, whatever β.
    """

    paper: ClassVar[str] = "arXiv 2305.18290, eq. 7; label smoothing (cDPO): Mitchell 2023, 'A note on DPO with noisy preferences', eq. 3"
    departures: ClassVar[str] = "none"
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="ε: probability that a preference label is flipped")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        chosen, rejected = scored.side("chosen"), scored.side("rejected")
        chosen_rewards = self.beta * chosen.logratios()
        rejected_rewards = self.beta * rejected.logratios()
        margin = chosen_rewards - rejected_rewards
        loss = (1 - self.label_smoothing) * logistic(margin) + self.label_smoothing * logistic(-margin)
        return Losses(loss, pair_meters(chosen_rewards, rejected_rewards, chosen.policy_logps(), rejected.policy_logps()))
