"""What a scorer is: `(prompt, completion) → verdict`. "No verdict" is None, never zero."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import Field

from equipoise.core.settings import Settings
from equipoise.generation._base import Completion, chosen


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one scorer says of one completion. value None: it could not say, and reason tells why.

    detail: what else it found; the `score` stage keeps it in a file of the scorer's own name, beside the verdicts.
    """

    id: str
    by: str
    value: float | None
    reason: str = ""
    detail: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """One line of `verdicts.jsonl`, and the detail where there is one."""
        row = {"id": self.id, "by": self.by, "value": self.value, "reason": self.reason}
        return row if self.detail is None else {**row, "detail": dict(self.detail)}


class Scorer(Protocol):
    """Scores completions, each on its own."""

    name: str

    def __call__(self, completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per completion, in order."""
        ...


class ScorerSettings(Settings, ABC):
    """Base of each scorer's settings. `scorer` is the name of its module in this folder."""

    scorer: str = Field(description="rules, reward_model, kl_to_base, implicit, token_credit, ensemble or judge")

    def inputs(self) -> dict[str, str]:
        """What the scorer reads besides the completions: name → fingerprint."""
        return {}

    def asked(self, completions: Sequence[Completion]) -> Sequence[Completion]:
        """Which completions it scores: all of them, unless a scorer's settings say otherwise."""
        return completions

    @abstractmethod
    def build(self) -> Scorer:
        """The scorer, ready to score."""


RULES = ("invalid", "refusal", "length")


def chosen_scorer(value: Any) -> Any:
    """A pydantic before-validator: `{scorer: NAME, …}` becomes that scorer's settings; a rule's bare name is enough."""
    if isinstance(value, str):
        value = {"scorer": "rules", "rule": value} if value in RULES else {"scorer": value}
    return chosen("scorers", "scorer")(value)
