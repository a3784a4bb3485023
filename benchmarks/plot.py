"""Draw the committed results: ratios to TRL and loss curves, as SVG beside `docs/results/performance.md`.

    python benchmarks/plot.py docs/results/performance

Reads every `vs_trl*.json` and `ablation.json` of the folder; draws what is there. Needs matplotlib (`pip install 'equipoise[plots]'`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

SIDES = {"ours": "equipoise", "tuned": "TRL tuned", "default": "TRL as it comes"}
COLOURS = {"ours": "#1b6ca8", "tuned": "#d1813b", "default": "#8a8a8a"}


def main() -> None:
    """Draw into the folder that holds the results."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/results/performance")
    plt.rcParams.update({"svg.hashsalt": "equipoise", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("vs_trl*.json"))}
    if results:
        save(rates(results), folder / "rates.svg")
    for name, result in results.items():
        if len(result["sides"]["ours"]["losses"][0]) < 2:
            continue  # one step is no curve
        save(losses(result), folder / f"{name}-losses.svg")
    ablation = folder / "ablation.json"
    if ablation.is_file():
        save(parts(json.loads(ablation.read_text())), folder / "ablation.svg")


def rates(results: dict[str, Any]) -> Any:
    """Unique tokens a second and peak memory of every side, one group a benchmark; whiskers span the blocks."""
    figure, axes = plt.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
    for axis, what, label in ((axes[0], "unique_tokens_per_second", "unique tokens/s"), (axes[1], "peak_rss_mb", "peak memory, MiB")):
        for number, (side, title) in enumerate(SIDES.items()):
            found = [(place, result["sides"][side][what]) for place, result in enumerate(results.values()) if side in result["sides"]]
            places = [place + 0.27 * (number - 1) for place, _ in found]
            middles = [value["median"] for _, value in found]
            spread = [[value["median"] - value["low"] for _, value in found], [value["high"] - value["median"] for _, value in found]]
            axis.bar(places, middles, 0.25, yerr=spread, capsize=2, color=COLOURS[side], label=title)
        axis.set_ylabel(label)
    axes[0].legend(frameon=False)
    axes[1].set_xticks(range(len(results)), [title_of(result) for result in results.values()])
    return figure


def losses(result: dict[str, Any]) -> Any:
    """The loss of every step of the first block, all sides on top of one another where they agree."""
    figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
    for width, (side, title) in zip((4, 2.5, 1), reversed(SIDES.items()), strict=True):
        if side in result["sides"]:
            curve = result["sides"][side]["losses"][0]
            axis.plot(range(1, len(curve) + 1), curve, linewidth=width, marker="o", markersize=width + 1, color=COLOURS[side], label=title)
    axis.set(xlabel="optimizer step", ylabel="loss", title=title_of(result))
    axis.legend(frameon=False)
    return figure


def parts(result: dict[str, Any]) -> Any:
    """How many times as long, and as much memory, a step takes with a part left out."""
    rows = list(result["variants"].items())
    figure, axis = plt.subplots(figsize=(7, 0.45 * len(rows) + 1), layout="constrained")
    for shift, what, label, colour in ((0.2, "times_as_long", "time", "#1b6ca8"), (-0.2, "times_the_memory", "peak memory", "#d1813b")):
        bars = axis.barh([-place + shift for place in range(len(rows))], [row[what] for _, row in rows], 0.36, label=label, color=colour)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks([-place for place in range(len(rows))], [name for name, _ in rows])
    axis.set_xlabel("times what the whole engine takes")
    axis.legend(frameon=False)
    return figure


def title_of(result: dict[str, Any]) -> str:
    """What was compared, in a few words."""
    settings = result["settings"]
    return f"{settings['objective'].upper()}{', LoRA' if settings['lora'] else ''}\n{settings['data']}, {settings['dtype']}"


def save(figure: Any, path: Path) -> None:
    """One SVG, the same bytes for the same figures."""
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


if __name__ == "__main__":
    main()
