"""The cost model of Safe RLHF: a score that orders replies by harm and is positive for unsafe ones."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.core.errors import DataError, NumericsError
from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import logistic


class CostModel(Objective):
    """L = −log σ(C_l − C_w) − log σ(s_w C_w) − log σ(s_l C_l) + μ (C_w² + C_l²)/2, s = 1 for an unsafe reply, −1 for a safe one.

    C is the model's score of a reply, its cost: higher is worse, and zero is the boundary between safe and unsafe. The
    *chosen* reply y_w must be the *safer* one (PKU-SafeRLHF: `preferred_by: safer`), whichever is more helpful. The
    meter `costs/sign_accuracies` is the share of replies whose sign says what their flag says.
    """

    paper: ClassVar[str] = "arXiv 2310.12773 (Safe RLHF, the cost model's loss); μ as in the authors' recipe"
    departures: ClassVar[str] = (
        "A pair whose chosen reply is unsafe and whose rejected one is safe is refused: it is ordered by something other than safety. "
        "One score a reply, read at its end; the variant of public code that averages over tokens is not covered."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), facts=("safe",), readout="score")

    regularization: float = Field(default=0.001, ge=0, description="μ: pulls the mean square of the costs to zero; 0: off")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs of scores. Raises DataError where a safe flag is missing, or the order contradicts the flags."""
        chosen, rejected = scored.side("chosen"), scored.side("rejected")
        if chosen.score is None or rejected.score is None:
            raise NumericsError("cost_model reads scores; the engine gave none.")
        costs, flags = (chosen.score, rejected.score), (chosen.facts["safe"], rejected.facts["safe"])
        if not all(bool(((flag == 0) | (flag == 1)).all()) for flag in flags):
            raise DataError("The cost model needs the fact `safe`, true or false, on both replies of every pair.")
        if bool((flags[0] < flags[1]).any()):
            raise DataError(
                "A pair's chosen reply is unsafe and its rejected one safe. The cost model's chosen reply is the safer one: order the "
                "pairs by safety (PKU-SafeRLHF: preferred_by=safer)."
            )
        signs = [(1 - 2 * flag).to(cost.dtype) for flag, cost in zip(flags, costs, strict=True)]
        loss = logistic(costs[1] - costs[0]) + logistic(signs[0] * costs[0]) + logistic(signs[1] * costs[1])
        if self.regularization:
            loss = loss + self.regularization * (costs[0] ** 2 + costs[1] ** 2) / 2
        least, most = (cost.detach() for cost in costs)
        meters = {
            "costs/chosen": least,
            "costs/rejected": most,
            "costs/margins": most - least,
            "costs/accuracies": ((most - least).sign() + 1) / 2,
            "costs/sign_accuracies": ((signs[0] * least).sign() + (signs[1] * most).sign() + 2) / 4,
        }
        return Losses(loss, meters)
