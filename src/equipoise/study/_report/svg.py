"""Drawing: scales, ticks, axes, markers, legends and label placement, written as plain SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from xml.sax.saxutils import escape

from equipoise.study._report import theme

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in SVG units."""


@dataclass(frozen=True)
class Scale:
    """Maps data from `low`…`high` onto pixels `start`…`end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def holds(self, value: float) -> bool:
        """Whether a value lies on the scale."""
        return self.low <= value <= self.high


@dataclass
class Figure:
    """A drawing under way: its size, its parts, and what it says to people who cannot see it."""

    name: str
    width: float
    height: float
    title: str
    description: str
    parts: list[str] = field(default_factory=list)

    def add(self, *parts: str) -> None:
        """Append SVG elements."""
        self.parts += parts

    def inline(self, suffix: str = "") -> str:
        """The SVG element for a page that has the figure rules and colours."""
        key = f"{self.name}{suffix}"
        title, description = f'<title id="{key}-t">{escape(self.title)}</title>', f'<desc id="{key}-d">{escape(self.description)}</desc>'
        return (
            f'<svg class="fig" viewBox="0 0 {px(self.width)} {px(self.height)}" role="img" aria-labelledby="{key}-t {key}-d">'
            f"{title}{description}{''.join(self.parts)}</svg>"
        )

    def standalone(self) -> str:
        """A whole SVG file with its own colours (light and dark) and backdrop."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="fig" width="{px(self.width)}" height="{px(self.height)}"'
            f' viewBox="0 0 {px(self.width)} {px(self.height)}" role="img">'
            f"<title>{escape(self.title)}</title><desc>{escape(self.description)}</desc><style>{theme.standalone_rules()}</style>"
            f'<rect class="backdrop" width="100%" height="100%"/>{"".join(self.parts)}</svg>\n'
        )


