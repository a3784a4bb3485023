from __future__ import annotations

import math

import pytest
import torch

from equipoise.core.errors import DataError
from equipoise.core.records import REPLY_ROLES
from equipoise.objectives._base import Scored
from equipoise.objectives.kto import KTO


def labelled(ratios: list[float], mismatched: list[float], labels: list[float]) -> Scored:
    """One-token replies with the given log-ratios against a reference of −5 nats."""
    units = len(ratios)
    policy = torch.tensor([*ratios, *mismatched], dtype=torch.float64)[:, None] - 5
    role = torch.tensor([REPLY_ROLES.index("sample")] * units + [REPLY_ROLES.index("mismatched")] * units)
    return Scored(
        policy,
        torch.full_like(policy, -5.0),
        torch.ones(2 * units, 1, dtype=torch.bool),
        torch.arange(units).repeat(2),
        role,
        facts={"label": torch.tensor(labels * 2, dtype=torch.float64)},
    )


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_worked_by_hand() -> None:
    # z = mean(1, 3) = 2. Desirable with r = 12: 1 − σ(0.1 · 10) ; undesirable with r = −8: 1 − σ(0.1 · 10).
    losses = KTO(beta=0.1)(labelled([12.0, -8.0], [1.0, 3.0], [1.0, 0.0]))
    assert losses.sum.tolist() == pytest.approx([1 - sigmoid(1.0), 1 - sigmoid(1.0)], abs=1e-12)
    assert losses.meters["kl"].tolist() == [2.0, 2.0]
    assert losses.meters["rewards/chosen"][0].item() == pytest.approx(1.2)
    assert math.isnan(losses.meters["rewards/chosen"][1].item())


def test_the_baseline_is_never_negative() -> None:
    losses = KTO(beta=1.0, desirable_weight=2.0)(labelled([0.0], [-7.0], [1.0]))
    assert losses.sum.item() == pytest.approx(2 * 0.5)


def test_no_gradient_reaches_the_baseline() -> None:
    view = labelled([1.0, 2.0], [1.0, 3.0], [1.0, 0.0])
    assert view.policy is not None
    view.policy.requires_grad_()
    KTO()(view).sum.sum().backward()
    assert view.policy.grad is not None
    assert view.policy.grad[2:].abs().max().item() == 0.0
    assert view.policy.grad[:2].abs().min().item() > 0.0


def test_a_missing_label_raises() -> None:
    with pytest.raises(DataError, match="label"):
        KTO()(labelled([1.0], [1.0], [math.nan]))
