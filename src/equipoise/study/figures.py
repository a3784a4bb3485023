"""The figures of a report, drawn by hand as SVG from the files of a study.

Each figure is drawn at two widths, so that its text keeps its size on a phone: `WIDE` for a page (`HALF` for figures that
stand two in a row), `NARROW` for a hand.
Inside the page they take their colours from it; as files they carry their own, light and dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from equipoise.study._report import curves, numbers, svg
from equipoise.study._report.read import Arm, StudyFiles, listing, mapping
from equipoise.study._report.svg import Box, Figure, Scale
from equipoise.study._report.words import spoken_unit

WIDE, HALF, NARROW = 860.0, 500.0, 350.0
HELPFUL, HARMLESS = ("reward_helpful", "hpr"), ("reward_harmful", "hmr")
OVER_REFUSAL, UNSAFE = ("over_refusal",), ("unsafe_compliance",)


def figures(files: StudyFiles, width: float) -> dict[str, Figure]:
    """Every figure the files allow, by name, in the order of the report."""
    drawn = {
        "helpful_vs_harmless": _scatter(files, "helpful_vs_harmless", HELPFUL, HARMLESS, min(width, HALF)),
        "refusal_vs_compliance": _scatter(files, "refusal_vs_compliance", OVER_REFUSAL, UNSAFE, min(width, HALF)),
        "threshold_sweep": _sweep(files, width),
        "training_curves": curves.training_curves(files, width),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def first_present(files: StudyFiles, candidates: Iterable[str]) -> str | None:
    """The first of these metrics that the evaluation holds and that is not withheld."""
    hidden = {name for name, metric in files.metrics.items() if files.withheld and metric.get("role") == "headline"}
    return next((name for name in candidates if name in files.metrics and name not in hidden), None)


def outside(files: StudyFiles, x_metric: str, y_metric: str) -> list[Arm]:
    """Null policies so far from the arms that showing them would press the arms together."""
    arms = [arm for arm in files.arms if arm.kind != "null" and _point(files, arm, x_metric, y_metric)]
    far = []
    for arm in files.arms if arms else ():
        point = _point(files, arm, x_metric, y_metric)
        if arm.kind == "null" and point:
            for metric, value in zip((x_metric, y_metric), point, strict=True):
                low, high = _extent(files, arms, metric)
                if not low - 0.6 * (high - low) <= value <= high + 0.6 * (high - low) and arm not in far:
                    far.append(arm)
    return far


def _point(files: StudyFiles, arm: Arm, x_metric: str, y_metric: str) -> tuple[float, float] | None:
    x, y = (numbers.finite(files.estimate(arm.name, metric).get("value")) for metric in (x_metric, y_metric))
    return None if x is None or y is None else (x, y)


def _ends(files: StudyFiles, arm: Arm, metric: str) -> tuple[float, float] | None:
    low, high = (numbers.finite(files.estimate(arm.name, metric).get(end)) for end in ("low", "high"))
    return None if low is None or high is None else (low, high)


def _extent(files: StudyFiles, arms: Sequence[Arm], metric: str) -> tuple[float, float]:
    values = [numbers.finite(files.estimate(arm.name, metric).get(end)) for arm in arms for end in ("value", "low", "high")]
    known = [value for value in values if value is not None]
    return min(known), max(known)


def _axis_title(metric: Mapping[str, Any], name: str) -> str:
    """'Over-refusal, % (lower is better)'."""
    title, better = str(metric.get("title") or name), metric.get("better")
    unit = spoken_unit(str(metric.get("unit") or ""), title)
    return f"{title}{', ' + unit if unit else ''}{f' ({better} is better)' if better in ('higher', 'lower') else ''}"


def _bounds(files: StudyFiles, shown: Sequence[Arm], metric: str) -> tuple[float, float]:
    """Ends of an axis; shares never run below 0 or above 100 by more than a marker's width."""
    low, high = svg.padded(_extent(files, shown, metric))
    if files.metrics[metric].get("unit") == "%":
        low, high = max(low, -4.0), min(high, 104.0)
    return low, high


