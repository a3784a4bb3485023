from __future__ import annotations

import pytest
import torch

from equipoise.objectives.tdpo2 import TDPO2

from .pairs import minus_log_sigmoid, sigmoid, with_stat, worked_pair

# K_w = 0.5 + 1.5 = 2, K_l = 1 + 0 + 0 + 3 = 4
CHOSEN, REJECTED = [0.5, 1.5], [1.0, 0.0, 0.0, 3.0]


@pytest.mark.parametrize(
    ("objective", "margin"),
    [
        # β(3 − ½(4 − 2))
        (TDPO2(beta=0.5), 1.0),
        (TDPO2(beta=0.5, alpha=2.0), -0.5),
        # α = 0 is DPO
        (TDPO2(beta=0.5, alpha=0.0), 1.5),
    ],
)
def test_worked_by_hand(objective: TDPO2, margin: float) -> None:
    losses = objective(with_stat(worked_pair(), "kl_ref", CHOSEN, REJECTED))
    assert losses.sum.item() == pytest.approx(minus_log_sigmoid(margin), rel=1e-12)
    assert losses.meters["rewards/margins"].item() == pytest.approx(margin)
    assert (losses.meters["kl/chosen"].item(), losses.meters["kl/rejected"].item()) == (2.0, 4.0)


def test_gradient_flows_through_the_rejected_reply_s_divergence_only() -> None:
    view = with_stat(worked_pair(), "kl_ref", CHOSEN, REJECTED)
    view.stats["kl_ref"].requires_grad_()
    TDPO2(beta=0.5)(view).sum.sum().backward()
    # αβ σ(−1) a token
    slope = 0.5 * 0.5 * sigmoid(-1.0)
    torch.testing.assert_close(view.stats["kl_ref"].grad, torch.tensor([[0] * 4, [slope] * 4], dtype=torch.float64))
