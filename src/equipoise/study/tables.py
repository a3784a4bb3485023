"""The tables of a report as data, written from the files of a study; HTML and Markdown show the same cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from equipoise.study._report import numbers
from equipoise.study._report.numbers import MISSING
from equipoise.study._report.read import Arm, Stage, StudyFiles, flatten, listing, mapping
from equipoise.study._report.words import spoken_unit, tested
from equipoise.study.figures import interval_glyph

VERDICTS = ("real", "equivalent", "undecided")
RowKind = Literal["arm", "null", "failed", "primary", "exploratory", "plain"]


@dataclass(frozen=True)
class Cell:
    """What one cell says: the figure, smaller words under it, the exact value, a badge's kind, a drawing (safe SVG)."""

    text: str
    detail: tuple[str, ...] = ()
    value: float | None = None
    badge: str = ""
    drawing: str = ""


@dataclass(frozen=True)
class Column:
    """A column's heading: title, a smaller line, why it is flagged (empty: it is not), whether it holds figures."""

    title: str
    note: str = ""
    flag: str = ""
    figures: bool = True


@dataclass(frozen=True)
class Row:
    """A row: what it is about, its cells, its kind (which sets null policies visibly apart), and its arm's marker."""

    head: str
    cells: Sequence[Cell]
    kind: RowKind = "plain"
    detail: str = ""
    arm: Arm | None = None


@dataclass(frozen=True)
class Table:
    """A table with the words around it. `sections` are rows with a heading each; an empty heading is not shown.

    With a `notes_title` the notes fold away under it.
    """

    name: str
    caption: str
    first: str
    columns: Sequence[Column]
    sections: Sequence[tuple[str, Sequence[Row]]]
    notes: Sequence[str] = field(default_factory=tuple)
    notes_title: str = ""

    @property
    def rows(self) -> list[Row]:
        """All rows, whatever their section."""
        return [row for _, rows in self.sections for row in rows]


def metric_table(files: StudyFiles, role: str, caption: str) -> Table | None:
    """Arms by metrics of one role ('headline', 'reproduction', 'diagnostic'), null policies last in a section of their own."""
    metrics = {name: metric for name, metric in files.metrics.items() if metric.get("role") == role}
    if not metrics or (role == "headline" and files.withheld):
        return None
    totals = {name: {item["n"] for arm in files.arms if (item := files.estimate(arm.name, name)).get("n")} for name in metrics}
    columns = [_metric_column(name, metric, totals[name]) for name, metric in metrics.items()]
    groups: dict[str, list[Row]] = {"": [], "Null policies (they do nothing useful; a metric one of them wins is flagged)": []}
    for arm, heading in ((arm, list(groups)[arm.kind == "null"]) for arm in files.arms):
        cells = [_estimate_cell(files.estimate(arm.name, name), metric, len(totals[name]) > 1) for name, metric in metrics.items()]
        if any(cell.value is not None for cell in cells):
            groups[heading].append(Row(arm.name, cells, "null" if arm.kind == "null" else "arm", _seeds(files, arm), arm))
        elif arm.kind != "null":
            why = "failed, not evaluated" if arm.failed else "not evaluated"
            groups[heading].append(Row(arm.name, [Cell(MISSING) for _ in metrics], "failed", why, arm))
    notes = [f"{metric.get('title') or name}. {told}" for name, metric in metrics.items() if (told := _measured(metric))]
    return Table(f"arms-{role}", caption, "Arm", columns, [group for group in groups.items() if group[1]], notes, "How these are measured")


def _measured(metric: Mapping[str, Any]) -> str:
    """What a metric measures, where it comes from and where it departs from that."""
    parts = [str(metric.get(name) or "").strip().rstrip(".") for name in ("measures", "source", "departures")]
    return "".join(f"{part}. " for part in parts if part).strip()


def _metric_column(name: str, metric: Mapping[str, Any], totals: set[Any]) -> Column:
    better = metric.get("better")
    title = str(metric.get("title") or name)
    parts = [spoken_unit(str(metric.get("unit") or ""), title), f"{better}\u00a0is\u00a0better" if better in ("higher", "lower") else ""]
    if len(totals) == 1 and numbers.finite(next(iter(totals))) is not None:
        parts.append(f"n\u00a0=\u00a0{numbers.count(next(iter(totals)))}")
    flag = (str(metric.get("flag_reason") or "") or "flagged by the evaluation") if metric.get("flagged") else ""
    return Column(title, ", ".join(part for part in parts if part), flag)


