from __future__ import annotations

import pytest
import torch

from equipoise.objectives.ipo import IPO

from .pairs import worked_pair


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        # means: 1 − (−0.25) = 1.25; target 1/(2·0.1) = 5
        (IPO(), (1.25 - 5) ** 2),
        # target 1
        (IPO(beta=0.5), 0.25**2),
        # sums: h = 3
        (IPO(beta=0.1, reduction="sum"), (3 - 5) ** 2),
    ],
)
def test_worked_by_hand(objective: IPO, expected: float) -> None:
    assert objective(worked_pair()).sum.item() == pytest.approx(expected, rel=1e-12)


def test_no_loss_and_no_push_at_the_target() -> None:
    # 1/(2·0.4) = 1.25, the difference of the mean log-ratios
    view = worked_pair()
    assert view.policy is not None
    view.policy.requires_grad_()
    loss = IPO(beta=0.4)(view).sum
    loss.sum().backward()
    assert loss.item() == pytest.approx(0, abs=1e-24)
    assert view.policy.grad is not None
    torch.testing.assert_close(view.policy.grad, torch.zeros_like(view.policy))
