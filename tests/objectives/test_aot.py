from __future__ import annotations

import pytest

from equipoise.objectives.aot import AOT

from .pairs import minus_log_sigmoid, short_pairs, worked_pair

# policy margins 5 and 1, reference margins 0 and 2
PAIRS = ((-1.0, -3.0, -6.0, -3.0), (-2.0, -1.0, -3.0, -3.0))


def test_margins_meet_the_reference_s_margin_of_their_rank() -> None:
    # The larger ones: 5 − 2; the smaller ones: 1 − 0. DPO would compare 5 − 0 and 1 − 2.
    losses = AOT(beta=0.5)(short_pairs(*PAIRS))
    assert losses.sum.tolist() == pytest.approx([minus_log_sigmoid(1.5), minus_log_sigmoid(0.5)], rel=1e-12)
    # Rewards stay the pair's own: log-ratios 2 and −1, −3 and 0.
    assert losses.meters["rewards/chosen"].tolist() == [1.0, -0.5]
    assert losses.meters["rewards/rejected"].tolist() == [-1.5, 0.0]


def test_label_smoothing_mixes_in_the_flipped_label() -> None:
    losses = AOT(beta=0.5, label_smoothing=0.1)(short_pairs(*PAIRS))
    expected = [0.9 * minus_log_sigmoid(margin) + 0.1 * minus_log_sigmoid(-margin) for margin in (1.5, 0.5)]
    assert losses.sum.tolist() == pytest.approx(expected, rel=1e-12)


def test_one_pair_is_dpo() -> None:
    assert AOT(beta=0.5)(worked_pair()).sum.item() == pytest.approx(minus_log_sigmoid(1.5), rel=1e-12)
