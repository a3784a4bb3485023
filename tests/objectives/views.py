"""Random `Scored` views for any objective, built from what it says it needs."""

from __future__ import annotations

import torch

from equipoise.core.records import REPLY_ROLES
from equipoise.objectives._base import Needs, Scored

WIDTH = 7


def random_view(needs: Needs, units: int = 5, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Scored:
    """A view with one branch per needed role and unit (lists: two to four), in shuffled order, with ragged masks."""
    generator = torch.Generator().manual_seed(seed)
    roles = [[REPLY_ROLES.index(role) for role in needs.roles] * (2 + unit % 3 if needs.many else 1) for unit in range(units)]
    size = sum(map(len, roles))
    order = torch.randperm(size, generator=generator)
    unit = torch.arange(units).repeat_interleave(torch.tensor([len(some) for some in roles]))[order]
    role = torch.tensor([role for some in roles for role in some])[order]
    lengths = torch.randint(1, WIDTH + 1, (size,), generator=generator)
    mask = torch.arange(WIDTH)[None] < lengths[:, None]

    def logps() -> torch.Tensor:
        return -scale * torch.rand(size, WIDTH, generator=generator, dtype=dtype) * mask

    def stat(name: str) -> torch.Tensor:
        values = scale * torch.rand(size, WIDTH, generator=generator, dtype=dtype) * mask
        return -values if name == "log_sum_sq" else values

    def fact() -> torch.Tensor:
        """1 or 0 for a whole unit; in a list every reply has its own number."""
        if needs.many:
            return torch.rand(size, generator=generator, dtype=torch.float64)
        return torch.randint(0, 2, (units,), generator=generator).double()[unit]

    return Scored(
        policy=logps() if needs.readout == "logps" else None,
        reference=logps() if needs.reference != "none" else None,
        mask=mask,
        unit=unit,
        role=role,
        score=scale * torch.randn(size, generator=generator, dtype=dtype) if needs.readout == "score" else None,
        stats={name: stat(name) for name in sorted(needs.stats)},
        marks={name: torch.rand(size, WIDTH, generator=generator) < 0.5 for name in sorted(needs.marks)},
        facts={name: fact() for name in needs.facts},
    )


def values_of(view: Scored) -> torch.Tensor:
    """The tensor gradients flow to: log-probs or scores."""
    values = view.policy if view.policy is not None else view.score
    assert values is not None
    return values
