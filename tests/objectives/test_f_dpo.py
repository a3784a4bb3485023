from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch

from equipoise.objectives.f_dpo import FDPO

from .pairs import minus_log_sigmoid, sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # −e⁻² and −e¹
        (FDPO(beta=0.5, divergence="forward_kl"), minus_log_sigmoid(0.5 * (-math.exp(-2) + math.exp(1)))),
        # log σ(2) and log σ(−1)
        (FDPO(beta=0.5, divergence="jensen_shannon"), minus_log_sigmoid(0.5 * (math.log(sigmoid(2.0)) - math.log(sigmoid(-1.0))))),
        # (1 − e^(−αr))/α at r = 2 and −1
        (FDPO(beta=0.5, alpha=0.5), minus_log_sigmoid(0.5 * ((1 - math.exp(-1)) / 0.5 - (1 - math.exp(0.5)) / 0.5))),
        # α = 1 is forward KL
        (FDPO(beta=0.5, alpha=1), minus_log_sigmoid(0.5 * (-math.exp(-2) + math.exp(1)))),
    ],
)
def test_worked_by_hand(objective: FDPO, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)


def test_alpha_to_0_is_dpo() -> None:
    # βh = 0.1·3
    assert FDPO(alpha=0)(worked_pair()).sum.item() == pytest.approx(minus_log_sigmoid(0.3), rel=1e-12)
    assert FDPO(alpha=1e-9)(worked_pair()).sum.item() == pytest.approx(minus_log_sigmoid(0.3), rel=1e-8)


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon", "alpha"])
def test_at_the_reference(divergence: Literal["forward_kl", "jensen_shannon", "alpha"]) -> None:
    view = worked_pair()
    loss = FDPO(divergence=divergence)(replace(view, reference=view.policy)).sum
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
def test_extremes_of_the_other_divergences(divergence: Literal["forward_kl", "jensen_shannon"]) -> None:
    view = worked_pair()
    policy = torch.full_like(view.mask, 0, dtype=torch.float32)
    policy[0] = -1e4
    policy.requires_grad_()
    loss = FDPO(divergence=divergence)(replace(view, policy=policy, reference=torch.zeros_like(policy))).sum
    loss.sum().backward()
    assert policy.grad is not None
    assert torch.isfinite(loss).all()
    assert torch.isfinite(policy.grad).all()
