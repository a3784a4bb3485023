from __future__ import annotations

import math

import pytest

from equipoise.core.errors import DataError
from equipoise.objectives.apo_zero import APOZero
from equipoise.objectives.apo_zero_unpaired import APOZeroUnpaired

from .pairs import sigmoid, worked_pair
from .test_bco import labelled


def test_worked_by_hand() -> None:
    # β = 0.5: desirable with r = 2 and undesirable with r = −6: 1 − σ(1) and σ(−3).
    losses = APOZeroUnpaired(beta=0.5)(labelled([2.0, -6.0], [1.0, 0.0]))
    assert losses.sum.tolist() == pytest.approx([1 - sigmoid(1.0), sigmoid(-3.0)], abs=1e-12)
    assert losses.meters["rewards/chosen"][0].item() == 1.0
    assert losses.meters["rewards/rejected"][1].item() == -3.0


def test_the_two_sides_of_a_pair_have_its_loss_between_them() -> None:
    # The worked pair has r = 2 and −1.
    both = APOZeroUnpaired(beta=0.3)(labelled([2.0, -1.0], [1.0, 0.0])).sum.sum()
    assert both.item() == pytest.approx(APOZero(beta=0.3)(worked_pair()).sum.item(), rel=1e-12)


def test_a_missing_label_raises() -> None:
    with pytest.raises(DataError, match="APO-zero needs a label"):
        APOZeroUnpaired()(labelled([1.0], [math.nan]))
