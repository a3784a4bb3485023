"""Training curves as small multiples: one section a quantity, one panel a trained stage, one line a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from equipoise.study._report import numbers, svg
from equipoise.study._report.read import Arm, Stage, StudyFiles
from equipoise.study._report.svg import Figure, Scale

Points = list[tuple[float, float]]
_MOST = 160
_SECTIONS = (("Loss", "loss", False), ("Preference accuracy", "rewards/accuracies", True), ("Reward margin, nats", "rewards/margins", True))
"""Title, meter, and whether all panels share one scale (losses of different objectives are not comparable)."""


@dataclass(frozen=True)
class Trained:
    """One trained stage of the study: what was trained before it, the arm it is coloured as, its folders by seed."""

    chain: str
    arm: Arm
    stages: list[Stage]


def trained_stages(files: StudyFiles) -> list[Trained]:
    """The stages that wrote a training log, shared ones once. A chain such as 'sft → dpo' names what came before."""
    found: dict[str, Trained] = {}
    seen: set[str] = set()
    lengths: dict[str, int] = {}
    for arm in files.arms:
        for run in arm.runs:
            trains = [entry for entry in arm.stages(run) if (stage := files.stage(entry)) and stage.log]
            for number, entry in enumerate(trains):
                chain = " → ".join(str(item.get("name") or item.get("kind") or "train") for item in trains[: number + 1])
                stage = files.stage(entry)
                assert stage is not None
                rest = len(trains) - number - 1
                if chain not in found or rest < lengths[chain]:
                    found[chain] = Trained(chain, arm, found[chain].stages if chain in found else [])
                    lengths[chain] = rest
                if stage.folder not in seen:
                    seen.add(stage.folder)
                    found[chain].stages.append(stage)
    return [trained for trained in found.values() if trained.stages]


def training_curves(files: StudyFiles, width: float) -> Figure | None:
    """All panels the logs allow, or None where nothing was logged."""
    trained = trained_stages(files)
    words = "One panel for each trained stage; thin lines while training, strong lines on the development set, one line a seed."
    figure = Figure("training_curves", width, 0, "Training curves", words)
    columns = 4 if width > 500 else 2
    wide, tall, top = (width - 18 * (columns - 1)) / columns, 164.0 if width > 500 else 142.0, 0.0
    for title, meter, shared in _SECTIONS:
        panels = [
            (item, stream, _series(item, stream, meter), _series(item, f"eval_{stream}", meter))
            for item in trained
            for stream in _streams(item, meter)
        ]
        if not panels:
            continue
        figure.add(svg.text(2, top + 16, title, "panel"))
        top += 30
        extent = _extent([line for _, _, train, dev in panels for line in (*train, *dev)]) if shared else None
        for number, (item, stream, train, dev) in enumerate(panels):
            left = (number % columns) * (wide + 18)
            at = top + (number // columns) * tall
            words = f"{item.chain}, {stream.rstrip('/')}" if stream else item.chain
            _panel(figure, item, words, (train, dev), extent or _extent([*train, *dev]), (left, at, left + wide, at + tall))
        top += -(-len(panels) // columns) * tall + 8
    figure.height = top
    return figure if top else None


def _streams(trained: Trained, meter: str) -> list[str]:
    """Under which prefixes a meter was logged: '' alone, or one such as 'harmless/' for each stream of a stage with several."""
    keys = {
        key.removeprefix("eval_")
        for stage in trained.stages
        for row in stage.log or []
        for key in row
        if numbers.finite(row[key]) is not None
    }
    return sorted(key.removesuffix(meter) for key in keys if key == meter or key.endswith(f"/{meter}"))


def _series(trained: Trained, prefix: str, meter: str) -> list[Points]:
    """One line a seed: (step, value) wherever the meter was logged under this prefix."""
    lines = []
    for stage in trained.stages:
        pairs = [(numbers.finite(row.get("step")), numbers.finite(row.get(prefix + meter))) for row in stage.log or []]
        lines.append(svg.bucketed([(at, value) for at, value in pairs if at is not None and value is not None], _MOST))
    return [line for line in lines if line]


def _extent(lines: Sequence[Points]) -> tuple[float, float]:
    return svg.padded([value for line in lines for _, value in line], 0.1)


def _panel(
    figure: Figure, item: Trained, words: str, lines: tuple[list[Points], list[Points]], extent: tuple[float, float], at: svg.Box
) -> None:
    """One panel: thin lines while training, strong ones ending in a marker on dev; strong ones throughout where there is no dev."""
    left, top, right, bottom = at
    train, dev = lines
    steps = [step for line in (*train, *dev) for step, _ in line]
    x = Scale(min(0.0, *steps), max(*steps, 1.0), left + 36, right - 6)
    y = Scale(*extent, bottom - 30, top + 14)
    figure.add(svg.text(left + 2, top + 4, svg.shorten(words, int((right - left) / 7.2)), f"label {item.arm.colour}"))
    svg.axes(figure, x, y, (3, 4))
    faint = " thin" if dev else ""
    for line in train:
        figure.add(svg.path([(x(step), y(value)) for step, value in line], f"line{faint} {item.arm.colour}"))
    for line in dev:
        figure.add(svg.path([(x(step), y(value)) for step, value in line], f"line {item.arm.colour}"))
        step, value = line[-1]
        note = f"{words}, step {step:.0f}: {numbers.plain(value)}"
        figure.add(svg.marker(item.arm.slot, x(step), y(value), 3.5, item.arm.colour, note))
