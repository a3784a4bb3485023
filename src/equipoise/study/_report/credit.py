"""Token credit as the report shows it: whose replies, how strongly each piece is tinted, and the numbers behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from equipoise.study._report import numbers
from equipoise.study._report.read import Arm, StudyFiles, listing, mapping, turns
from equipoise.study.tables import Cell, Column, Row, Table

Lines = dict[str, dict[str, Any]]
"""Lines of `token_credit.jsonl` by prompt id."""
LEVELS = 4
PROMPTS = 4
"""Prompts shown of each axis."""
PIECES = 600
"""Pieces shown of a reply."""
_USUAL = 0.95
"""Share of the pieces whose credit is inside the scale; the rest is tinted like its ends."""
_LEAST = 0.1
"""Nats at which the strongest tint may begin at least: rounding is never tinted."""


@dataclass(frozen=True)
class Piece:
    """A piece of a reply: spaces in front (not tinted), what is written, its classes, what is told of it (lines of name, tab, words)."""

    space: str
    text: str
    css: str
    told: str


@dataclass(frozen=True)
class Credited:
    """One arm's reply: the sum of its credits, its number of tokens, its pieces, and words on those left out."""

    arm: Arm
    total: str
    tokens: str
    pieces: list[Piece]
    more: str = ""


@dataclass(frozen=True)
class Shown:
    """A prompt and the replies to it."""

    id: str
    axis: str
    turns: list[tuple[str, str]]
    replies: list[Credited]


@dataclass(frozen=True)
class View:
    """Everything the section says. `scale`: (class, words) of every tint, from blame to credit."""

    beta: str
    reference: str
    scale: list[tuple[str, str]]
    prompts: list[Shown]
    left_out: int
    sums: Table


def credit_view(files: StudyFiles) -> View | None:
    """The section's content, or None where no reply was credited."""
    found = [(arm, lines) for arm in files.arms if (lines := _lines(files, arm))]
    if not found:
        return None
    ids = list(dict.fromkeys(name for _, lines in found for name in lines))
    rows = {str(row.get("id")): row for row in files.replies}
    shown = _few(ids, rows)
    unit = _unit([size for _, lines in found for name in shown if name in lines for size in _sizes(lines[name])])
    prompts = [
        Shown(
            name,
            str(rows.get(name, {}).get("axis") or ""),
            turns(rows.get(name, {}).get("prompt")),
            [_credited(arm, lines[name], unit) for arm, lines in found if name in lines],
        )
        for name in shown
    ]
    betas = dict.fromkeys(f"{beta:g}" for _, lines in found for line in lines.values() if (beta := numbers.finite(line.get("beta"))))
    references = dict.fromkeys(name for arm, _ in found if (name := _reference(files, arm)))
    sums = _sums(found, ids, rows)
    return View(" and ".join(betas), " and ".join(references) or "the base", _scale(unit), prompts, len(ids) - len(shown), sums)


def _lines(files: StudyFiles, arm: Arm) -> Lines:
    """What was found of an arm's replies by prompt id: the first seed's that has any."""
    for run in arm.runs:
        for stage in map(files.stage, arm.stages(run)):
            if stage is not None and stage.credit:
                return {str(line.get("id")): line for line in stage.credit if listing(line.get("pieces"))}
    return {}


def _reference(files: StudyFiles, arm: Arm) -> str:
    stages = [stage for run in arm.runs for entry in arm.stages(run) if (stage := files.stage(entry)) is not None and stage.credit]
    scorers = [mapping(item) for stage in stages for item in listing(mapping(stage.settings).get("scorers"))]
    return next((str(item.get("base_model_name_or_path")) for item in scorers if item.get("scorer") == "token_credit"), "")


