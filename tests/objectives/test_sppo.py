from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from equipoise.core.errors import DataError
from equipoise.objectives.sppo import SPPO

from .pairs import worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # 1/(2·0.001) = 500: 2 − 500 and −1 + 500
        (SPPO(), 498.0**2 + 499.0**2),
        # target 2: 2 − 2 and −1 + 2
        (SPPO(beta=0.25), 0.0 + 1.0),
    ],
)
def test_worked_by_hand(objective: SPPO, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)


def test_soft_labels_set_the_targets() -> None:
    # (P − ½)/β: (0.9 − 0.5)/0.1 = 4 and (0.4 − 0.5)/0.1 = −1, against log-ratios 2 and −1
    view = replace(worked_pair(), facts={"win_probability": torch.tensor([0.9, 0.4], dtype=torch.float64)})
    assert SPPO(beta=0.1, labels="soft")(view).sum.item() == pytest.approx(4.0, rel=1e-12)
    hard = replace(view, facts={"win_probability": torch.tensor([1.0, 0.0], dtype=torch.float64)})
    assert SPPO(beta=0.1, labels="soft")(hard).sum.item() == SPPO(beta=0.1)(hard).sum.item()


@pytest.mark.parametrize("facts", [{}, {"win_probability": torch.tensor([0.9, math.nan])}, {"win_probability": torch.tensor([1.1, 0.4])}])
def test_soft_labels_need_a_probability(facts: dict[str, torch.Tensor]) -> None:
    with pytest.raises(DataError, match="win_probability"):
        SPPO(labels="soft")(replace(worked_pair(), facts=facts))
