from __future__ import annotations

import math

import pytest

from equipoise.core.errors import DataError
from equipoise.objectives.dpo import DPO
from equipoise.objectives.infonca import InfoNCA

from .lists import A, as_list, view, worked_lists
from .pairs import worked_pair


def test_worked_by_hand() -> None:
    # First: ¼ log 2 + ½ log 4 + ¼ log 4 = 7/4 log 2. Second: −⅔ log ⅔ − ⅓ log ⅓, the entropy of its own targets.
    losses = InfoNCA(beta=0.5, alpha=2.0)(worked_lists())
    assert losses.sum.tolist() == pytest.approx([1.75 * A, math.log(3) - 2 * A / 3], abs=1e-12)


def test_meters_compare_the_best_with_the_worst_by_hand() -> None:
    # First list: best βr = 0, worst ones a and 0, so ½a; best against a is wrong, against 0 a tie: (0 + ½)/2. Second: right.
    meters = InfoNCA(beta=0.5, alpha=2.0)(worked_lists()).meters
    assert meters["rewards/chosen"].tolist() == pytest.approx([0, A], abs=1e-12)
    assert meters["rewards/rejected"].tolist() == pytest.approx([A / 2, 0], abs=1e-12)
    assert meters["rewards/margins"].tolist() == pytest.approx([-A / 2, A], abs=1e-12)
    assert meters["rewards/accuracies"].tolist() == [0.25, 1.0]


def test_of_equal_scores_nothing_is_ordered() -> None:
    losses = InfoNCA(beta=1.0)(view([[A, 0]], [[5, 5]]))
    # q = ½, ½ against ⅔, ⅓: −½ log ⅔ − ½ log ⅓ = log 3 − ½ log 2.
    assert losses.sum.item() == pytest.approx(math.log(3) - A / 2)
    assert math.isnan(losses.meters["rewards/accuracies"].item())


def test_a_sharp_list_of_two_is_dpo() -> None:
    pair = worked_pair()
    assert InfoNCA(beta=0.3, alpha=1e-3)(as_list(pair, 1.0, 0.0)).sum.item() == pytest.approx(DPO(beta=0.3)(pair).sum.item(), abs=1e-12)


def test_the_score_may_have_another_name() -> None:
    objective = InfoNCA(beta=0.5, alpha=2.0, score="helpfulness")
    assert objective.facts() == ("helpfulness",)
    assert objective(worked_lists("helpfulness")).sum[0].item() == pytest.approx(1.75 * A)
    with pytest.raises(DataError, match="needs the fact 'helpfulness'"):
        objective(worked_lists())


def test_what_is_no_scored_list_raises() -> None:
    with pytest.raises(DataError, match="needs the fact 'score'"):
        InfoNCA()(view([[1.0, 2.0]], [[1.0, math.nan]]))
    with pytest.raises(DataError, match="at least two replies; one has 1"):
        InfoNCA()(view([[1.0, 2.0], [1.0]], [[1.0, 0.0], [1.0]]))
