from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from equipoise.objectives.dft import DFT

from .pairs import worked_pair


def test_worked_by_hand() -> None:
    # log-probs −1 and −2: e⁻¹ · 1 + e⁻² · 2
    losses = DFT()(worked_pair("gold"))
    assert losses.sum.item() == pytest.approx(math.exp(-1) + 2 * math.exp(-2), rel=1e-12)
    assert losses.meters["nll"].item() == 1.5
    assert losses.meters["weight"].item() == pytest.approx((math.exp(-1) + math.exp(-2)) / 2, rel=1e-12)


def test_the_gradient_of_a_token_is_minus_its_probability() -> None:
    view = worked_pair("gold")
    assert view.policy is not None
    view.policy.requires_grad_()
    DFT()(view).sum.sum().backward()
    expected = torch.tensor([[-math.exp(-1), -math.exp(-2), 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(view.policy.grad, expected)


def test_counts_learned_tokens() -> None:
    assert DFT().count({"gold": np.array([True, False, True])}, {}) == 2.0
