from __future__ import annotations

import pytest
import torch

from equipoise.objectives.tdpo1 import TDPO1

from .pairs import minus_log_sigmoid, sigmoid, with_stat, worked_pair

# K_w = 0.5 + 1.5 = 2, K_l = 1 + 0 + 0 + 3 = 4
CHOSEN, REJECTED = [0.5, 1.5], [1.0, 0.0, 0.0, 3.0]


def test_worked_by_hand() -> None:
    # β(3 − (4 − 2)) = 0.5; rewards 0.5 · (2 + 2) and 0.5 · (−1 + 4)
    losses = TDPO1(beta=0.5)(with_stat(worked_pair(), "kl_ref", CHOSEN, REJECTED))
    assert losses.sum.item() == pytest.approx(minus_log_sigmoid(0.5), rel=1e-12)
    assert losses.meters["rewards/chosen"].item() == 2.0
    assert losses.meters["rewards/rejected"].item() == 1.5
    assert (losses.meters["kl/chosen"].item(), losses.meters["kl/rejected"].item()) == (2.0, 4.0)


def test_gradient_flows_through_both_divergences() -> None:
    view = with_stat(worked_pair(), "kl_ref", CHOSEN, REJECTED)
    view.stats["kl_ref"].requires_grad_()
    TDPO1(beta=0.5)(view).sum.sum().backward()
    # −β σ(−½) a token of the chosen reply, +β σ(−½) of the rejected one, nothing beyond a reply's end
    slope = 0.5 * sigmoid(-0.5)
    expected = torch.tensor([[-slope, -slope, 0, 0], [slope] * 4], dtype=torch.float64)
    torch.testing.assert_close(view.stats["kl_ref"].grad, expected)
