from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from equipoise.core.errors import DataError
from equipoise.objectives._base import Scored
from equipoise.objectives.poft import PoFT

from .pairs import minus_log_sigmoid, sigmoid, worked_pair


def demonstration(aligned: float) -> Scored:
    return replace(worked_pair("gold"), facts={"aligned_logps": torch.tensor([aligned], dtype=torch.float64)})


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # mean log-prob −1.5 against −1: a gap of −0.5
        (PoFT(), minus_log_sigmoid(-0.5)),
        # 2·(−0.5) + 0.25
        (PoFT(beta=2, gamma=0.25), minus_log_sigmoid(-0.75)),
    ],
)
def test_worked_by_hand(objective: PoFT, expected: float) -> None:
    assert objective(demonstration(-1.0)).sum.item() == pytest.approx(expected, rel=1e-12)


def test_gradient_is_that_of_sft_weighted_by_the_gap() -> None:
    view = demonstration(-1.0)
    assert view.policy is not None
    view.policy.requires_grad_()
    PoFT()(view).sum.sum().backward()
    assert view.policy.grad is not None
    # −σ(0.5)/2 for each of the two tokens: SFT's −1/2 per token, times σ(0.5)
    expected = torch.tensor([[-sigmoid(0.5) / 2, -sigmoid(0.5) / 2, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(view.policy.grad, expected)


def test_a_missing_score_raises() -> None:
    with pytest.raises(DataError, match="aligned_logps"):
        PoFT()(demonstration(math.nan))
