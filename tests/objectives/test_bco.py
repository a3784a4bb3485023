from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from equipoise.core.errors import DataError
from equipoise.core.records import REPLY_ROLES
from equipoise.objectives._base import Scored
from equipoise.objectives.bco import BCO

from .pairs import minus_log_sigmoid


def labelled(ratios: list[float], labels: list[float], weights: list[float] | None = None) -> Scored:
    """One-token replies with the given log-ratios against a reference of −5 nats."""
    units = len(ratios)
    policy = torch.tensor(ratios, dtype=torch.float64)[:, None] - 5
    facts = {"label": labels} if weights is None else {"label": labels, "weight": weights}
    return Scored(
        policy,
        torch.full_like(policy, -5.0),
        torch.ones(units, 1, dtype=torch.bool),
        torch.arange(units),
        torch.full((units,), REPLY_ROLES.index("sample")),
        facts={name: torch.tensor(values, dtype=torch.float64) for name, values in facts.items()},
    )


def test_worked_by_hand() -> None:
    # rewards 1, 2 and 6 desirable (mean 3), −1 undesirable: δ = ½(3 − 1) = 1
    losses = BCO(beta=0.5)(labelled([2.0, 4.0, 12.0, -2.0], [1.0, 1.0, 1.0, 0.0]))
    expected = [minus_log_sigmoid(0.0), minus_log_sigmoid(1.0), minus_log_sigmoid(5.0), minus_log_sigmoid(2.0)]
    assert losses.sum.tolist() == pytest.approx(expected, rel=1e-12)
    assert losses.meters["delta"].tolist() == [1.0] * 4
    assert losses.meters["rewards/chosen"][:3].tolist() == [1.0, 2.0, 6.0]
    assert losses.meters["rewards/rejected"][3].item() == -1.0
    assert math.isnan(losses.meters["rewards/rejected"][0].item())


def test_one_kind_alone_sets_the_shift() -> None:
    losses = BCO(beta=0.5)(labelled([2.0, 6.0], [0.0, 0.0]))
    # δ = 2: δ − βr = 1 and −1
    assert losses.sum.tolist() == pytest.approx([minus_log_sigmoid(1.0), minus_log_sigmoid(-1.0)], rel=1e-12)


def test_weights_are_bounded_and_missing_ones_are_1() -> None:
    view = labelled([2.0, 2.0, 2.0, 2.0], [1.0, 0.0, 0.0, 0.0], [math.nan, 3.0, 0.1, 99.0])
    losses = BCO(beta=0.5)(view)
    assert losses.sum.tolist() == pytest.approx([weight * math.log(2) for weight in (1.0, 3.0, 0.5, 10.0)], rel=1e-12)
    wider = BCO(beta=0.5, min_density_ratio=0.0, max_density_ratio=100.0)(view)
    assert wider.sum.tolist() == pytest.approx([weight * math.log(2) for weight in (1.0, 3.0, 0.1, 99.0)], rel=1e-12)


def test_no_gradient_reaches_the_shift() -> None:
    view = labelled([0.0, 0.0], [1.0, 0.0])
    assert view.policy is not None
    view.policy.requires_grad_()
    BCO(beta=0.5)(view).sum.sum().backward()
    # Each reply moves by its own loss only: −β σ(0) and +β σ(0).
    assert view.policy.grad is not None
    assert view.policy.grad.flatten().tolist() == pytest.approx([-0.25, 0.25])


def test_a_missing_label_raises() -> None:
    with pytest.raises(DataError, match="BCO needs a label"):
        BCO()(labelled([1.0], [math.nan]))
    with pytest.raises(DataError, match="BCO needs a label"):
        BCO()(replace(labelled([1.0], [1.0]), facts={}))
