from __future__ import annotations

import math

import pytest

from equipoise.core.errors import DataError
from equipoise.objectives.nca import NCA
from equipoise.objectives.nca_list import NCAList

from .lists import A, as_list, view, worked_lists
from .pairs import worked_pair


def test_worked_by_hand() -> None:
    # First: ¼·log(3/2) + ½ log 2 + ¼ log 2, and ⅓ (log 3 + log 2 + log 2). Second: ⅔ log(3/2) + ⅓ log 2, and ½ (log 3 + log 2).
    losses = NCAList(beta=0.5, alpha=2.0)(worked_lists())
    first = 0.25 * math.log(1.5) + 0.75 * A + (math.log(3) + 2 * A) / 3
    second = 2 / 3 * math.log(1.5) + A / 3 + (math.log(3) + A) / 2
    assert losses.sum.tolist() == pytest.approx([first, second], abs=1e-12)
    assert losses.meters["rewards/accuracies"].tolist() == [0.25, 1.0]


def test_at_the_reference_it_is_twice_ln_2() -> None:
    assert NCAList()(view([[0, 0, 0, 0]], [[4, 3, 2, 1]])).sum.item() == pytest.approx(2 * A)


def test_a_sharp_list_of_two_is_nca_on_pairs() -> None:
    pair = worked_pair()
    assert NCAList(beta=0.3, alpha=1e-3)(as_list(pair, 1.0, 0.0)).sum.item() == pytest.approx(NCA(beta=0.3)(pair).sum.item(), abs=1e-12)


def test_the_score_may_have_another_name() -> None:
    assert NCAList(score="honesty").facts() == ("honesty",)
    with pytest.raises(DataError, match="needs the fact 'honesty'"):
        NCAList(score="honesty")(worked_lists())