def _estimate_cell(estimate: Mapping[str, Any], metric: Mapping[str, Any], show_n: bool) -> Cell:
    unit = str(estimate.get("unit") or metric.get("unit") or "")
    detail = [numbers.interval(estimate.get("low"), estimate.get("high"), unit)]
    seeds = [value for value in map(numbers.finite, listing(estimate.get("per_seed"))) if value is not None]
    if len(seeds) > 1:
        detail.append(f"seeds {numbers.plain(min(seeds), unit)} … {numbers.plain(max(seeds), unit)}")
    if show_n and numbers.finite(estimate.get("n")) is not None:
        detail.append(f"n = {numbers.count(estimate['n'])}")
    if numbers.finite(estimate.get("missing")):
        detail.append(f"{numbers.count(estimate['missing'])} missing")
    return Cell(
        numbers.plain(estimate.get("value"), unit), tuple(words for words in detail if words), numbers.finite(estimate.get("value"))
    )


def _seeds(files: StudyFiles, arm: Arm) -> str:
    seeds = listing(mapping(mapping(files.evaluation.get("models")).get(arm.name)).get("seeds"))
    words = f"{len(seeds)} seeds" if len(seeds) > 1 else ""
    lost = len(arm.failed)
    return ", ".join(part for part in (words, f"{lost} failed" if lost else "") if part)


def contrast_table(files: StudyFiles, primary: bool) -> Table | None:
    """The primary or the exploratory comparisons, by metric, each with its difference drawn and written and its verdict as a badge."""
    comparisons = [item for item in shown_comparisons(files) if bool(item.get("primary")) == primary]
    if not comparisons:
        return None
    reaches: dict[str, float] = {}
    for item in comparisons:
        ends = [abs(number) for key in ("difference", "low", "high", "margin") if (number := numbers.finite(item.get(key))) is not None]
        reaches[str(item.get("metric"))] = max([reaches.get(str(item.get("metric")), 0.0), *ends]) or 1.0
    detectable = {mapping(item).get("metric"): mapping(item) for item in listing(files.evaluation.get("detectable"))}
    columns = [
        Column("Verdict", figures=False),
        Column("Difference A − B", f"with its {files.coverage} interval; shaded: the margin", figures=False),
        Column("p", "and its test"),
        Column("p, Holm", "corrected"),
        Column("Margin", "±"),
        Column("Detectable", "at least"),
        Column("P(A\u00a0better)", "than B"),
        Column("n", "prompts"),
        Column("n\u00a0needed", "to decide"),
    ]
    sections: dict[str, list[Row]] = {}
    for item in comparisons:
        metric = files.metrics.get(str(item.get("metric")), {})
        row = _contrast_row(item, metric, detectable.get(item.get("metric"), {}), interval_glyph(item, reaches[str(item.get("metric"))]))
        sections.setdefault(row.detail, []).append(replace(row, detail=""))
    name, caption = ("contrasts", "Primary contrasts") if primary else ("exploratory", "Exploratory contrasts")
    methods = sorted({method for item in comparisons for method in str(item.get("test") or "").split("; ")[1:]})
    notes = [f"Intervals of differences: {'; '.join(methods)}."] if methods else []
    return Table(name, caption, "A against B", columns, list(sections.items()), notes)


def shown_comparisons(files: StudyFiles) -> list[dict[str, Any]]:
    """The comparisons that may be shown: a blocked headline takes its own with it."""
    comparisons = [mapping(item) for item in listing(files.evaluation.get("comparisons"))]
    if not files.withheld:
        return comparisons
    return [item for item in comparisons if files.metrics.get(str(item.get("metric")), {}).get("role") != "headline"]


def _contrast_row(item: Mapping[str, Any], metric: Mapping[str, Any], detectable: Mapping[str, Any], glyph: str) -> Row:
    unit = str(item.get("unit") or metric.get("unit") or "")
    verdict = str(item.get("verdict") or MISSING)
    better = item.get("prob_a_better")
    chance = mapping(better).get("value") if isinstance(better, dict) else better
    between = numbers.interval(item.get("low"), item.get("high"), unit, True)
    needed = item.get("n_needed") if verdict == "undecided" else None
    cells = [
        Cell(verdict if tested(item) else "not tested", badge=verdict if verdict in VERDICTS and tested(item) else "none"),
        Cell(
            numbers.plain(item.get("difference"), unit, True),
            tuple(filter(None, [between if tested(item) else str(item.get("reason") or "")])),
            numbers.finite(item.get("difference")),
            drawing=glyph,
        ),
        Cell(
            numbers.p_value(item.get("p")), tuple(filter(None, str(item.get("test") or "").split("; ")[:1])), numbers.finite(item.get("p"))
        ),
        Cell(numbers.p_value(item.get("p_holm")), value=numbers.finite(item.get("p_holm"))),
        _figure(item.get("margin"), unit),
        _figure(detectable.get("difference"), unit),
        _figure(chance, "", False, numbers.interval(mapping(better).get("low"), mapping(better).get("high"))),
        Cell(numbers.count(item.get("n")), value=numbers.finite(item.get("n"))),
        Cell(numbers.count(needed), value=numbers.finite(needed)),
    ]
    flag = ", flagged" if metric.get("flagged") else ""
    title = str(metric.get("title") or item.get("metric"))
    shown = spoken_unit(unit, title)
    heading = f"{title}{', ' + shown if shown else ''}{flag}"
    return Row(f"{item.get('a')} against {item.get('b')}", cells, "primary" if item.get("primary") else "exploratory", heading)


