from __future__ import annotations

import pytest
import torch

from equipoise.objectives.aot_unpaired import AOTUnpaired

from .pairs import minus_log_sigmoid, short_pairs, sigmoid, worked_pair

# log-ratios: chosen 4, −1 and 2; rejected −2, −3 and 0
PAIRS = ((-1.0, -5.0, -6.0, -4.0), (-2.0, -1.0, -6.0, -3.0), (-1.0, -3.0, -2.0, -2.0))


def test_log_ratios_meet_the_other_side_s_of_their_rank() -> None:
    # ascending: −1 meets −3, 2 meets −2, 4 meets 0
    losses = AOTUnpaired(beta=0.5)(short_pairs(*PAIRS))
    assert losses.sum.tolist() == pytest.approx([minus_log_sigmoid(margin) for margin in (2.0, 1.0, 2.0)], rel=1e-12)


def test_gradient_reaches_the_rejected_reply_that_was_met() -> None:
    view = short_pairs(*PAIRS)
    assert view.policy is not None
    view.policy.requires_grad_()
    AOTUnpaired(beta=0.5)(view).sum[1].backward()
    assert view.policy.grad is not None
    # The second unit's chosen reply (row 2), and its own rejected one (row 3), which has the same rank.
    slope = 0.5 * sigmoid(-1.0)
    assert view.policy.grad.flatten().tolist() == pytest.approx([0, 0, -slope, slope, 0, 0], abs=1e-15)
    view.policy.grad = None
    AOTUnpaired(beta=0.5)(view).sum[0].backward()
    assert torch.nonzero(view.policy.grad.flatten()).flatten().tolist() == [0, 5]


def test_label_smoothing_mixes_in_the_flipped_label() -> None:
    losses = AOTUnpaired(beta=0.5, label_smoothing=0.1)(worked_pair())
    assert losses.sum.item() == pytest.approx(0.9 * minus_log_sigmoid(1.5) + 0.1 * minus_log_sigmoid(-1.5), rel=1e-12)
