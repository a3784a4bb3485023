from __future__ import annotations

import math

import pytest
import torch

from equipoise.objectives._base import Scored
from equipoise.objectives.dpo import DPO
from equipoise.objectives.wpo import WPO

from .pairs import minus_log_sigmoid, with_stat, worked_pair


def view(chosen: list[float]) -> Scored:
    return with_stat(worked_pair(), "log_sum_sq", chosen, [-1.0, -1.0, -2.0, -4.0])


@pytest.mark.parametrize(
    ("objective", "chosen", "weight"),
    [
        # chosen (−2 + 3)/2 = ½, rejected (−12 + 8)/4 = −1
        (WPO(beta=0.1), [-1.0, -2.0], math.exp(-0.5)),
        # chosen (−2 + 11)/2 = 4.5: e^3.5 is cut at 1
        (WPO(beta=0.1), [-5.0, -6.0], 1.0),
        (WPO(beta=0.1, clamp=False), [-5.0, -6.0], math.exp(3.5)),
    ],
)
def test_worked_by_hand(objective: WPO, chosen: list[float], weight: float) -> None:
    losses = objective(view(chosen))
    assert losses.sum.item() == pytest.approx(weight * minus_log_sigmoid(0.1 * 3), rel=1e-12)
    assert losses.meters["weight"].item() == pytest.approx(weight, rel=1e-12)


def test_the_gradient_is_dpo_s_times_the_weight() -> None:
    gradients = []
    for objective in (WPO(beta=0.1), DPO(beta=0.1)):
        scored = view([-1.0, -2.0])
        assert scored.policy is not None
        scored.policy.requires_grad_()
        scored.stats["log_sum_sq"].requires_grad_()
        objective(scored).sum.sum().backward()
        assert scored.stats["log_sum_sq"].grad is None
        gradients.append(scored.policy.grad)
    torch.testing.assert_close(gradients[0], math.exp(-0.5) * gradients[1])