def _figure(value: Any, unit: str, sign: bool = False, *detail: str) -> Cell:
    return Cell(numbers.plain(value, unit, sign), tuple(words for words in detail if words), numbers.finite(value))


def runs_table(files: StudyFiles) -> Table | None:
    """What was run: each arm's stages, how each seed ended, and what one seed cost on average, everything it used included."""
    arms = [arm for arm in files.arms if arm.runs and (arm.kind != "null" or arm.failed)]
    if not arms:
        return None
    columns = [
        Column("Stages", figures=False),
        Column("Seeds", figures=False),
        Column("Pairs", "trained on"),
        Column("Tokens", "trained on"),
        Column("FLOPs", "training"),
        Column("Training", "time"),
        Column("Reference", "time"),
        Column("Sampling", "time"),
        Column("Tuning", "time"),
        Column("All stages", "time"),
    ]
    rows = []
    for arm in arms:
        costs = [cost(files, arm, run) for run in arm.runs if run.get("status") == "done"]
        trained = [name for run in arm.runs[:1] for name in stage_names(arm, run)]
        cells = [Cell(" → ".join(trained) or "none: used as it is"), Cell(_status(arm))]
        for key in ("pairs", "trained_tokens", "flops"):
            cells.append(_mean_cell(costs, key, numbers.count))
        for key in ("seconds", "reference_seconds", "sampling_seconds", "tuning_seconds", "all_seconds"):
            cells.append(_mean_cell(costs, key, numbers.duration))
        rows.append(Row(arm.name, cells, "failed" if arm.failed else "arm", "failed, see above" if arm.failed else "", arm))
    notes = [
        "Costs are those of one seed, averaged over the seeds that finished. A stage several arms share is counted in each of them, "
        "so the columns do not add up to the study’s own time. Sampling is the time spent writing replies, those for the evaluation "
        f"included. {MISSING}: not recorded, which is not zero."
    ]
    return Table("runs", "Arms, stages and cost", "Arm", columns, [("", rows)], notes)


def stage_names(arm: Arm, run: Mapping[str, Any]) -> list[str]:
    """The names of the training stages of one seed, in order."""
    return [str(stage.get("name") or "train") for stage in arm.stages(run) if stage.get("kind") == "train"]


def cost(files: StudyFiles, arm: Arm, run: Mapping[str, Any]) -> dict[str, float]:
    """What one seed cost: the arm's own account, completed from its stages where it is silent. Missing stays missing."""
    known: dict[str, float] = {}
    entries = arm.stages(run)
    for entry in entries:
        stage = files.stage(entry)
        for key, value in (stage.cost if stage else {}).items():
            if entry.get("kind") == "train" and numbers.finite(value) is not None:
                known[key] = known.get(key, 0.0) + float(value)
        seconds = numbers.finite(entry.get("seconds"))
        if seconds is not None:
            known["all_seconds"] = known.get("all_seconds", 0.0) + seconds
            if entry.get("kind") == "generate":
                known["sampling_seconds"] = known.get("sampling_seconds", 0.0) + seconds
    own = mapping(run.get("cost"))
    return {**known, **{key: number for key, value in own.items() if (number := numbers.finite(value)) is not None}}


def _mean_cell(costs: Sequence[Mapping[str, float]], key: str, words: Callable[[Any], str]) -> Cell:
    values = [cost[key] for cost in costs if key in cost]
    mean = sum(values) / len(values) if values else None
    return Cell(words(mean), value=mean)


def _status(arm: Arm) -> str:
    """'0, 1 done' or '0 done, 1 failed'."""
    groups: dict[str, list[str]] = {}
    for run in arm.runs:
        groups.setdefault(str(run.get("status") or "unknown"), []).append(str(run.get("seed", MISSING)))
    return "; ".join(f"{', '.join(seeds)} {status}" for status, seeds in groups.items())


