"""Colours of page and figures, once: light and dark of each, and the style rules figures share.

The series colours are Okabe and Ito's colour-blind-safe palette (Color Universal Design, 2008), darkened for white paper
and lightened for a dark one so that every line stands out at 3:1 or better; text colours keep 4.5:1. Colour is never
the only channel: every series also has its own marker.
"""

from __future__ import annotations

import re

TOKENS: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#15171a"),
    "raised": ("#f6f6f3", "#1e2125"),
    "ink": ("#1c1d1f", "#e8e6e1"),
    "soft": ("#5a5e64", "#a5a8ad"),
    "rule": ("#dfded9", "#33373d"),
    "faint": ("#ecebe6", "#282c31"),
    "accent": ("#0b5394", "#7ab8ee"),
    "mark": ("#ffe69a", "#6b5500"),
    "real": ("#0b5394", "#7ab8ee"),
    "equivalent": ("#00695a", "#4fc7ae"),
    "undecided": ("#8a5a00", "#e0ae55"),
    "alarm": ("#a82a1c", "#ff9a8a"),
    "alarm-paper": ("#fdf0ed", "#33201d"),
    "caution-paper": ("#fbf5e6", "#2c2718"),
    "null": ("#70747a", "#8d9197"),
    "credit1": ("#dcebf9", "#1d3145"),
    "credit2": ("#b5d7f3", "#1c4362"),
    "credit3": ("#86bdea", "#1d5580"),
    "credit4": ("#59a3de", "#1f689f"),
    "blame1": ("#fce7d6", "#3b2a1c"),
    "blame2": ("#facba6", "#58361d"),
    "blame3": ("#f5aa75", "#75431c"),
    "blame4": ("#ee8745", "#94501c"),
    "blame": ("#a63c00", "#ffb27d"),
    "s0": ("#5b6068", "#b4b8be"),
    "s1": ("#0072b2", "#5cb3ea"),
    "s2": ("#c8500a", "#ff9457"),
    "s3": ("#007e5d", "#35c79d"),
    "s4": ("#a3478a", "#e59ccb"),
    "s5": ("#996c00", "#efbf4f"),
    "s6": ("#3f51b5", "#9fa8f5"),
    "s7": ("#7a4a1f", "#cfa27a"),
}
MARKERS = ("circle", "square", "triangle", "diamond", "wedge", "pentagon", "plus", "cross")
SANS = '-apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif'

_FIGURE_RULES = (
    ".fig text{font-family:" + SANS + ";font-size:12px;fill:var(--ink)}"
    ".fig .tick{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}"
    ".fig .axis-title{fill:var(--soft);font-size:12px}"
    ".fig .corner{fill:var(--soft);font-size:11px;font-style:italic}"
    ".fig .panel{font-weight:600}"
    ".fig .grid{stroke:var(--faint);stroke-width:1}"
    ".fig .axis{stroke:var(--rule);stroke-width:1}"
    ".fig .zero{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3}"
    ".fig .label{font-weight:600}"
    ".fig .halo{stroke:var(--paper);stroke-width:4px;stroke-linejoin:round;paint-order:stroke}"
    ".fig .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}"
    ".fig .thin{stroke-width:1;opacity:.5}"
    ".fig .whisker{fill:none;stroke-width:1.75}"
    ".fig .seed{opacity:.4}"
    ".fig .leader{stroke:var(--rule);stroke-width:1}"
    ".fig .margin{fill:var(--faint)}"
    ".fig .dashed{stroke-dasharray:4 3}"
)


def _series_rules() -> str:
    names = [name for name in TOKENS if re.fullmatch(r"s\d|null|real|equivalent|undecided", name)]
    rules = [
        f".fig .{name}{{stroke:var(--{name});fill:var(--{name})}}.fig text.{name}{{stroke:none}}"
        f".fig .line.{name},.fig .whisker.{name}{{fill:none}}"
        for name in names
    ]
    return "".join(rules) + ".fig .hollow{fill:var(--paper)}.fig text.halo{stroke:var(--paper)}"


def figure_rules() -> str:
    """Style rules of everything inside `.fig`, in terms of the page's colour variables."""
    return _FIGURE_RULES + _series_rules()


def page_tokens() -> str:
    """The colour variables of the page: light, dark by the system's wish, and either by the reader's."""

    def block(index: int) -> str:
        return "".join(f"--{name}:{pair[index]};" for name, pair in TOKENS.items())

    light, dark = f"color-scheme:light;{block(0)}", f"color-scheme:dark;{block(1)}"
    return (
        f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        f':root[data-theme="light"]{{{light}}}\n:root[data-theme="dark"]{{{dark}}}\n@media print{{:root,:root[data-theme]{{{light}}}}}'
    )


def standalone_rules() -> str:
    """The figure's rules with the colours written out, so that viewers without CSS variables show them too."""

    def written(index: int) -> str:
        return re.sub(
            r"var\(--([a-z0-9-]+)\)", lambda match: TOKENS[match.group(1)][index], figure_rules() + ".backdrop{fill:var(--paper)}"
        )

    return f"{written(0)}@media (prefers-color-scheme:dark){{{written(1)}}}"
