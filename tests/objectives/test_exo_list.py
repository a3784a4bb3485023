from __future__ import annotations

import math

import pytest
import torch

from equipoise.core.errors import DataError
from equipoise.core.records import REPLY_ROLES
from equipoise.objectives._base import Scored
from equipoise.objectives.exo_list import EXOList


def lists(ratios: list[list[float]], scores: list[list[float]]) -> Scored:
    """Lists of one-token replies with the given log-ratios against a reference of −5 nats."""
    flat = torch.tensor([ratio for some in ratios for ratio in some], dtype=torch.float64)[:, None]
    return Scored(
        flat - 5,
        torch.full_like(flat, -5.0),
        torch.ones(len(flat), 1, dtype=torch.bool),
        torch.arange(len(ratios)).repeat_interleave(torch.tensor([len(some) for some in ratios])),
        torch.full((len(flat),), REPLY_ROLES.index("sample")),
        facts={"score": torch.tensor([score for some in scores for score in some], dtype=torch.float64)},
    )


def test_worked_by_hand() -> None:
    # p = (½, ¼, ¼) from βr = (log 2, 0, 0), q = (¼, ½, ¼) from scores/β_r = (0, log 2, 0): ½ log 2 + ¼ log ½ = ¼ log 2.
    # The second list asks for what the model says: p = q = (2/3, 1/3).
    log2 = math.log(2)
    losses = EXOList(beta=0.5, temperature=2.0)(lists([[2 * log2, 0, 0], [2 * log2, 0]], [[0, 2 * log2, 0], [2 * log2, 0]]))
    assert losses.sum.tolist() == pytest.approx([0.25 * log2, 0.0], abs=1e-12)
    assert losses.meters["rewards/chosen"].tolist() == pytest.approx([0.0, log2])
    # Two replies share the first list's lowest score: their mean. Of its two ordered pairs one is wrong and one a tie.
    assert losses.meters["rewards/rejected"].tolist() == pytest.approx([log2 / 2, 0.0])
    assert losses.meters["rewards/accuracies"].tolist() == [0.25, 1.0]


def test_a_missing_score_raises() -> None:
    with pytest.raises(DataError, match="score"):
        EXOList()(lists([[1.0, 2.0]], [[1.0, math.nan]]))


def test_a_reply_alone_raises() -> None:
    with pytest.raises(DataError, match="at least two replies; one has 1"):
        EXOList()(lists([[1.0]], [[1.0]]))
