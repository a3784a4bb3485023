"""What a search over learning rates found: every candidate's score on dev prompts, and the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.core.files import read_jsonl
from equipoise.scorers._stage import VERDICTS
from equipoise.study._graph import Arm

SEARCH = "search.json"


@dataclass(frozen=True)
class Tried:
    """One candidate: its learning rate, the arm it makes, its score (a mean over dev prompts, higher is better), its KL to the base."""

    learning_rate: float
    arm: Arm
    score: float
    kl: float | None = None


@dataclass(frozen=True)
class Found:
    """One arm's search. by: what the score is; prompts: how many were asked; tried: candidates that did not fail.

    max_kl: nats a token beyond which a candidate is not chosen, unless all are: then the nearest to the base is.
    """

    arm: str
    by: str
    prompts: int
    tried: Sequence[Tried]
    max_kl: float | None = None

    @property
    def chosen(self) -> float | None:
        """The learning rate with the highest score, the smallest of equals; None where every candidate failed."""
        if not self.tried:
            return None
        near = [one for one in self.tried if self.max_kl is None or (one.kl is not None and one.kl <= self.max_kl)]
        if not near:
            return min(self.tried, key=lambda one: (float("inf") if one.kl is None else one.kl, one.learning_rate)).learning_rate
        return min(near, key=lambda one: (-one.score, one.learning_rate)).learning_rate

    def in_words(self) -> str:
        """One line for the log."""
        shown = ", ".join(
            f"{one.learning_rate:g}: {one.score:.3f}" + ("" if one.kl is None else f" at KL {one.kl:.2f}") for one in self.tried
        )
        shown = shown or "every candidate failed"
        return f"search of {self.arm} by {self.by} on {self.prompts} dev prompts: {shown}" + (
            f"; chosen {self.chosen:g}" if self.chosen is not None else ""
        )

    def as_json(self, folder: Path) -> dict[str, Any]:
        """Plain data for `search.json`."""
        return {
            "arm": self.arm,
            "by": self.by,
            "prompts": self.prompts,
            "chosen": self.chosen,
            "max_kl_to_base": self.max_kl,
            "candidates": [
                {
                    "learning_rate": one.learning_rate,
                    "score": one.score,
                    "kl_to_base": one.kl,
                    "model": (one.arm.training[-1].folder(folder) / "model").relative_to(folder).as_posix(),
                }
                for one in self.tried
            ],
        }


def chosen_by(what: str, folders: Sequence[Path], axes: Mapping[str, str]) -> list[float]:
    """The score of each candidate from its verdicts.

    Args:
        what: `reward` or `right_refusals` (see `SearchSettings.choose`).
        folders: the candidates' score stages.
        axes: prompt id → axis.

    Returns:
        Means over the prompts, one a candidate. A prompt without a verdict counts as answered worst.
    """
    verdicts = [_verdicts(folder) for folder in folders]
    if not verdicts:
        return []
    if what == "right_refusals":
        return [_right_refusals(found, axes) for found in verdicts]
    rewards = np.array([[_number(found, prompt, "reward") for prompt in axes] for found in verdicts])
    invalid = np.array([[_number(found, prompt, "invalid") != 0 for prompt in axes] for found in verdicts])
    known = rewards[~np.isnan(rewards)]
    floor = np.full(len(axes), known.min() if len(known) else 0.0)
    seen = ~np.isnan(rewards).all(0)
    floor[seen] = np.nanmin(rewards[:, seen], 0)
    return [float(row.mean()) for row in np.where(invalid | np.isnan(rewards), floor, rewards)]


def divergences(folders: Sequence[Path]) -> list[float | None]:
    """Mean nats a token from the base of each candidate's replies; None where they were not scored by it."""
    found: list[float | None] = []
    for folder in folders:
        values = [row["value"] for row in read_jsonl(folder / VERDICTS) if row["by"] == "kl_to_base" and row["value"] is not None]
        found.append(float(np.mean(values)) if values else None)
    return found


def _right_refusals(found: Mapping[tuple[str, str], float | None], axes: Mapping[str, str]) -> float:
    """The mean over axes of the share of prompts that are validly refused (harmful) or validly answered (the others)."""
    right: dict[str, list[bool]] = {}
    for prompt, axis in axes.items():
        refused = _number(found, prompt, "refusal")
        right.setdefault(axis, []).append(_number(found, prompt, "invalid") == 0 and refused == float(axis == "harmful"))
    return float(np.mean([np.mean(some) for some in right.values()]))


def _number(found: Mapping[tuple[str, str], float | None], prompt: str, by: str) -> float:
    value = found.get((prompt, by))
    return float("nan") if value is None else float(value)


def _verdicts(folder: Path) -> dict[tuple[str, str], float | None]:
    return {(row["id"], row["by"]): row["value"] for row in read_jsonl(folder / VERDICTS)}