def px(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if not float(value).is_integer() else str(int(value))


def text(x: float, y: float, words: str, css: str = "", anchor: str = "start", rotate: bool = False) -> str:
    """One line of text; `rotate` turns it to read upwards."""
    turn = f' transform="rotate(-90 {px(x)} {px(y)})"' if rotate else ""
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{px(x)}" y="{px(y)}" class="{css}"{side}{turn}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """A straight line."""
    return f'<line x1="{px(x1)}" y1="{px(y1)}" x2="{px(x2)}" y2="{px(y2)}" class="{css}"/>'


def path(points: Sequence[tuple[float, float] | None], css: str) -> str:
    """A line through points; None breaks it."""
    words, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        words.append(f"{pen}{px(point[0])} {px(point[1])}")
        pen = "L"
    return f'<path d="{" ".join(words)}" class="{css}"/>' if words else ""


_OUTLINES: dict[str, Sequence[tuple[float, float]]] = {
    "square": ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    "triangle": ((0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
    "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    "pentagon": ((0, -1.15), (1.1, -0.35), (0.68, 0.95), (-0.68, 0.95), (-1.1, -0.35)),
    "wedge": ((0, 1.15), (1.1, -0.85), (-1.1, -0.85)),
    "plus": tuple((x, y) for x, y in ((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4)))
    + tuple((-x, -y) for x, y in ((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4))),
    "cross": tuple(
        ((x - y) * 0.71, (x + y) * 0.71) for x, y in ((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4))
    )
    + tuple(((y - x) * 0.71, (-x - y) * 0.71) for x, y in ((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4))),
}


def marker(slot: int, x: float, y: float, radius: float, css: str, note: str = "") -> str:
    """The marker of a series: the same shape wherever its arm appears. `note` shows under the pointer."""
    inside = f"<title>{escape(note)}</title>" if note else ""
    # Shifted by one for every round of the palette, so that the ninth arm has the first one's colour but not its marker.
    shape = theme.MARKERS[(slot + slot // len(theme.MARKERS)) % len(theme.MARKERS)]
    if shape == "circle":
        return f'<circle cx="{px(x)}" cy="{px(y)}" r="{px(radius)}" class="{css}">{inside}</circle>'
    corners = " ".join(f"{px(x + dx * radius)},{px(y + dy * radius)}" for dx, dy in _OUTLINES[shape])
    return f'<polygon points="{corners}" class="{css}">{inside}</polygon>'


def text_width(words: str, size: float = 12, bold: bool = False) -> float:
    """Roughly how wide a line of text is, on the generous side."""
    wide = sum(1.0 if ord(letter) > 0x2E80 else 0.32 if letter in "ijl.,:;|!'()[] " else 0.62 for letter in words)
    return wide * size * (1.06 if bold else 1.0)


def shorten(words: str, size: int) -> str:
    """At most `size` letters, the last one an ellipsis where some were cut."""
    return words if len(words) <= size else words[: size - 1] + "…"


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round values between two ends, about so many."""
    raw = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) + 0.0 for index in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Labels for round values, all with the same decimals and true minus signs."""
    places = next((places for places in range(7) if all(abs(value - round(value, places)) < 1e-9 for value in values)), 6)
    return [f"{abs(value):,.{places}f}" if value >= 0 else f"−{abs(value):,.{places}f}" for value in values]


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """Ends of a scale holding all values with room to spare; a single value gets a scale around itself."""
    low, high = min(values), max(values)
    room = (high - low) * share or max(abs(high) * 0.1, 0.5)
    return low - room, high + room


def axes(figure: Figure, x: Scale, y: Scale, counts: tuple[int, int] = (6, 5), label_x: bool = True) -> None:
    """Grid lines, tick labels and the two axis lines of one panel."""
    x_values, y_values = ticks(x.low, x.high, counts[0]), ticks(y.low, y.high, counts[1])
    for value, label in zip(y_values, tick_labels(y_values), strict=True):
        figure.add(line(x.start, y(value), x.end, y(value), "grid"), text(x.start - 7, y(value) + 4, label, "tick", "end"))
    for value, label in zip(x_values, tick_labels(x_values), strict=True):
        figure.add(line(x(value), y.start, x(value), y.start + 4, "axis"))
        if label_x:
            figure.add(text(x(value), y.start + 17, label, "tick", "middle"))
    figure.add(line(x.start, y.start, x.end, y.start, "axis"))


def legend(figure: Figure, entries: Sequence[tuple[int, str, str]], left: float, top: float, right: float) -> float:
    """Markers with names, flowing over lines. Entries are (slot, css, words). Returns the y below it."""
    x, y = left, top
    for slot, css, words in entries:
        wide = 18 + text_width(words) + 14
        if x > left and x + wide > right:
            x, y = left, y + 20
        figure.add(marker(slot, x + 6, y - 4, 4.5, css), text(x + 16, y, words))
        x += wide
    return y + 18


def place(words: str, x: float, y: float, taken: Sequence[Box], frame: Box, bold: bool = True) -> tuple[float, float, Box, bool]:
    """A place for a label near a point, overlapping as little as possible. Returns x, baseline, its box, and whether it is far."""
    width, height = text_width(words, 12, bold), 14.0
    best: tuple[float, float, float, Box, bool] | None = None
    for ring, radius in enumerate((9.0, 18.0, 32.0, 50.0)):
        for turn, angle in enumerate((-30, 30, -150, 150, -90, 90, 0, 180)):
            dx, dy = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
            left = x + dx - (width if dx < -1 else width / 2 if abs(dx) <= 1 else 0)
            box = (left, y + dy - height / 2, left + width, y + dy + height / 2)
            outside = max(0, frame[0] - box[0]) + max(0, box[2] - frame[2]) + max(0, frame[1] - box[1]) + max(0, box[3] - frame[3])
            cost = sum(_overlap(box, other) for other in taken) + outside * 40 + ring * 45 + turn * 0.5
            if best is None or cost < best[0]:
                best = (cost, box[0], box[3] - 3, box, ring > 1)
    assert best is not None
    return best[1:]


def bucketed(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points: means over equal runs of neighbours."""
    if len(points) <= most:
        return list(points)
    ends = [index * len(points) // most for index in range(most + 1)]
    groups = [points[first:last] for first, last in pairwise(ends)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _overlap(one: Box, other: Box) -> float:
    """The area two boxes share."""
    return max(0.0, min(one[2], other[2]) - max(one[0], other[0])) * max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
