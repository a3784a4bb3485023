"""Numbers as people read them: fixed decimals per unit, a true minus sign, an em dash for what is missing."""

from __future__ import annotations

import math
from typing import Any

MISSING = "—"
_DECIMALS = {"%": 1, "percentage points": 1, "tokens": 1, "characters": 0, "nats/token": 3, "nats a token": 3, "nats per token": 3}


def finite(value: Any) -> float | None:
    """The value as a finite float, or None: text, NaN, infinities, booleans and null are all missing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def decimals(unit: str) -> int:
    """How many decimals figures in this unit are shown with (2 where the unit is not known)."""
    return _DECIMALS.get(unit, 2)


def plain(value: Any, unit: str = "", sign: bool = False) -> str:
    """One figure without its unit: '−0.41', '42.0', '—' when missing. `sign` puts a plus before positive ones."""
    number = finite(value)
    if number is None:
        return MISSING
    places = decimals(unit)
    text = f"{abs(number):,.{places}f}"
    if float(text.replace(",", "")) == 0:
        return text
    return ("−" if number < 0 else "+" if sign else "") + text


def with_unit(value: Any, unit: str, sign: bool = False) -> str:
    """One figure with its unit: '42.0 %', '+0.62 reward'."""
    text = plain(value, unit, sign)
    return text if text == MISSING or not unit else f"{text}\u00a0{unit}"


def interval(low: Any, high: Any, unit: str = "", sign: bool = False) -> str:
    """'0.31 to 0.93', or an empty text when either end is missing."""
    if finite(low) is None or finite(high) is None:
        return ""
    return f"{plain(low, unit, sign)} to {plain(high, unit, sign)}"


def p_value(value: Any) -> str:
    """A p-value: '0.23', '0.004', '< 0.001'."""
    number = finite(value)
    if number is None:
        return MISSING
    if number < 0.001:
        return "< 0.001"
    return f"{number:.3f}" if number < 0.1 else f"{number:.2f}"


def count(value: Any) -> str:
    """A count: '1,800', '1.24 M', '3.4 P'."""
    number = finite(value)
    if number is None:
        return MISSING
    if abs(number) < 100_000:
        return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.2f}"
    for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}\u00a0{letter}" if abs(number) < 999.5 * factor else f"{number / factor:,.0f}\u00a0{letter}"
    return f"{number:g}"


def duration(value: Any) -> str:
    """Seconds as '8.4 s', '4 min 12 s', '1 h 05 min'."""
    number = finite(value)
    if number is None:
        return MISSING
    if number < 59.95:
        return f"{number:.1f}\u00a0s" if number < 10 else f"{number:.0f}\u00a0s"
    whole = round(number)
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60:02d}\u00a0s"
    minutes = round(whole / 60)
    return f"{minutes // 60}\u00a0h {minutes % 60:02d}\u00a0min"


def number_word(value: int) -> str:
    """Small counts in words: 0 'none', 1 'one' … 12 'twelve', then digits."""
    words = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    return words[value] if 0 <= value < len(words) else str(value)
