"""What a study found, in plain words: the verdict paragraph, the stamps above it, and the facts of what was run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equipoise.study._report import numbers
from equipoise.study._report.read import StudyFiles, listing, mapping

_MOST = 8
_FEW = 3
_SAID_ABOVE = ("The judge is not independent", "Independence cannot be checked")
"""How the evaluation's own warnings about independence begin; the stamps say the same with the particulars."""


@dataclass(frozen=True)
class Statement:
    """One sentence of the verdict and the verdict word it stands for ('' for a remark)."""

    verdict: str
    text: str


@dataclass(frozen=True)
class Stamp:
    """Something a reader must know before believing any figure. `level`: alarm or caution."""

    level: str
    title: str
    items: Sequence[str]


def title(files: StudyFiles) -> str:
    """The study's own title or name, else its folder's."""
    study = _study(files)
    return str(study.get("title") or study.get("name") or files.name)


def description(files: StudyFiles) -> str:
    """The study's own paragraph about itself, or nothing."""
    return str(_study(files).get("description") or "")


def verdict(files: StudyFiles, comparisons: Sequence[Mapping[str, Any]]) -> list[Statement]:
    """One paragraph: how many questions have an answer, then each primary contrast in a sentence."""
    if not files.evaluation:
        return [Statement("", "There is no verdict yet: the arms of this study have not been evaluated.")]
    if files.withheld:
        words = "No verdict is given: the judge is not independent of the test prompts or of the training data, and nobody overrode that."
        return [Statement("", words)]
    primary = [item for item in comparisons if item.get("primary")]
    if not primary:
        return [Statement("", "No contrast was named beforehand, so nothing here is a verdict; every comparison below is exploratory.")]
    tried = [item for item in primary if tested(item)]
    untested = [item for item in primary if not tested(item)]
    by_verdict = {word: [item for item in tried if item.get("verdict") == word] for word in ("real", "equivalent", "undecided")}
    found = {word: len(items) for word, items in {**by_verdict, "not tested": untested}.items() if items}
    asked = "One contrast was" if len(primary) == 1 else f"{numbers.number_word(len(primary)).capitalize()} contrasts were"
    if len(found) == 1:
        result = f"{'it is' if len(primary) == 1 else 'all of them'} {next(iter(found))}"
    elif not found:
        result = "it has no verdict" if len(primary) == 1 else "none has a verdict"
    else:
        result = _joined([f"{numbers.number_word(count)} {word}" for word, count in found.items()])
    told = by_verdict["real"] + by_verdict["equivalent"]
    open_ones = by_verdict["undecided"]
    said = [Statement("", "Read this with the stamp: the judge is not independent, and that was overridden.")] if _overridden(files) else []
    said += [Statement("", f"{asked} named beforehand: {result}.")]
    said += [Statement(str(item["verdict"]), sentence(files, item)) for item in told[:_MOST]]
    if len(told) > _MOST:
        said.append(Statement("", f"{len(told) - _MOST} more with an answer stand in the table of contrasts."))
    if len(open_ones) <= _FEW:
        said += [Statement("undecided", sentence(files, item)) for item in open_ones]
    else:
        words = f"Not decided: {'; '.join(_briefly(files, item) for item in open_ones[:_MOST])}{_rest(open_ones)}."
        said.append(Statement("undecided", words))
    return said + [Statement("", sentence(files, item)) for item in untested[:_MOST]]


def tested(item: Mapping[str, Any]) -> bool:
    """Whether a contrast has a p at all. One without (of an arm that failed) was not tried, which is not the same as undecided."""
    return numbers.finite(item.get("p")) is not None


def _briefly(files: StudyFiles, item: Mapping[str, Any]) -> str:
    """An undecided contrast among many: who, on what, and how many prompts it would take."""
    metric = files.metrics.get(str(item.get("metric")), {})
    needed = numbers.finite(item.get("n_needed"))
    need = f" (about {numbers.count(needed)} prompts instead of {numbers.count(item.get('n'))})" if needed else ""
    return f"{item.get('a')} against {item.get('b')} on {_lower(str(metric.get('title') or item.get('metric')))}{need}"


def _rest(items: Sequence[Any]) -> str:
    return f"; and {len(items) - _MOST} more" if len(items) > _MOST else ""


