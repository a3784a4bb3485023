"""What a scorer is: `(prompt, completion) → verdict`. "No verdict" is None, never zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from equipoise.generation._base import Completion


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one scorer says of one completion. value None: it could not say, and reason tells why."""

    id: str
    by: str
    value: float | None
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """One line of `verdicts.jsonl`."""
        return {"id": self.id, "by": self.by, "value": self.value, "reason": self.reason}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Verdict:
        """Read back one line of `verdicts.jsonl`."""
        return cls(str(row["id"]), row["by"], row["value"], row.get("reason", ""))


class Scorer(Protocol):
    """Scores completions, each on its own."""

    name: str

    def __call__(self, completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per completion, in order."""
        ...