def _few(ids: list[str], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The first prompts of each axis, in order."""
    counts: dict[str, int] = {}
    shown = []
    for name in ids:
        axis = str(rows.get(name, {}).get("axis") or "")
        counts[axis] = counts.get(axis, 0) + 1
        if counts[axis] <= PROMPTS:
            shown.append(name)
    return shown


def _sizes(line: Mapping[str, Any]) -> Iterator[tuple[float, float]]:
    """(size of the credit, β) of every piece."""
    for piece in listing(line.get("pieces")):
        credit = numbers.finite(mapping(piece).get("credit"))
        if credit is not None:
            yield abs(credit), numbers.finite(line.get("beta")) or 0.0


def _unit(sizes: list[tuple[float, float]]) -> float:
    """Where the strongest tint begins: 1, 2, 4 or 8 times a power of ten, near the size that most pieces stay below."""
    ordered = sorted(size for size, _ in sizes)
    usual = ordered[min(int(_USUAL * len(ordered)), len(ordered) - 1)] if ordered else 0.0
    usual = max([usual, *(_LEAST * beta for _, beta in sizes)]) or 1.0
    power = 10.0 ** math.floor(math.log10(usual))
    return float(f"{max(step for step in (1, 2, 4, 8) if step * power <= usual * 1.0000001) * power:g}")


def _bounds(unit: float) -> list[float]:
    """Sizes at which the tints begin, each twice the one before."""
    return [unit / 2 ** (LEVELS - 1 - level) for level in range(LEVELS)]


def _scale(unit: float) -> list[tuple[str, str]]:
    bounds = [f"{bound:g}" for bound in _bounds(unit)]
    blame = [(f"n{level}", f"−{bounds[level - 1]}") for level in range(LEVELS, 0, -1)]
    return [*blame, ("", "near 0"), *((f"p{level}", f"+{bounds[level - 1]}") for level in range(1, LEVELS + 1))]


def _tint(credit: float | None, unit: float) -> str:
    """The class of a tint: p1 to p4 for credit, n1 to n4 for blame, none near 0."""
    level = 0 if credit is None else sum(abs(credit) >= bound for bound in _bounds(unit))
    return "" if not level else f"{'n' if (credit or 0) < 0 else 'p'}{level}"


def _credited(arm: Arm, line: Mapping[str, Any], unit: float) -> Credited:
    pieces = [mapping(item) for item in listing(line.get("pieces"))]
    rest = [numbers.finite(item.get("credit")) or 0.0 for item in pieces[PIECES:]]
    more = f"{len(rest):,} more pieces, credit {_credit(sum(rest))}" if rest else ""
    shown = [_piece(item, unit) for item in pieces[:PIECES]]
    return Credited(arm, _credit(line.get("credit")), f"{numbers.count(line.get('tokens'))} tokens", shown, more)


def _piece(item: Mapping[str, Any], unit: float) -> Piece:
    whole, aside = str(item.get("text") or ""), str(item.get("aside") or "")
    text = whole.lstrip(" ") or whole
    credit, policy, base = (numbers.finite(item.get(name)) for name in ("credit", "policy", "base"))
    told = [("credit", _credit(credit)), ("trained", _likely(policy)), ("reference", _likely(base))]
    if policy is not None and base is not None:
        told.append(("ratio", _times(policy - base)))
    if (reward := numbers.finite(item.get("reward"))) is not None:
        told.append(("reward", _credit(reward)))
    if (numbers.finite(item.get("tokens")) or 0) > 1:
        told.append(("tokens", numbers.count(item.get("tokens"))))
    kinds = ["c", _tint(credit, unit), "aside" if not text else "", "line" if "\n" in text and not text.strip() else ""]
    words = "\n".join(f"{name}\t{value}" for name, value in told)
    return Piece(whole[: len(whole) - len(text)], text or _visible(aside) or "∅", " ".join(kind for kind in kinds if kind), words)


def _credit(value: Any) -> str:
    return numbers.plain(value, "nats/token", sign=True)


def _likely(nats: float | None) -> str:
    """A log-probability, and what chance that is."""
    if nats is None:
        return numbers.MISSING
    share = 100 * math.exp(min(nats, 0.0))
    chance = "< 0.1" if share < 0.1 else f"{share:.1f}" if share < 99.95 else "> 99.9"
    return f"{numbers.plain(nats, 'nats/token')} ({chance}\u00a0%)"


def _times(nats: float) -> str:
    """How many times as likely: 12, 2.71, 0.368."""
    if abs(nats) > 13.8:  # a million
        return "over a million times" if nats > 0 else "under a millionth"
    times = math.exp(nats)
    return f"{times:,.0f} times" if times >= 10 else f"{times:.3g} times"


def _visible(text: str) -> str:
    """White space that can be seen."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")


def _sums(found: list[tuple[Arm, Lines]], ids: list[str], rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Prompts by arms: the sum of each reply's credits."""
    sections: dict[str, list[Row]] = {}
    for name in ids:
        cells = []
        for _, lines in found:
            line = lines.get(name, {})
            detail = (f"{numbers.count(line.get('tokens'))} tokens",) if line else ()
            cells.append(Cell(_credit(line.get("credit")), detail, numbers.finite(line.get("credit"))))
        sections.setdefault(str(rows.get(name, {}).get("axis") or ""), []).append(Row(name, cells))
    return Table("credit", "Sums of token credit", "Reply to", [Column(arm.name) for arm, _ in found], list(sections.items()))