def sentence(files: StudyFiles, item: Mapping[str, Any]) -> str:
    """One contrast in words: who is better, by how much; or equivalent; or undecided, and how many prompts it would take; or not tested."""
    metric = files.metrics.get(str(item.get("metric")), {})
    unit = str(item.get("unit") or metric.get("unit") or "")
    a, b, name = item.get("a"), item.get("b"), _lower(str(metric.get("title") or item.get("metric")))
    if metric.get("flagged"):
        name += " (a flagged metric)"
    if not tested(item):
        return f"{a} against {b} on {name} could not be tested: {item.get('reason') or 'no reason recorded'}."
    between = numbers.interval(item.get("low"), item.get("high"), unit, True)
    shown = spoken_unit(unit, name)
    size = _with(item.get("difference"), unit, shown, True) + (f", {files.coverage} interval {between}" if between else "")
    if item.get("verdict") == "equivalent":
        margin = (
            f", inside the margin of ±{_with(item.get('margin'), unit, shown)}" if numbers.finite(item.get("margin")) is not None else ""
        )
        return f"{a} and {b} are equivalent on {name} ({size}{margin})."
    if item.get("verdict") == "undecided":
        asked, needed = numbers.count(item.get("n")), numbers.finite(item.get("n_needed"))
        why = item.get("reason") or f"{asked} prompts were asked"
        need = f"about {numbers.count(needed)} prompts would decide it, {asked} were asked" if needed else why
        known = f" ({size})" if numbers.finite(item.get("difference")) is not None else ""
        return f"{a} against {b} on {name} is undecided{known}; {need}."
    difference = numbers.finite(item.get("difference")) or 0.0
    better = {"higher": difference > 0, "lower": difference < 0}.get(str(metric.get("better")))
    word = ("higher" if difference > 0 else "lower") if better is None else "better" if better else "worse"
    return f"{a} is {word} than {b} on {name} ({size}; p {_equals(_corrected(item))})."


def spoken_unit(unit: str, name: str) -> str:
    """The unit, or nothing where the metric's name already says it."""
    return "" if unit.lower() in name.lower().split() else unit


def stamps(files: StudyFiles) -> list[Stamp]:
    """Alarms first: independence, failures, unknown provenance, the evaluation's warnings, flagged metrics, missing pieces."""
    independence = mapping(files.evaluation.get("independence"))
    unknown = [str(item) for item in listing(independence.get("unknown"))]
    overlaps = _shared(independence)
    found = []
    if _overridden(files):
        found.append(
            Stamp(
                "alarm",
                "The judge’s independence was overridden: believe the headline only as far as you believe the judge",
                _few(overlaps),
            )
        )
    elif independence.get("blocked"):
        words = "The headline is withheld, because the judge is not independent; the setting override_independence would show it, stamped"
        found.append(Stamp("alarm", words, _few(overlaps)))
    if unknown:
        found.append(Stamp("caution", "Whether the judge is independent cannot be checked in full", unknown))
    elif files.evaluation and not independence:
        found.append(Stamp("caution", "The evaluation does not say whether the judge is independent", []))
    failed = [f"{arm.name}, seed {run.get('seed')}: {run.get('error') or 'no reason recorded'}" for arm in files.arms for run in arm.failed]
    if failed:
        found.append(
            Stamp(
                "alarm", f"{numbers.number_word(len(failed)).capitalize()} of the runs failed and {_stand(len(failed))} in no table", failed
            )
        )
    pending = [f"{arm.name}, seed {run.get('seed')}" for arm in files.arms for run in arm.pending]
    if pending:
        found.append(Stamp("caution", "The study is not finished; still to run", pending))
    found += _about_the_plan(files)
    flagged = [
        f"{metric.get('title') or name}: {metric.get('flag_reason') or 'no reason recorded'}"
        for name, metric in files.metrics.items()
        if metric.get("flagged")
    ]
    if flagged:
        found.append(Stamp("caution", "Flagged metrics: what they reward can be had without being useful", flagged))
    warnings = [str(item) for item in listing(files.evaluation.get("warnings"))]
    warnings = [item for item in warnings if not item.startswith(_SAID_ABOVE)]
    if warnings:
        found.append(Stamp("caution", "Warnings of the evaluation", warnings))
    if files.notes:
        found.append(Stamp("caution", "Missing from this report", files.notes))
    return sorted(found, key=lambda stamp: stamp.level != "alarm")


