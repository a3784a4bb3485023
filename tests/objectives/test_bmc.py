from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from equipoise.core.errors import NumericsError
from equipoise.objectives._base import Scored
from equipoise.objectives.bmc import BMC
from equipoise.objectives.dpo import DPO

from .pairs import minus_log_sigmoid, worked_pair


def marked(chosen: list[bool], rejected: list[bool]) -> Scored:
    rows = [chosen + [True] * (4 - len(chosen)), rejected]  # what stands beyond the reply's end must not matter
    return replace(worked_pair(), marks={"differs": torch.tensor(rows)})


def test_worked_by_hand() -> None:
    # Chosen log π = −½, −3/2 with ratios 5/2, −½; the first differs: λ = 1 + min(e^½, 2) = 1 + √e, 1.
    # Rejected log π = −1, −2, −4, −5 with ratios 1, 0, −1, −1; the third differs: λ = 1, 1, 1 + 2, 1.
    losses = BMC(beta=0.5)(marked([True, False], [False, False, True, False]))
    root = math.exp(0.5)
    chosen, rejected = 0.5 * ((1 + root) * 2.5 - 0.5), 0.5 * (1 + 0 - 3 - 1)
    assert losses.sum.item() == pytest.approx(minus_log_sigmoid(chosen - rejected))
    assert losses.meters["rewards/chosen"].item() == pytest.approx(chosen)
    assert losses.meters["rewards/rejected"].item() == pytest.approx(rejected)
    assert losses.meters["weights"].item() == pytest.approx((2 + root + 6) / 6)


@pytest.mark.parametrize(("delta", "marks"), [(0.0, True), (2.0, False)])
def test_without_extra_weight_it_is_dpo(delta: float, marks: bool) -> None:
    losses = BMC(beta=0.5, delta=delta)(marked([marks] * 2, [marks] * 4))
    assert losses.sum.item() == pytest.approx(DPO(beta=0.5)(worked_pair()).sum.item())
    assert losses.meters["weights"].item() == 1.0


def test_weights_carry_no_gradient() -> None:
    # ∂L/∂log π of a token is −β σ(−m) λ on the chosen side: twice and three times that of an equal token.
    view = marked([False, True], [False, False, False, False])
    assert view.policy is not None
    view.policy.requires_grad_()
    BMC(beta=0.5)(view).sum.sum().backward()
    assert view.policy.grad is not None
    gradient = view.policy.grad[0].tolist()
    assert gradient[1] / gradient[0] == pytest.approx(3.0)  # 1 + min(e^1.5, 2)
    assert gradient[2:] == [0.0, 0.0]


def test_without_marks_it_refuses() -> None:
    with pytest.raises(NumericsError, match="differs"):
        BMC()(worked_pair())
