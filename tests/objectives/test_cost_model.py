from __future__ import annotations

import math

import pytest
import torch

from equipoise.core.errors import DataError
from equipoise.core.records import REPLY_ROLES
from equipoise.objectives._base import Scored
from equipoise.objectives.cost_model import CostModel

from .pairs import minus_log_sigmoid


def costs(chosen: float, rejected: float, safe: tuple[float, float]) -> Scored:
    role = torch.tensor([REPLY_ROLES.index("chosen"), REPLY_ROLES.index("rejected")])
    score, flags = (torch.tensor(values, dtype=torch.float64) for values in ((chosen, rejected), safe))
    return Scored(
        None, None, torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, dtype=torch.long), role, score=score, facts={"safe": flags}
    )


# (safe flags of chosen and rejected) → signs of the chosen and the rejected cost in the loss; costs −1 and 2, difference 3.
SIGNS = {(1, 0): (1.0, 2.0), (1, 1): (1.0, -2.0), (0, 0): (-1.0, 2.0)}


@pytest.mark.parametrize("safe", SIGNS)
def test_worked_by_hand(safe: tuple[int, int]) -> None:
    losses = CostModel(regularization=0)(costs(-1.0, 2.0, safe))
    assert losses.sum.item() == pytest.approx(minus_log_sigmoid(3.0) + sum(map(minus_log_sigmoid, SIGNS[safe])))
    # The signs say: chosen safe, rejected unsafe.
    assert losses.meters["costs/sign_accuracies"].item() == {(1, 0): 1.0, (1, 1): 0.5, (0, 0): 0.5}[safe]
    assert losses.meters["costs/margins"].item() == 3.0
    assert losses.meters["costs/accuracies"].item() == 1.0


def test_the_cost_grows_where_a_reply_is_unsafe() -> None:
    """Of two equal costs at zero, gradient descent lowers the safe reply's and raises the unsafe one's."""
    view = costs(0.0, 0.0, (1, 0))
    assert view.score is not None
    view.score.requires_grad_()
    losses = CostModel()(view)
    losses.sum.sum().backward()
    assert losses.sum.item() == pytest.approx(3 * math.log(2))
    # −log σ has slope −½ at 0: from the order and from the sign.
    assert view.score.grad is not None
    assert view.score.grad.tolist() == [1.0, -1.0]
    assert losses.meters["costs/sign_accuracies"].item() == losses.meters["costs/accuracies"].item() == 0.5


def test_regularization_by_hand() -> None:
    # 0.1 · (1 + 4)/2
    plain, pulled = (CostModel(regularization=value)(costs(-1.0, 2.0, (1, 0))).sum.item() for value in (0.0, 0.1))
    assert pulled - plain == pytest.approx(0.25)


def test_pairs_ordered_by_something_else_are_refused() -> None:
    with pytest.raises(DataError, match="preferred_by=safer"):
        CostModel()(costs(0.0, 0.0, (0, 1)))


@pytest.mark.parametrize("value", [math.nan, 0.5, 2.0])
def test_a_missing_flag_raises(value: float) -> None:
    with pytest.raises(DataError, match="`safe`"):
        CostModel()(costs(0.0, 0.0, (1.0, value)))
