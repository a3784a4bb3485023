from __future__ import annotations

import math

import pytest
import torch

from equipoise.objectives._parts import log1mexp
from equipoise.objectives.orpo import ORPO

from .pairs import minus_log_sigmoid, worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # −ℓ_w/n_w = 1; log-odds of e⁻¹ and e⁻³
        (ORPO(), 1 + 0.1 * minus_log_sigmoid(math.log(math.exp(-1) / (1 - math.exp(-1))) - math.log(math.exp(-3) / (1 - math.exp(-3))))),
        # SFT alone
        (ORPO(beta=0), 1.0),
    ],
)
def test_worked_by_hand(objective: ORPO, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)


def test_odds_keep_their_digits() -> None:
    tiny = torch.tensor([-1e-10, -1e-3, -40.0, -1e4], dtype=torch.float64)
    # log(1 − e^a): ≈ log(−a) near 0 (next term a/2), and ≈ −e^a far below
    expected = torch.tensor([math.log(1e-10), math.log(1e-3) - 5e-4, -math.exp(-40), 0.0], dtype=torch.float64)
    torch.testing.assert_close(log1mexp(tiny), expected, rtol=1e-7, atol=1e-30)
