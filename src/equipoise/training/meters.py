"""Meters: sums and counts on the device, synchronised once per logged step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

Tensor = torch.Tensor


class Meters:
    """Averages of per-unit values over everything seen since the last `read`, over all ranks. NaN is missing."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], prefix: str = "") -> None:
        """Add [U] values by name. No synchronisation happens here."""
        for name, value in values.items():
            known = ~torch.isnan(value)
            total = torch.where(known, value, torch.zeros_like(value)).double().sum()
            key = prefix + name
            self._sums[key] = self._sums[key] + total if key in self._sums else total
            count = known.sum()
            self._counts[key] = self._counts[key] + count if key in self._counts else count

    def read(self) -> dict[str, float]:
        """Means by name, over all ranks; names without a value are left out. Starts afresh."""
        names = sorted(self._sums)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Ranks may have met different names (a label that one of them never saw).
            everyone: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(everyone, names)
            names = sorted({name for mine in everyone for name in mine})
        if not names:
            return {}
        zero = torch.zeros((), dtype=torch.float64, device=next(iter(self._sums.values())).device if self._sums else "cpu")
        table = torch.stack([torch.stack([self._sums.get(name, zero), self._counts.get(name, zero).to(zero)]) for name in names])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(table)
        self._sums, self._counts = {}, {}
        return {name: float(total / count) for name, (total, count) in zip(names, table.cpu(), strict=True) if count > 0}