def accounting_table(files: StudyFiles) -> Table | None:
    """What happened to the data: a row for each account, its reasons beneath; stages that read the same data share a row."""
    found: dict[str, tuple[str, dict[str, Any], list[str]]] = {}
    for stage in files.stages.values():
        for label, account in accounts(stage.accounting):
            users = found.setdefault(repr((label, account)), (label, account, []))[2]
            users += [_short(stage)] if _short(stage) not in users else []
    if not found:
        return _side_by_side(files, "accounting", "Data accounting", lambda stage: stage.accounting)
    names = [
        name for name in dict.fromkeys(name for _, account, _ in found.values() for name in account) if name not in ("dropped", "notes")
    ]
    columns = [Column(name.replace("_", " ").replace("eos", "EOS")) for name in names]
    columns[2:2] = [Column("dropped", "and why", figures=False)]
    columns += [Column("worth knowing", figures=False), Column("read by", figures=False)]
    rows = []
    for label, account, users in found.values():
        cells = [_fact(account.get(name)) for name in names]
        cells[2:2] = [_dropped(mapping(account.get("dropped")))]
        notes = [f"{what}: {_fact(count).text}" for what, count in mapping(account.get("notes")).items()]
        rows.append(Row(label or "rows", [*cells, Cell("; ".join(notes) or MISSING), Cell(", ".join(users))]))
    return Table("accounting", "Data accounting", "Data", columns, [("", rows)])


def accounts(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """The accounts (`data/accounting.py`) inside an `accounting.json`, however nested, labelled by where they stand."""
    if isinstance(value, dict) and {"rows_in", "kept"} <= set(value):
        yield ", ".join(path), value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from accounts(inner, (*path, str(name)))
    elif isinstance(value, list):
        for number, inner in enumerate(value, 1):
            yield from accounts(inner, (*path, "as tokens" if number == len(value) > 1 else "as read"))


def _dropped(reasons: Mapping[str, Any]) -> Cell:
    """How many rows were dropped in all, and each reason with its count and first ids beneath."""
    counts = {
        why: numbers.finite(mapping(entry).get("count") if isinstance(entry, dict) else entry) or 0.0 for why, entry in reasons.items()
    }
    examples = {why: ", ".join(str(row) for row in listing(mapping(entry).get("rows"))[:3]) for why, entry in reasons.items()}
    detail = [f"{numbers.count(count)} {why}{f' ({examples[why]})' if examples[why] else ''}" for why, count in counts.items()]
    return Cell(numbers.count(sum(counts.values())), tuple(detail), sum(counts.values()))


def start_check_table(files: StudyFiles) -> Table | None:
    """What every training run checked about its own numbers before the first step."""
    return _side_by_side(files, "start-check", "Start checks", lambda stage: stage.start_check)


def environment_table(files: StudyFiles) -> Table | None:
    """Machine and versions; one column when all stages ran in the same place."""
    return _side_by_side(files, "environment", "Environment", lambda stage: stage.environment)


def _side_by_side(files: StudyFiles, name: str, caption: str, of: Callable[[Stage], Any]) -> Table | None:
    """Nested facts of stages as rows, stages as columns; stages that say the same share a column."""
    columns: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for stage in files.stages.values():
        facts = of(stage)
        if isinstance(facts, (dict, list)) and facts:
            flat = dict(flatten(facts))
            columns.setdefault(repr(flat), ([], flat))[0].append(_short(stage))
    labels = list(dict.fromkeys(label for _, flat in columns.values() for label in flat))
    if not labels:
        return None
    heads = [Column("All stages" if len(columns) == 1 else ", ".join(dict.fromkeys(who))) for who, _ in columns.values()]
    rows = [Row(label, [_fact(flat.get(label)) for _, flat in columns.values()]) for label in labels]
    return Table(name, caption, "", heads, [("", rows)])


def _short(stage: Stage) -> str:
    """A stage folder's name without its key: 'train-dpo-1f0c…' gives 'train dpo'."""
    parts = stage.folder.split("-")
    return " ".join(parts[:-1] if len(parts) > 2 else parts)


def _fact(value: Any) -> Cell:
    if isinstance(value, bool) or value is None:
        return Cell({True: "yes", False: "no", None: MISSING}[value])
    if isinstance(value, list):
        return Cell(", ".join(str(item) for item in value) or "none")
    number = numbers.finite(value)
    if number is None:
        return Cell(str(value) if not isinstance(value, dict) else "none")
    small = 0 < abs(number) < 0.01
    return Cell(f"{number:.2g}" if small else f"{number:,.4g}" if not number.is_integer() else f"{number:,.0f}", value=number)
