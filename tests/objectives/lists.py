"""The two lists the hand-worked values of the list methods are computed on.

    list     replies: log-ratio r    score R      with β = ½, α = 2 and a = log 2:  βr         R/α        q
    first    2a, 0, 0                0, 2a, 0                                       a, 0, 0    0, a, 0    ¼, ½, ¼
    second   2a, 0                   2a, 0                                          a, 0       a, 0       ⅔, ⅓

Softmax of βr: ½, ¼, ¼ and ⅔, ⅓. σ(a) = ⅔, σ(−a) = ⅓.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from equipoise.core.records import REPLY_ROLES
from equipoise.objectives._base import Scored

A = math.log(2)


def view(ratios: list[list[float]], scores: list[list[float]], name: str = "score") -> Scored:
    """Lists of two-token replies with these log-ratios (all of it on the first token) and scores."""
    flat = torch.tensor([value for some in ratios for value in some], dtype=torch.float64)
    reference = torch.full((len(flat), 2), -3.0, dtype=torch.float64)
    return Scored(
        reference + torch.stack([flat, torch.zeros_like(flat)], 1),
        reference,
        torch.ones(len(flat), 2, dtype=torch.bool),
        torch.arange(len(ratios)).repeat_interleave(torch.tensor([len(some) for some in ratios])),
        torch.full((len(flat),), REPLY_ROLES.index("sample")),
        facts={name: torch.tensor([value for some in scores for value in some], dtype=torch.float64)},
    )


def worked_lists(name: str = "score") -> Scored:
    """Both lists, the second one's first reply moved to the front of all: lists need not lie together."""
    made = view([[2 * A, 0, 0], [2 * A, 0]], [[0, 2 * A, 0], [2 * A, 0]], name)
    return made._take(torch.tensor([3, 0, 1, 2, 4]))


def as_list(pair: Scored, chosen: float, rejected: float) -> Scored:
    """A pair of `pairs.py` as a list of two with these scores."""
    role = torch.full_like(pair.role, REPLY_ROLES.index("sample"))
    return replace(pair, role=role, facts={"score": torch.tensor([chosen, rejected], dtype=torch.float64)})