def _scatter(files: StudyFiles, name: str, x_names: Iterable[str], y_names: Iterable[str], width: float) -> Figure | None:
    """One metric against another: a marker for each arm, whiskers on both axes, faint dots for single seeds."""
    x_metric, y_metric = first_present(files, x_names), first_present(files, y_names)
    if x_metric is None or y_metric is None:
        return None
    far = outside(files, x_metric, y_metric)
    shown = [arm for arm in files.arms if arm not in far and _point(files, arm, x_metric, y_metric)]
    if not shown:
        return None
    x_title, y_title = (_axis_title(files.metrics[metric], metric) for metric in (x_metric, y_metric))
    figure = Figure(
        name, width, 430 if width > NARROW else 390, f"{y_title} against {x_title}", _describe(files, shown, x_metric, y_metric)
    )
    x = Scale(*_bounds(files, shown, x_metric), 50, width - 14)
    y = Scale(*_bounds(files, shown, y_metric), figure.height - 46, 34)
    letters = int(width / 6.3)
    figure.add(svg.text(2, 14, svg.shorten(f"↑ {y_title}", letters), "axis-title"))
    figure.add(svg.text(x.end, figure.height - 8, svg.shorten(f"{x_title} →", letters), "axis-title", "end"))
    svg.axes(figure, x, y, (5, 6))
    taken = _marks(files, figure, shown, (x_metric, y_metric), x, y)
    _labels(files, figure, shown, (x_metric, y_metric), x, y, taken)
    return figure


def _marks(files: StudyFiles, figure: Figure, shown: Sequence[Arm], metrics: tuple[str, str], x: Scale, y: Scale) -> list[Box]:
    """Whiskers, seeds and markers, the null policies beneath. Returns the places they take."""
    taken: list[Box] = []
    markers = []
    for arm in sorted(shown, key=lambda arm: arm.kind != "null"):
        point = _point(files, arm, *metrics)
        assert point is not None
        at_x, at_y = x(point[0]), y(point[1])
        across, up = (_ends(files, arm, metric) for metric in metrics)
        faint = " thin" if arm.kind == "null" else ""
        if across:
            figure.add(svg.line(x(across[0]), at_y, x(across[1]), at_y, f"whisker {arm.colour}{faint}"))
            taken.append((x(across[0]), at_y - 1.5, x(across[1]), at_y + 1.5))
        if up:
            figure.add(svg.line(at_x, y(up[0]), at_x, y(up[1]), f"whisker {arm.colour}{faint}"))
            taken.append((at_x - 1.5, y(up[1]), at_x + 1.5, y(up[0])))
        seeds = zip(*(listing(files.estimate(arm.name, metric).get("per_seed")) for metric in metrics), strict=False)
        dots = [(a, b) for a, b in seeds if numbers.finite(a) is not None and numbers.finite(b) is not None and x.holds(a) and y.holds(b)]
        if len(dots) > 1:
            figure.add(*(svg.marker(0, x(a), y(b), 2.5, f"{arm.colour} seed") for a, b in dots))
        words = "; ".join(_reading(files, arm, metric) for metric in metrics)
        hollow = " hollow" if arm.kind == "null" else ""
        markers.append(svg.marker(arm.slot, at_x, at_y, 5 if hollow else 6, arm.colour + hollow, f"{arm.name}: {words}"))
        taken.append((at_x - 7, at_y - 7, at_x + 7, at_y + 7))
    figure.add(*markers)
    return taken


def _labels(
    files: StudyFiles, figure: Figure, shown: Sequence[Arm], metrics: tuple[str, str], x: Scale, y: Scale, taken: list[Box]
) -> None:
    """Names beside the markers, arms first, moved out of each other's way."""
    frame = (x.start, y.end, x.end, y.start)
    weights = {True: 1.0, False: 12.0}
    for arm in shown:
        point = _point(files, arm, *metrics)
        assert point is not None
        at_x, at_y = x(point[0]), y(point[1])
        is_null = arm.kind == "null"
        words = svg.shorten(arm.name, 22)
        left, base, box, far = svg.place(words, at_x, at_y, taken, frame, bold=not is_null)
        if far:
            figure.add(svg.line(at_x, at_y, min(max(at_x, box[0]), box[2]), (box[1] + box[3]) / 2, "leader"))
        figure.add(svg.text(left, base, words, f"halo {arm.colour}" if is_null else f"label halo {arm.colour}"))
        taken += [box] * int(weights[is_null])


def _reading(files: StudyFiles, arm: Arm, metric: str) -> str:
    estimate, description = files.estimate(arm.name, metric), files.metrics[metric]
    unit = str(description.get("unit") or "")
    between = numbers.interval(estimate.get("low"), estimate.get("high"), unit)
    return f"{description.get('title') or metric} {numbers.with_unit(estimate.get('value'), unit)}{f' ({between})' if between else ''}"


def _describe(files: StudyFiles, shown: Sequence[Arm], *metrics: str) -> str:
    return " ".join(f"{arm.name}: {'; '.join(_reading(files, arm, metric) for metric in metrics)}." for arm in shown)


