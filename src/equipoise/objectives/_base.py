"""What every objective is: a frozen set of hyper-parameters, and a pure function of log-probs and a mask.

Objectives never see text, tokenizers, models or ranks, and never reduce over units: the engine divides the sum
over a whole optimizer step (all micro-batches, streams and ranks) by the count of that whole step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from equipoise.core.errors import DataError, NumericsError, nearest
from equipoise.core.records import REPLY_ROLES

Tensor = torch.Tensor
STATS = {
    "lse": "log Σ_v e^{logit_v}, the logits' V in nats",
    "entropy": "−Σ_v π_θ(v) log π_θ(v), nats",
    "log_sum_sq": "log Σ_v π_θ(v)², nats",
    "kl_ref": "Σ_v π_ref(v) log(π_ref(v)/π_θ(v)), nats",
}
"""What `Needs.stats` may ask for: of the distribution a reply token was drawn from, v over the vocabulary. All carry gradient."""


@dataclass(frozen=True)
class Needs:
    """What an objective reads.

    roles: branch roles each unit must have, exactly once each (for lists: `many=True`, any number of them).
    reference: `none`; `stored` (the reference store, or adapter off); `live` (a reference forward in the same micro-batch).
    stats: per-token extras of the policy's whole distribution, by name (see `STATS`); kl_ref needs a live reference.
    marks: per-token marks beside `learn`, by name (`data/marks.py`).
    facts: per-branch facts that must not be missing.
    readout: `logps` of reply tokens, or one `score` per branch from a sequence-classification head.
    coupled: the loss needs the whole step's statistic, so the engine makes two passes.
    """

    roles: tuple[str, ...]
    reference: Literal["none", "stored", "live"] = "none"
    stats: frozenset[str] = frozenset()
    marks: frozenset[str] = frozenset()
    facts: tuple[str, ...] = ()
    readout: Literal["logps", "score"] = "logps"
    coupled: bool = False
    many: bool = False


@dataclass(frozen=True)
class Scored:
    """N branches of U units. policy, reference, mask, stats and marks: [N, T]; score, unit, role: [N]; facts: name → [N].

    Log-probs are in nats, float32 or float64; `mask` is 1 where the objective may look. `unit` numbers units from 0;
    `role` indexes `equipoise.core.records.REPLY_ROLES`. NaN in facts is missing.
    sides: role → [U] indices of the branches that have it, in unit order, where the batch was planned that way; then no
    value has to be read back from the device to find a side, or to know that its replies have tokens to learn.
    """

    policy: Tensor | None
    reference: Tensor | None
    mask: Tensor
    unit: Tensor
    role: Tensor
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    marks: Mapping[str, Tensor] = field(default_factory=dict)
    score: Tensor | None = None
    facts: Mapping[str, Tensor] = field(default_factory=dict)
    sides: Mapping[str, Tensor] = field(default_factory=dict)
    planned: bool = False

    def __post_init__(self) -> None:
        shape = self.mask.shape
        if self.mask.ndim != 2:
            raise NumericsError(f"mask must be [N, T], found {tuple(shape)}.")
        for name, value in {"policy": self.policy, "reference": self.reference, **self.stats, **self.marks}.items():
            if value is not None and value.shape != shape:
                raise NumericsError(f"{name} has shape {tuple(value.shape)}, mask {tuple(shape)}: they must be equal.")
        for name, value in {"unit": self.unit, "role": self.role, "score": self.score, **self.facts}.items():
            if value is not None and value.shape != shape[:1]:
                raise NumericsError(f"{name} has shape {tuple(value.shape)}, expected [{shape[0]}].")

    @property
    def units(self) -> int:
        """U, how many units there are."""
        return int(self.unit.max()) + 1 if len(self.unit) else 0

    def side(self, role: str) -> Scored:
        """The branches with this role, one per unit, in unit order: [U, T]. Raises DataError where a unit has none or two."""
        if role in self.sides:
            return replace(self._take(self.sides[role]), planned=True)
        if role not in REPLY_ROLES:
            raise DataError(f"No reply has the role {role!r}.{nearest(role, REPLY_ROLES)}")
        index = torch.nonzero(self.role == REPLY_ROLES.index(role), as_tuple=True)[0]
        order = index[torch.argsort(self.unit[index], stable=True)]
        if not torch.equal(self.unit[order], torch.arange(self.units, device=self.unit.device)):
            raise DataError(f"Every unit needs exactly one {role!r} reply; {self.units} units, {len(index)} such replies.")
        return self._take(order)

    def groups(self) -> Iterator[Scored]:
        """The branches of each unit in turn, K of them each."""
        for unit in range(self.units):
            group = self._take(torch.nonzero(self.unit == unit, as_tuple=True)[0])
            yield replace(group, unit=torch.zeros_like(group.unit))

    def _take(self, index: Tensor) -> Scored:
        def pick(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[index]

        return Scored(
            policy=pick(self.policy),
            reference=pick(self.reference),
            mask=self.mask[index],
            unit=self.unit[index],
            role=self.role[index],
            stats={name: value[index] for name, value in self.stats.items()},
            marks={name: value[index] for name, value in self.marks.items()},
            score=pick(self.score),
            facts={name: value[index] for name, value in self.facts.items()},
        )

    # Sums and means over the reply's masked tokens; a reply with no token to learn has no mean, so it raises.

    def token_logps(self, of: Literal["policy", "reference"]) -> Tensor:
        """[N, T] log-probability of each token, nats; 0 outside the mask."""
        return masked(self._need(of), self.mask)

    def policy_logps(self) -> Tensor:
        """[N] summed log-probability of each reply under the policy, nats."""
        return self.token_logps("policy").sum(1)

    def reference_logps(self) -> Tensor:
        """[N] summed log-probability of each reply under the reference, nats."""
        return self.token_logps("reference").sum(1)

    def logratios(self) -> Tensor:
        """[N] log π_θ(y|x) − log π_ref(y|x), nats: the implicit reward without its β."""
        return masked(self._need("policy") - self._need("reference"), self.mask).sum(1)

    def stat(self, name: str) -> Tensor:
        """[N, T] a statistic of the policy's distribution at each token (see `STATS`); 0 outside the mask. Carries gradient."""
        if name not in self.stats:
            raise NumericsError(f"This objective needs the statistic {name}, and the engine gave none.")
        return masked(self.stats[name], self.mask)

    def lengths(self) -> Tensor:
        """[N] tokens each reply is judged on. Raises DataError where one has none."""
        lengths = self.mask.sum(1)
        if not self.planned and bool((lengths == 0).any()):
            raise DataError("A reply has no token to learn from (its mask is empty).")
        return lengths

    def _need(self, name: str) -> Tensor:
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise NumericsError(f"This objective needs {name} log-probs, and the engine gave none.")
        return value


