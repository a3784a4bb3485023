from __future__ import annotations

import numpy as np
import pytest
import torch

from equipoise.core.errors import DataError
from equipoise.core.records import REPLY_ROLES
from equipoise.objectives._base import Scored
from equipoise.objectives.sft import SFT


def gold(policy: list[list[float]], mask: list[list[int]]) -> Scored:
    units = len(policy)
    role = torch.full((units,), REPLY_ROLES.index("gold"))
    return Scored(torch.tensor(policy), None, torch.tensor(mask).bool(), torch.arange(units), role)


def test_sums_the_learned_tokens() -> None:
    # −(−1 −2) = 3 and −(−4) = 4; the masked −9 counts nothing.
    losses = SFT()(gold([[-1.0, -2.0], [-4.0, -9.0]], [[1, 1], [1, 0]]))
    assert losses.sum.tolist() == [3.0, 4.0]
    assert losses.meters["nll"].tolist() == [1.5, 4.0]


def test_counts_learned_tokens() -> None:
    assert SFT().count({"gold": np.array([True, False, True])}, {}) == 2.0


def test_nothing_to_learn_raises() -> None:
    with pytest.raises(DataError, match="no token to learn"):
        SFT()(gold([[-1.0]], [[0]]))