def _about_the_plan(files: StudyFiles) -> list[Stamp]:
    """What departs from what was decided beforehand: contrasts that could not be tested, and a lock that was changed."""
    compared = [item for item in map(mapping, listing(files.evaluation.get("comparisons"))) if tested(item)]
    known = {(item.get("a"), item.get("b"), item.get("metric")) for item in compared}
    planned = [mapping(item) for item in listing(files.lock.get("primary"))] if files.evaluation else []
    untested = [item for item in planned if (item.get("a"), item.get("b"), item.get("metric")) not in known]
    found = []
    if untested:
        items = [f"{item.get('a')} against {item.get('b')} on {item.get('metric')}" for item in untested]
        found.append(Stamp("alarm", "Primary contrasts that could not be tested", items))
    changed = [str(line) for change in listing(files.lock.get("changed")) for line in listing(change)]
    if changed:
        found.append(Stamp("caution", "What was decided beforehand was later decided anew", _few(changed, "study.lock.json")))
    return found


def facts(files: StudyFiles) -> list[tuple[str, str]]:
    """What was decided and run, as (name, words): base model, data, seeds, budget, judge, sampling, prompts, version, time."""
    study = _study(files)
    seeds = listing(study.get("seeds")) or sorted({str(run.get("seed")) for arm in files.arms for run in arm.runs if "seed" in run})
    judge = mapping(study.get("judge"))
    evaluation = mapping(study.get("evaluation"))
    seconds = [numbers.finite(entry.get("seconds")) for entry in _unique_stages(files)]
    known = [value for value in seconds if value is not None]
    rows = [
        ("Base model", str(study.get("model_name_or_path") or "")),
        ("Data", _data(mapping(study.get("data")))),
        ("Seeds", ", ".join(str(seed) for seed in seeds)),
        ("Equal budget", _budget(study.get("budget"))),
        ("Judge", _joined([str(judge[key]) for key in ("name", "model_name_or_path") if judge.get(key)], " on ")),
        ("Sampling", _pairs(mapping(evaluation.get("sampling")))),
        ("Null policies", ", ".join(str(item) for item in listing(evaluation.get("null_policies")))),
        ("Baseline", _baseline(files, str(evaluation.get("baseline") or ""))),
        ("Prompts", _prompts(files)),
        ("Package", str(files.lock.get("package_version") or files.lock.get("version") or "")),
        ("Time of all stages", f"{numbers.duration(sum(known))}, each stage counted once" if known else ""),
    ]
    return [(name, words) for name, words in rows if words]


def _baseline(files: StudyFiles, planned: str) -> str:
    """The baseline of the evaluation; where it has none (its arm failed), the planned one is not to be taken for it."""
    known = str(files.evaluation.get("baseline") or "")
    lost = planned and not known and "baseline" in files.evaluation
    return f"none: {planned} was planned and is not among the models evaluated" if lost else known or planned


def judge_facts(files: StudyFiles) -> list[tuple[str, str]]:
    """The judge's provenance: who it is, how well it does on unseen pairs next to guessing by length, and what it shares."""
    judge, independence = mapping(files.evaluation.get("judge")), mapping(files.evaluation.get("independence"))
    if not judge:
        return []
    held_out = mapping(judge.get("held_out"))
    rows = [("Name", str(judge.get("name") or "not said")), ("Weights", str(judge.get("weights") or "not said"))]
    if held_out:
        rows += [
            ("Pair accuracy, held out", _held_out(mapping(held_out.get("pair_accuracy")))),
            ("Guessing by length", _held_out(mapping(held_out.get("length_baseline")))),
        ]
    else:
        rows.append(("Pair accuracy, held out", "not measured: how often this judge agrees with people is not known"))
    overlaps = listing(independence.get("overlaps"))
    blocked = "overridden" if independence.get("overridden") else "not independent" if independence.get("blocked") else ""
    state = blocked or ("unknown" if independence.get("unknown") or not independence else "independent: no prompt is shared")
    rows.append(("Independence", state))
    if overlaps:
        kinds = [str(mapping(item).get("kind") or "?") for item in overlaps]
        rows.append(("Shared prompts", f"{len(overlaps)} ({', '.join(f'{kinds.count(kind)} {kind}' for kind in sorted(set(kinds)))})"))
    return rows + [("Unknown", str(item)) for item in listing(independence.get("unknown"))]