@dataclass(frozen=True)
class Losses:
    """sum: [U], one loss per unit (a sum over its tokens where the count is tokens), never reduced.

    meters: name → ([U] values, detached); the engine averages them over units under TRL's names.
    """

    sum: Tensor
    meters: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(BaseModel):
    """Base of every objective. Fields are hyper-parameters; class facts say where it comes from.

    paper: where the formula stands, with equation. departures: what differs from it ('none' where nothing does).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    paper: ClassVar[str]
    departures: ClassVar[str]
    needs: ClassVar[Needs]

    def __call__(self, scored: Scored) -> Losses:
        """Losses of each unit. Pure: no state, no randomness, no reduction over units."""
        raise TypeError(f"{type(self).__name__} does not say how to compute its loss.")

    def facts(self) -> tuple[str, ...]:
        """Facts every reply must have: those of `needs`, unless a setting names others."""
        return self.needs.facts

    def count(self, marks: Mapping[str, NDArray[np.bool_]], facts: Mapping[str, float]) -> float:
        """What one unit adds to the step's divisor, known when planned. 1 a unit unless overridden (SFT: tokens).

        marks: role → learn mark [T] of that branch. facts: the unit's facts by name.
        """
        return 1.0


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """Values [N, T] with everything outside the mask replaced by 0, also where it is not finite."""
    return torch.where(mask.bool(), values, torch.zeros((), dtype=values.dtype, device=values.device))


def objective_class(module: Any) -> type[Objective]:
    """The one public Objective subclass of a method's module."""
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one Objective, found {len(found)}.")
    return found[0]
