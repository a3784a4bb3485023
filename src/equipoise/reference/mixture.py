"""One virtual reference made of several stored ones (MRPO)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from equipoise.core.errors import DataError
from equipoise.data.rows import TokenRow
from equipoise.reference.store import ReferenceStore, Values

Floats = NDArray[np.float64]


class Mixture:
    """The reference π̃ with 1/π̃(y|x) = Σ_k α_k/π_k(y|x), read like a store.

    arXiv 2405.16388 (MRPO), with its clipping (CTRO) and adaptive weights as in public code (thaihungle/MRPO), but for the
    weights, which that code's two-reference form gives to each other's reference: here α_k is of reference k. α and the
    clipping are of whole replies. A token's value is what it adds to log π̃ of the tokens up to it, so that a reply's sum is
    exactly log π̃(y|x).

    Args:
        stores: of the references, the base reference first; all hold the same rows.
        weights: α, one a reference and 1 in all; or `adaptive`: α_k ∝ |log π_k(y_w|x) − log π_k(y_l|x)|, pair by pair.
        clip: ε; every further reference's log π_k(y|x) is kept within [1 + ε, 1 − ε] times the base's, ε shared out over
            the pair by the size of log π_k averaged over the references. None: no clipping.
    """

    def __init__(
        self, stores: Sequence[ReferenceStore], weights: Sequence[float] | Literal["adaptive"] = "adaptive", clip: float | None = 0.1
    ) -> None:
        self._stores, self._weights, self._clip = tuple(stores), weights, clip

    def get(self, row: TokenRow) -> list[Values]:
        """Log-probs of each reply of a row under the mixture, float32 [T] nats. Raises DataError where it needs a pair and has none."""
        logps = [store.get(row) for store in self._stores]
        learned = [branch.marks["learn"] for branch in row.branches]
        sums = np.array([[reply[mark].sum() for reply, mark in zip(replies, learned, strict=True)] for replies in logps], dtype=np.float64)
        with np.errstate(divide="ignore"):  # a weight of 0 is −∞: that reference does not count, however unlikely it finds the reply
            logs = np.log(self._alphas(row, sums))
        wanted = self._clipped(row, sums)
        mixed = []
        for number, mark in enumerate(learned):
            tokens = np.stack([replies[number] for replies in logps]).astype(np.float64)
            # A reply's log-probs are scaled to its clipped sum, and nothing outside the learned tokens counts.
            scale = np.divide(wanted[:, number], sums[:, number], out=np.ones(len(logps)), where=sums[:, number] != 0)
            so_far = np.cumsum(tokens * mark * scale[:, None], axis=1)
            total = -np.logaddexp.reduce(logs[:, None] - so_far, axis=0)
            mixed.append(np.diff(total, prepend=0.0).astype(np.float32))
        return mixed

    def _alphas(self, row: TokenRow, sums: Floats) -> Floats:
        if self._weights != "adaptive":
            return np.asarray(self._weights, dtype=np.float64)
        chosen, rejected = self._pair(row)
        apart = np.abs(sums[:, chosen] - sums[:, rejected])
        return apart / apart.sum() if apart.sum() > 0 else np.full(len(sums), 1 / len(sums))

    def _clipped(self, row: TokenRow, sums: Floats) -> Floats:
        """Each reference's log π_k(y|x), the further ones near the base's."""
        if self._clip is None:
            return sums
        chosen, rejected = self._pair(row)
        result = sums.copy()
        sizes = np.abs(sums.mean(0))
        whole = sizes[chosen] + sizes[rejected]
        share = sizes[chosen] / whole if whole > 0 else 0.5
        for reply, part in ((chosen, share), (rejected, 1 - share)):
            base, epsilon = sums[0, reply], self._clip * part
            result[1:, reply] = np.clip(sums[1:, reply], base * (1 + epsilon), base * (1 - epsilon))
        return result

    @staticmethod
    def _pair(row: TokenRow) -> tuple[int, int]:
        roles = [branch.role for branch in row.branches]
        if "chosen" not in roles or "rejected" not in roles:
            raise DataError(f"Row {row.id}: adaptive weights and clipping compare a chosen and a rejected reply, found roles {roles}.")
        return roles.index("chosen"), roles.index("rejected")
