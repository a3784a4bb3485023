"""Is the judge independent: does a prompt stand in two of policy training, judge training and test.

A judge that was trained on the test prompts, or on what the models were trained on, rewards what it has seen; a model
trained on the test prompts recites. Either way the headline is withheld, unless overridden, which is stamped on the result.
What nobody recorded cannot be checked, and is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.core.prints import Overlap, PromptPrints, conversation_text
from equipoise.evaluation.intervals import rounded
from equipoise.generation._base import Prompt

POLICY, JUDGE, TEST = "policy training", "judge training", "test"

_LISTED = 200  # of each kind; the counts are always complete


@dataclass(frozen=True)
class Independence:
    """What the check found. `blocked`: a prompt is shared. `overridden`: shared, and the headline is given all the same."""

    blocked: bool
    overridden: bool
    overlaps: tuple[Mapping[str, Any], ...]
    counts: Mapping[str, int]
    unknown: tuple[str, ...]

    @property
    def withheld(self) -> bool:
        """Whether the headline is withheld."""
        return self.blocked and not self.overridden

    def as_json(self) -> dict[str, Any]:
        """The `independence` entry of evaluation.json."""
        return {
            "blocked": self.blocked,
            "overridden": self.overridden,
            "overlaps": [dict(item) for item in self.overlaps],
            "counts": dict(self.counts),
            "unknown": list(self.unknown),
        }

    def warnings(self) -> list[str]:
        """What a reader must know first."""
        found = []
        if self.blocked:
            shared = "; ".join(
                f"{count} prompt{'s' if count > 1 else ''} shared between {pair}" for pair, count in self.counts.items() if count
            )
            fate = "The headline is given because this was overridden." if self.overridden else "The headline is withheld."
            found.append(f"The judge is not independent: {shared}. {fate}")
        return found + [f"Independence cannot be checked in full: {item}." for item in self.unknown]


def check(
    prompts: Sequence[Prompt],
    policies: Sequence[Path],
    judge: Path | None,
    near: float = 0.8,
    allow_overlap: bool = False,
) -> Independence:
    """Compare the prints of test prompts, policy training and judge training with each other.

    policies, judge: `trained_on.npz` files; none means nobody recorded it. Raises DataError for a file that is absent or damaged.
    """
    test = PromptPrints.of(conversation_text(prompt.messages) for prompt in prompts)
    trained = PromptPrints.merge([PromptPrints.load(path) for path in policies]) if policies else None
    judged = PromptPrints.load(judge) if judge is not None else None
    unknown = [
        f"what the {who} on is not recorded"
        for who, prints in (("models were trained", trained), ("judge was trained", judged))
        if prints is None
    ]
    overlaps: list[Mapping[str, Any]] = []
    counts: dict[str, int] = {}
    for name, prints in ((POLICY, trained), (JUDGE, judged)):
        if prints is not None:
            found = test.shared_with(prints, near)
            counts[f"{name} and {TEST}"] = len(found)
            overlaps += [_entry((name, TEST), item, prompts[item.index].id) for item in found[:_LISTED]]
    if trained is not None and judged is not None:
        found = judged.shared_with(trained, near)
        counts[f"{POLICY} and {JUDGE}"] = len(found)
        overlaps += [_entry((POLICY, JUDGE), item, f"prompt {item.index} of {JUDGE}") for item in found[:_LISTED]]
    blocked = any(counts.values())
    return Independence(blocked, blocked and allow_overlap, tuple(overlaps), counts, tuple(unknown))


def _entry(between: tuple[str, str], overlap: Overlap, name: str) -> dict[str, Any]:
    return {"between": list(between), "kind": overlap.kind, "similarity": rounded(overlap.similarity), "test_id": name}
