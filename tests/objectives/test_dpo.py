from __future__ import annotations

import math

import pytest
import torch

from equipoise.core.records import REPLY_ROLES
from equipoise.objectives._base import Scored
from equipoise.objectives.dpo import DPO


def pair(policy: list[list[float]], reference: list[list[float]]) -> Scored:
    """One pair: chosen first, two tokens a side."""
    role = torch.tensor([REPLY_ROLES.index("chosen"), REPLY_ROLES.index("rejected")])
    one = torch.ones(2, 2, dtype=torch.bool)
    as_tensor = [torch.tensor(value, dtype=torch.float64) for value in (policy, reference)]
    return Scored(as_tensor[0], as_tensor[1], one, torch.zeros(2, dtype=torch.long), role)


def test_ln_2_at_the_reference() -> None:
    same = [[-1.0, -2.0], [-3.0, -0.5]]
    assert DPO(beta=3.0)(pair(same, same)).sum.item() == pytest.approx(math.log(2), abs=1e-12)


def test_margin_of_two() -> None:
    # log-ratios: chosen (−1−1) − (−2−10) = 10, rejected (−4−8) − (−1−1) = −10; β(10 − −10) = 0.1 · 20 = 2.
    losses = DPO(beta=0.1)(pair([[-1, -1], [-4, -8]], [[-2, -10], [-1, -1]]))
    assert losses.sum.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-12)
    assert losses.meters["rewards/chosen"].item() == pytest.approx(1.0)
    assert losses.meters["rewards/rejected"].item() == pytest.approx(-1.0)
    assert losses.meters["rewards/margins"].item() == pytest.approx(2.0)
    assert losses.meters["rewards/accuracies"].item() == 1.0
    assert losses.meters["logps/rejected"].item() == -12.0


def test_label_smoothing_mixes_in_the_flipped_label() -> None:
    # 0.9 · log(1 + e⁻²) + 0.1 · log(1 + e²)
    losses = DPO(beta=0.1, label_smoothing=0.1)(pair([[-1, -1], [-4, -8]], [[-2, -10], [-1, -1]]))
    assert losses.sum.item() == pytest.approx(0.9 * math.log1p(math.exp(-2)) + 0.1 * math.log1p(math.exp(2)), abs=1e-12)


def test_gradient_at_the_reference_is_half_beta() -> None:
    view = pair([[-1.0, -2.0], [-3.0, -0.5]], [[-1.0, -2.0], [-3.0, -0.5]])
    assert view.policy is not None
    view.policy.requires_grad_()
    DPO(beta=0.1)(view).sum.sum().backward()
    assert view.policy.grad is not None
    # ∂/∂ℓ_w = −β σ(0) = −0.05 for every chosen token, +0.05 for every rejected one.
    torch.testing.assert_close(view.policy.grad, torch.tensor([[-0.05, -0.05], [0.05, 0.05]], dtype=torch.float64))
