"""The pair (or triple) the hand-worked values of the pairwise methods are computed on.

             tokens n   log π_θ ℓ   log π_ref   log-ratio r   mean ℓ/n   mean r/n
    chosen       2         −2          −4           2           −1          1
    rejected     4        −12         −11          −1           −3        −0.25
    gold         2         −3          −3           0          −1.5         0

so h = r_w − r_l = 3, ℓ_w − ℓ_l = 10, and the means differ by 2 (policy) and 1.25 (log-ratio).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from equipoise.core.records import REPLY_ROLES
from equipoise.objectives._base import Scored

ROLES = {
    "chosen": ([-0.5, -1.5], [-3.0, -1.0]),
    "rejected": ([-1.0, -2.0, -4.0, -5.0], [-2.0, -2.0, -3.0, -4.0]),
    "gold": ([-1.0, -2.0], [-2.0, -1.0]),
}


def worked_pair(*roles: str) -> Scored:
    """One unit: chosen and rejected, or the roles asked for."""
    roles = roles or ("chosen", "rejected")

    def rows(which: int) -> torch.Tensor:
        # What stands beyond a reply's end must not matter: 99 shows where it does.
        return torch.tensor([values + [99.0] * (4 - len(values)) for values in (ROLES[role][which] for role in roles)], dtype=torch.float64)

    policy, reference = rows(0), rows(1)
    role = torch.tensor([REPLY_ROLES.index(name) for name in roles])
    return Scored(policy, reference, policy != 99.0, torch.zeros(len(roles), dtype=torch.long), role)


def with_stat(view: Scored, name: str, *replies: list[float]) -> Scored:
    """The view with a statistic of each reply's tokens; 99 beyond its end."""
    rows = [values + [99.0] * (view.mask.shape[1] - len(values)) for values in replies]
    return replace(view, stats={name: torch.tensor(rows, dtype=torch.float64)})


def short_pairs(*pairs: tuple[float, float, float, float]) -> Scored:
    """Pairs of one-token replies: log π_θ and log π_ref of the chosen one, then of the rejected one."""
    policy = [value for pair in pairs for value in (pair[0], pair[2])]
    reference = [value for pair in pairs for value in (pair[1], pair[3])]
    role = torch.tensor([REPLY_ROLES.index("chosen"), REPLY_ROLES.index("rejected")] * len(pairs))
    tensors = [torch.tensor(values, dtype=torch.float64)[:, None] for values in (policy, reference)]
    mask = torch.ones(2 * len(pairs), 1, dtype=torch.bool)
    return Scored(tensors[0], tensors[1], mask, torch.arange(len(pairs)).repeat_interleave(2), role)


def minus_log_sigmoid(margin: float) -> float:
    """log(1 + e^−margin)."""
    return math.log1p(math.exp(-margin))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
