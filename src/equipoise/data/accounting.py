"""What happened to every row: kept, or dropped and why. Part of every run; nothing disappears silently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

SHOWN = 5
"""Row ids kept as examples for each reason."""


@dataclass
class Dropped:
    """How many rows were dropped for one reason, and the first few ids."""

    count: int = 0
    rows: list[str] = field(default_factory=list)


@dataclass
class Accounting:
    """Counts of rows. `rows_in` = `kept` + everything dropped, always (`check` asserts it).

    truncated_prompts: rows whose prompt lost its oldest turns or tokens. replies_cut: replies cut at the limit.
    eos_lost: replies whose end is not learned. made_identical: rows whose replies became equal tokens (also dropped).
    notes: other things a reader should know, and how often they happened; they drop nothing.
    """

    rows_in: int = 0
    kept: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    truncated_prompts: int = 0
    eos_lost: int = 0
    made_identical: int = 0
    replies_cut: int = 0
    notes: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, row_id: str) -> None:
        """Count one dropped row."""
        entry = self.dropped.setdefault(reason, Dropped())
        entry.count += 1
        if len(entry.rows) < SHOWN:
            entry.rows.append(row_id)

    def note(self, what: str, count: int = 1) -> None:
        """Count something worth knowing that dropped no row."""
        if count:
            self.notes[what] = self.notes.get(what, 0) + count

    @property
    def dropped_total(self) -> int:
        """Rows dropped for any reason."""
        return sum(entry.count for entry in self.dropped.values())

    def check(self) -> Accounting:
        """Assert that every row is accounted for; returns itself."""
        assert self.rows_in == self.kept + self.dropped_total, f"{self.rows_in} rows in, {self.kept} kept, {self.dropped_total} dropped"
        return self

    def add(self, other: Accounting) -> None:
        """Take in the counts of another part of the same data (a shard)."""
        for reason, entry in other.dropped.items():
            mine = self.dropped.setdefault(reason, Dropped())
            mine.count += entry.count
            mine.rows = (mine.rows + entry.rows)[:SHOWN]
        for what, count in other.notes.items():
            self.note(what, count)
        for name in ("rows_in", "kept", "truncated_prompts", "eos_lost", "made_identical", "replies_cut"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def in_words(self) -> str:
        """'3 of 5 rows dropped: empty reply (2: a:1, a:4); …', for messages."""
        if not self.dropped:
            return f"all {self.rows_in} rows kept"
        reasons = "; ".join(f"{reason} ({entry.count}: {', '.join(entry.rows)})" for reason, entry in self.dropped.items())
        return f"{self.dropped_total} of {self.rows_in} rows dropped: {reasons}"

    def outcome(self) -> str:
        """'15 of 40 rows kept: 15 chosen equals rejected, 10 empty reply; 3 prompts truncated': one line for a log."""
        reasons = ", ".join(f"{entry.count} {reason}" for reason, entry in self.dropped.items())
        kept = f"{self.kept} of {self.rows_in} rows kept: {reasons}" if reasons else f"all {self.rows_in} rows kept"
        cut = ((self.truncated_prompts, "prompt", "prompts", "truncated"), (self.replies_cut, "reply", "replies", "cut"))
        return "; ".join([kept, *(f"{count} {one if count == 1 else many} {done}" for count, one, many, done in cut if count)])

    def as_json(self) -> dict[str, Any]:
        """Plain data for `accounting.json`, after `check`."""
        self.check()
        return {
            "rows_in": self.rows_in,
            "kept": self.kept,
            "dropped": {reason: {"count": entry.count, "rows": list(entry.rows)} for reason, entry in self.dropped.items()},
            "truncated_prompts": self.truncated_prompts,
            "eos_lost": self.eos_lost,
            "made_identical": self.made_identical,
            "replies_cut": self.replies_cut,
            "notes": dict(self.notes),
        }

    @classmethod
    def joined(cls, stages: Iterable[Mapping[str, Any]]) -> Accounting:
        """Stages that rows went through one after another (several sources, then the tokenizer), each as `as_json`, as one count."""
        joined = cls()
        kept = 0
        for stage in map(cls.from_json, stages):
            joined.add(stage)
            kept = stage.kept
        joined.kept, joined.rows_in = kept, kept + joined.dropped_total
        return joined

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Accounting:
        """Read back `as_json`."""
        dropped = {reason: Dropped(entry["count"], list(entry["rows"])) for reason, entry in value["dropped"].items()}
        return cls(**{**value, "dropped": dropped, "notes": dict(value["notes"])})