def _sweep(files: StudyFiles, width: float) -> Figure | None:
    """Share of replies passing, over thresholds: one panel a metric, side by side or stacked."""
    sweep = {name: [mapping(row) for row in listing(rows)] for name, rows in mapping(files.evaluation.get("sweep")).items()}
    sweep = {name: [row for row in rows if numbers.finite(row.get("threshold")) is not None] for name, rows in sweep.items()}
    panels = [(name, rows) for name, rows in sweep.items() if len({row["threshold"] for row in rows}) > 1]
    arms = [arm for arm in files.arms if any(arm.name in mapping(row.get("values")) for _, rows in panels for row in rows)]
    if not panels or not arms:
        return None
    columns = 2 if width > NARROW and len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    words = "How the share of replies that pass changes with the threshold on the judge's reward."
    figure = Figure("threshold_sweep", width, 0, "Threshold sweep", words)
    entries = [(arm.slot, arm.colour + (" hollow" if arm.kind == "null" else ""), svg.shorten(arm.name, 24)) for arm in arms]
    top = svg.legend(figure, entries, 2, 14, width - 4) + 14
    tall, wide = 300.0 if width > NARROW else 220.0, (width - 28 * (columns - 1)) / columns
    for number, (name, points) in enumerate(panels):
        left = (number % columns) * (wide + 28)
        _sweep_panel(files, figure, name, points, arms, (left, top + (number // columns) * tall, left + wide, 0))
    figure.height = top + rows * tall
    for number in range(len(panels)):
        left = (number % columns) * (wide + 28)
        below = top + (number // columns + 1) * tall - 10
        figure.add(svg.text(left + wide - 4, below, "threshold on the reward →", "axis-title", "end"))
    return figure


def _sweep_panel(files: StudyFiles, figure: Figure, name: str, points: Sequence[Mapping[str, Any]], arms: Sequence[Arm], at: Box) -> None:
    """One metric's lines, null policies thin and dashed underneath, a marker here and there on each."""
    metric = files.metrics.get(name, {})
    left, top, right, _ = at
    tall = 300.0 if figure.width > NARROW else 220.0
    thresholds = sorted({float(point["threshold"]) for point in points})
    x = Scale(thresholds[0], thresholds[-1], left + 34, right - 8)
    y = Scale(0, 100, top + tall - 48, top + 18)
    figure.add(svg.text(left + 2, top + 2, f"{metric.get('title') or name}, {metric.get('unit') or '%'}", "panel"))
    svg.axes(figure, x, y, (5, 4))
    used = numbers.finite(metric.get("threshold"))
    if used is not None and x.holds(used):
        figure.add(svg.line(x(used), y.start, x(used), y.end, "zero"))
    by_threshold = {
        at: [mapping(point.get("values")) for point in group] for at, group in groupby(points, lambda point: float(point["threshold"]))
    }
    for arm in sorted(arms, key=lambda arm: arm.kind != "null"):
        values = [(value, numbers.finite(by_threshold[value][0].get(arm.name))) for value in thresholds]
        line = [None if share is None else (x(value), y(min(max(share, 0), 100))) for value, share in values]
        is_null = arm.kind == "null"
        figure.add(svg.path(line, f"line {arm.colour}{' thin dashed' if is_null else ''}"))
        every = max(len(line) // 4, 1)
        marked = [point for index, point in enumerate(line) if point and index % every == (arm.slot * every // max(len(arms), 1)) % every]
        figure.add(*(svg.marker(arm.slot, *point, 3.5, arm.colour + (" hollow" if is_null else "")) for point in marked))


def interval_glyph(comparison: Mapping[str, Any], reach: float) -> str:
    """A contrast's difference as a dot with its interval, zero marked and the margin of equivalence shaded.

    `reach` is the largest magnitude on the scale, shared by all contrasts of a metric.
    """
    wide, tall = 150.0, 22.0
    difference, low, high = (numbers.finite(comparison.get(key)) for key in ("difference", "low", "high"))
    if difference is None:
        return ""
    x = Scale(-reach * 1.06, reach * 1.06, 2, wide - 2)
    parts = []
    margin = numbers.finite(comparison.get("margin"))
    if margin:
        left, right = x(max(-margin, x.low)), x(min(margin, x.high))
        parts.append(f'<rect x="{svg.px(left)}" y="2" width="{svg.px(right - left)}" height="18" class="margin"/>')
    parts.append(svg.line(x(0), 0, x(0), tall, "zero"))
    colour = str(comparison.get("verdict")) if comparison.get("verdict") in ("real", "equivalent", "undecided") else "null"
    if low is not None and high is not None:
        parts.append(svg.line(x(low), tall / 2, x(high), tall / 2, f"whisker {colour}"))
    parts.append(svg.marker(0, x(difference), tall / 2, 4.5, colour + ("" if colour == "real" else " hollow")))
    return f'<svg class="fig glyph" viewBox="0 0 150 22" aria-hidden="true">{"".join(parts)}</svg>'
