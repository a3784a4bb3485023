"""Several scorers as one: their mean, or their minimum (a reply must please all of them).

Coste et al., "Reward model ensembles help mitigate overoptimization", arXiv 2310.02743: mean and worst-case
optimisation over members. Members should score on one scale; nothing is standardised here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from equipoise.generation._base import Completion
from equipoise.scorers._base import Scorer, ScorerSettings, Verdict, chosen_scorer


class Ensemble(Scorer):
    """Combines its members' verdicts. None where any member has none: a mean over those left would be another scorer's."""

    def __init__(self, members: Sequence[Scorer], combine: Literal["mean", "min"] = "mean", name: str = "ensemble") -> None:
        self._members, self._combine, self.name = tuple(members), combine, name

    def __call__(self, completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per completion, in order."""
        columns = [member(completions) for member in self._members]
        return [self._together(completion.id, verdicts) for completion, *verdicts in zip(completions, *columns, strict=True)]

    def _together(self, completion_id: str, verdicts: Sequence[Verdict]) -> Verdict:
        values: list[float] = []
        for verdict in verdicts:
            if verdict.value is None:
                return Verdict(completion_id, self.name, None, f"{verdict.by}: {verdict.reason or 'no verdict'}")
            values.append(verdict.value)
        return Verdict(completion_id, self.name, min(values) if self._combine == "min" else sum(values) / len(values))


class EnsembleSettings(ScorerSettings):
    """Which scorers, and how they are combined."""

    scorer: Literal["ensemble"] = "ensemble"
    members: tuple[Annotated[SerializeAsAny[ScorerSettings], BeforeValidator(chosen_scorer)], ...] = Field(
        min_length=2, description="the scorers to combine, all in memory at once"
    )
    combine: Literal["mean", "min"] = Field(default="mean", description="mean, or the least pleased member's value")
    name: str = Field(default="ensemble", min_length=1, description="what the verdicts are signed with")

    def inputs(self) -> dict[str, str]:
        """What all members read."""
        return {f"{number} {name}": value for number, member in enumerate(self.members) for name, value in member.inputs().items()}

    def build(self) -> Scorer:
        """Build every member."""
        return Ensemble([member.build() for member in self.members], self.combine, self.name)


SETTINGS = EnsembleSettings