def _held_out(estimate: Mapping[str, Any]) -> str:
    unit = str(estimate.get("unit") or "")
    between = numbers.interval(estimate.get("low"), estimate.get("high"), unit)
    count = f", n = {numbers.count(estimate.get('n'))}" if numbers.finite(estimate.get("n")) is not None else ""
    return numbers.with_unit(estimate.get("value"), unit) + (f" ({between})" if between else "") + count


def _overridden(files: StudyFiles) -> bool:
    return bool(mapping(files.evaluation.get("independence")).get("overridden"))


def _study(files: StudyFiles) -> dict[str, Any]:
    return mapping(files.lock.get("study")) or mapping(files.lock.get("settings")) or files.lock


def _unique_stages(files: StudyFiles) -> Iterable[dict[str, Any]]:
    entries = {str(entry.get("folder") or id(entry)): entry for arm in files.arms for run in arm.runs for entry in arm.stages(run)}
    return entries.values()


def _data(blocks: Mapping[str, Any]) -> str:
    words = []
    for name, block in blocks.items():
        inner = mapping(block)
        source = inner.get("dataset_name") or inner.get("source") or inner.get("path") or inner.get("name")
        words.append(f"{name} ({source})" if source and source != name else str(name))
    return ", ".join(words)


def _budget(budget: Any) -> str:
    inner = mapping(budget)
    if inner.get("equal") == "none":
        return "none: arms may differ in what they spend"
    return str(inner["equal"]) if inner.get("equal") else _pairs(inner) if inner else str(budget or "")


def _pairs(value: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key.replace('_', ' ')} {'none' if inner is None else inner}"
        for key, inner in value.items()
        if not isinstance(inner, (dict, list))
    )


def _prompts(files: StudyFiles) -> str:
    axes: dict[str, int] = {}
    for row in files.replies:
        axes[str(row.get("axis") or "unknown")] = axes.get(str(row.get("axis") or "unknown"), 0) + 1
    return f"{len(files.replies)} ({', '.join(f'{count} {axis}' for axis, count in axes.items())})" if axes else ""


def _shared(independence: Mapping[str, Any]) -> list[str]:
    """What is shared: counts where the evaluation gives them, else each prompt it lists."""
    counts = {pair: numbers.finite(count) for pair, count in mapping(independence.get("counts")).items()}
    told = [f"{numbers.count(count)} prompt{'' if count == 1 else 's'} shared between {pair}" for pair, count in counts.items() if count]
    return told or [_overlap(mapping(item)) for item in listing(independence.get("overlaps"))]


def _overlap(item: Mapping[str, Any]) -> str:
    similarity = numbers.finite(item.get("similarity"))
    near = f", similarity {similarity:.2f}" if similarity is not None and item.get("kind") != "exact" else ""
    sides = _joined([str(side) for side in listing(item.get("between"))])
    return f"{item.get('kind') or 'shared'} prompt between {sides}: {item.get('test_id')}{near}"


def _few(items: Sequence[str], where: str = "evaluation/evaluation.json") -> list[str]:
    return [*items[:_FEW], *([f"and {len(items) - _FEW} more, listed in {where}"] if len(items) > _FEW else [])]


def _stand(count: int) -> str:
    return "stands" if count == 1 else "stand"


def _joined(items: Sequence[str], last: str = " and ") -> str:
    return last.join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def _with(value: Any, unit: str, shown: str, sign: bool = False) -> str:
    """A figure in `unit`, with the unit named only where `shown` says so."""
    return f"{numbers.plain(value, unit, sign)}{chr(160) + shown if shown else ''}"


def _lower(words: str) -> str:
    """Without the capital of a sentence: 'Over-refusal' is lowered, 'HmR' and 'KL to base' are names and stay."""
    first = words.split(" ")[0]
    return words[0].lower() + words[1:] if first[1:].islower() else words


def _corrected(item: Mapping[str, Any]) -> str:
    return numbers.p_value(item.get("p_holm") if numbers.finite(item.get("p_holm")) is not None else item.get("p"))


def _equals(words: str) -> str:
    return words if words.startswith("<") else f"= {words}"
