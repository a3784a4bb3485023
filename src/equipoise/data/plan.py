"""The plan: which rows make which optimizer step, cut into micro-batches, made ahead from lengths alone.

The batch is counted in units (pairs, rows) per optimizer step; the token budget only cuts it. The plan is a pure
function of lengths, sizes and seed, so every rank makes the same one and takes its own part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from equipoise.core.errors import UsageError

Lengths = Sequence[tuple[int, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one stream that go through the model together. idle: run for its collectives only, its loss counts nothing."""

    stream: int
    rows: tuple[int, ...]
    idle: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: every rank's micro-batches (equally many on each) and the rows of each stream over all ranks."""

    ranks: tuple[tuple[MicroBatch, ...], ...]
    rows: tuple[tuple[int, ...], ...]


def cost(lengths: tuple[int, tuple[int, ...]], shared: bool) -> int:
    """Positions one row takes: its prompt once, or once for each reply."""
    prompt, branches = lengths
    return prompt + sum(branches) if shared else sum(prompt + branch for branch in branches)


def first_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Numbers of the sizes in each bin: each goes into the first bin with room for it; one beyond the budget goes alone.

    A tree holds the most room among the bins below each node, so a bin is found in log n: a whole epoch is cut at once.
    """
    leaves = 1 << (len(sizes) - 1).bit_length() if sizes else 0
    room = [budget] * (2 * leaves)
    bins: list[list[int]] = []
    for index, size in enumerate(sizes):
        node = 1 if size <= budget else leaves + len(bins)
        while node < leaves:
            node = 2 * node if room[2 * node] >= size else 2 * node + 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(index)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


@dataclass(frozen=True)
class Planner:
    """Makes the steps of an epoch.

    lengths: per stream, (P, (T1..TK)) of every row. batch_size: units per stream and optimizer step, over all ranks.
    token_budget: positions at most in a micro-batch (one larger row still goes alone). shared: prompts are shared.
    padded: rows are padded to the longest of their micro-batch, so cutting goes by length.
    """

    lengths: tuple[Lengths, ...]
    batch_size: int
    token_budget: int
    seed: int = 0
    shuffle: bool = True
    shared: bool = True
    padded: bool = False
    world_size: int = 1
    _orders: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for number, lengths in enumerate(self.lengths):
            if not len(lengths):
                raise UsageError(f"Stream {number} has no rows to train on.")
        if self.batch_size < self.world_size:
            raise UsageError(f"A batch of {self.batch_size} units cannot feed {self.world_size} processes; each needs at least one.")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the first stream; the last may be smaller."""
        return -(-len(self.lengths[0]) // self.batch_size)

    def step(self, number: int) -> Step:
        """The step with this number, counted from 0 over all epochs."""
        epoch, inside = divmod(number, self.steps_per_epoch)
        rows = [self._order(0, epoch)[inside * self.batch_size : (inside + 1) * self.batch_size]]
        # Every stream gives as many rows as the first one, so the others go on where the steps before this one ended.
        taken = epoch * len(self.lengths[0]) + inside * self.batch_size
        for stream in range(1, len(self.lengths)):
            rows.append(self._cycle(stream, taken, len(rows[0])))
        ranks: list[list[MicroBatch]] = [[] for _ in range(self.world_size)]
        for stream, chosen in enumerate(rows):
            for rank, cuts in enumerate(self._spread(stream, chosen)):
                ranks[rank].extend(cuts)
        return Step(tuple(tuple(cuts) for cuts in ranks), tuple(tuple(int(row) for row in chosen) for chosen in rows))

    def all_rows(self, stream: int, rank: int = 0) -> list[MicroBatch]:
        """Every row of a stream once, longest first, cut for one rank: evaluation and the reference use this."""
        order = sorted(range(len(self.lengths[stream])), key=lambda row: (-self._cost(stream, row), row))
        return [MicroBatch(stream, tuple(cut)) for cut in self._cut(stream, order[rank :: self.world_size])]

    def _order(self, stream: int, epoch: int) -> np.ndarray:
        if (stream, epoch) not in self._orders:
            size = len(self.lengths[stream])
            order = np.random.default_rng([self.seed, stream, epoch]).permutation(size) if self.shuffle else np.arange(size)
            # Only the newest order of a stream is kept: steps are asked for in order.
            for key in [key for key in self._orders if key[0] == stream]:
                del self._orders[key]
            self._orders[stream, epoch] = order
        return self._orders[stream, epoch]

    def _cycle(self, stream: int, start: int, count: int) -> np.ndarray:
        """`count` rows from position `start` of an endless row of reshuffled passes: a buffer restarts when exhausted."""
        size = len(self.lengths[stream])
        picked = []
        for position in range(start, start + count):
            lap, inside = divmod(position, size)
            picked.append(self._order(stream, lap)[inside])
        return np.array(picked)

    def _spread(self, stream: int, rows: np.ndarray) -> list[list[MicroBatch]]:
        """Deal a step's rows to ranks by cost, largest first to the least loaded, and give every rank as many micro-batches."""
        loads = [0] * self.world_size
        hands: list[list[int]] = [[] for _ in range(self.world_size)]
        for row in sorted((int(row) for row in rows), key=lambda row: (-self._cost(stream, row), row)):
            rank = min(range(self.world_size), key=lambda rank: (loads[rank], rank))
            hands[rank].append(row)
            loads[rank] += self._cost(stream, row)
        cuts = [self._cut(stream, hand) for hand in hands]
        most = max(len(cut) for cut in cuts)
        spread = []
        for cut in cuts:
            batches = [MicroBatch(stream, tuple(rows)) for rows in cut]
            # A rank without work still has to take part in every collective: it runs a row whose loss counts nothing.
            filler = min((int(row) for row in rows), key=lambda row: self._cost(stream, row))
            batches += [MicroBatch(stream, (filler,), idle=True)] * (most - len(batches))
            spread.append(batches)
        return spread

    def _cut(self, stream: int, rows: Sequence[int]) -> list[list[int]]:
        """Cut rows (longest first) under the token budget: first fit; by neighbouring length where padding would count."""
        if not self.padded:
            bins = first_fit([self._cost(stream, row) for row in rows], self.token_budget)
            return [[rows[index] for index in found] for found in bins]
        cuts: list[list[int]] = []
        for row in rows:
            last = [*(cuts[-1] if cuts else []), row]
            replies = sum(len(self.lengths[stream][other][1]) for other in last)
            if len(last) > 1 and max(self._width(stream, other) for other in last) * replies <= self.token_budget:
                cuts[-1].append(row)
            else:
                cuts.append([row])
        return cuts

    def _width(self, stream: int, row: int) -> int:
        prompt, branches = self.lengths[stream][row]
        return prompt + max(branches)

    def _cost(self, stream: int, row: int) -> int:
        return cost(self.lengths[stream][row], self.shared)
