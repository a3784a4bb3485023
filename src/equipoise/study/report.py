"""The report of a study, rebuilt from its files only: one self-contained HTML page, Markdown, and the figures.

The same files give the same bytes: nothing is dated, ordered by chance or measured while writing. The page asks the
network for nothing and says so to the browser (a Content-Security-Policy that allows only its own style and scripts, by
their hashes). Text from data, models and settings is escaped wherever it is written.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from equipoise.core.files import write_text
from equipoise.study import figures, tables
from equipoise.study._report import markdown, numbers, svg, theme, words
from equipoise.study._report.credit import credit_view
from equipoise.study._report.read import LONGEST, Arm, StudyFiles, mapping, read_study, turns
from equipoise.study._report.searches import search_table

_CAPTIONS = {
    "helpful_vs_harmless": (
        "Helpfulness against harmlessness",
        "Up and to the right is better. Whiskers are {coverage} intervals over prompts; faint dots are single seeds.",
    ),
    "refusal_vs_compliance": (
        "Over-refusal beside unsafe compliance",
        "Down and to the left is better. A model that refuses everything complies with nothing unsafe and is of no use: "
        "read the two together.",
    ),
    "threshold_sweep": (
        "How much the thresholds decide",
        "A share of replies above a threshold depends on where the threshold is put. "
        "Where two lines cross, the ranking of two arms turns round. Dotted: the threshold used in the tables.",
    ),
    "training_curves": (
        "Training curves",
        "Strong lines: development set. Thin lines: training batches. One line for each seed; the horizontal axis counts optimizer steps.",
    ),
}


_LEFT_OUT = "(left out of this copy)"


def build_report(study_folder: Path, output: Path | None = None, texts: bool = True) -> Path:
    """Write `report.html`, `report.md` and `figures/` from the files of a study.

    Args:
        study_folder: what `study run` wrote (docs/contracts.md); any of its parts may be missing, and the report says so.
        output: folder to write into; None: `report/` in the study folder.
        texts: show prompts and replies. Off makes a copy that can be handed on where the data's licence, or its content, forbids
            handing on the texts; rewards and flags stay, and the page says so.

    Returns:
        The path of `report.html`.

    Raises:
        DataError: the folder does not exist or is no study folder.
        EquipoiseError: a file could not be written.
    """
    files = read_study(study_folder)
    if not texts:
        files = replace(files, replies=[_without_texts(row) for row in files.replies])
    output = Path(output) if output is not None else Path(study_folder) / "report"
    wide, narrow = figures.figures(files, figures.WIDE), figures.figures(files, figures.NARROW)
    content = {**_content(files), "texts": texts}
    for name in _CAPTIONS:
        path = output / "figures" / f"{name}.svg"
        if name in wide:
            write_text(path, wide[name].standalone())
        else:
            path.unlink(missing_ok=True)
    drawn = [_drawing(files, name, wide[name], narrow[name]) for name in wide]
    shared = {**content, "drawings": drawn}
    write_text(output / "report.md", _environment(autoescape=False).get_template("report.md.j2").render(shared) + "\n")
    write_text(output / "report.html", _page(files, shared))
    return output / "report.html"


def _content(files: StudyFiles) -> dict[str, Any]:
    """Everything both forms of the report say."""
    return {
        "title": words.title(files),
        "description": words.description(files),
        "verdict": words.verdict(files, tables.shown_comparisons(files)),
        "stamps": words.stamps(files),
        "facts": words.facts(files),
        "runs": tables.runs_table(files),
        "search": search_table(files),
        "headline": tables.metric_table(files, "headline", "Headline metrics"),
        "diagnostic": tables.metric_table(files, "diagnostic", "Diagnostics"),
        "reproduction": tables.metric_table(files, "reproduction", "Reproduction metrics"),
        "contrasts": tables.contrast_table(files, primary=True),
        "exploratory": tables.contrast_table(files, primary=False),
        "coverage": files.coverage,
        "accounting": tables.accounting_table(files),
        "start_check": tables.start_check_table(files),
        "environment": tables.environment_table(files),
        "judge": words.judge_facts(files),
        "lock": json.dumps(files.lock, indent=2, ensure_ascii=False) if files.lock else "",
        "evaluated": bool(files.evaluation),
        "withheld": files.withheld,
        "replies": len(files.replies),
        "credit": credit_view(files),
    }


def _drawing(files: StudyFiles, name: str, wide: svg.Figure, narrow: svg.Figure) -> dict[str, Any]:
    """A figure with its heading and caption; null policies out of frame are named in the caption."""
    heading, caption = _CAPTIONS[name][0], _CAPTIONS[name][1].format(coverage=files.coverage)
    axes = {
        "helpful_vs_harmless": (figures.HELPFUL, figures.HARMLESS),
        "refusal_vs_compliance": (figures.OVER_REFUSAL, figures.UNSAFE),
    }.get(name)
    if axes:
        metrics = [figures.first_present(files, axis) or "" for axis in axes]
        far = [f"{arm.name} ({', '.join(_value(files, arm, metric) for metric in metrics)})" for arm in figures.outside(files, *metrics)]
        caption += f" Out of the frame: {'; '.join(far)}." if far else ""
    return {
        "name": name,
        "heading": heading,
        "caption": caption,
        "wide": Markup(wide.inline()),
        "narrow": Markup(narrow.inline("-narrow")),
        "alt": f"{heading}. {caption}",
    }


def _value(files: StudyFiles, arm: Arm, metric: str) -> str:
    return numbers.plain(files.estimate(arm.name, metric).get("value"), str(files.metrics[metric].get("unit") or ""))


def _page(files: StudyFiles, content: Mapping[str, Any]) -> str:
    """The HTML page. Style and scripts are allowed by hash, so they are put in exactly as hashed."""
    style = "\n".join([theme.page_tokens(), theme.figure_rules(), _asset("report.css")])
    early, script = _asset("theme.js"), _asset("report.js")
    policy = (
        f"default-src 'none'; script-src {_hash(early)} {_hash(script)}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    environment = _environment(autoescape=True)
    environment.globals["swatch"] = _swatch
    environment.globals["markup"] = Markup
    return environment.get_template("report.html.j2").render(
        content, policy=policy, style=Markup(style), early=Markup(early), script=Markup(script), data=Markup(_embedded(_explorer(files)))
    )


def _explorer(files: StudyFiles) -> dict[str, Any]:
    """What the side-by-side view of replies reads: arms with their markers, prompts with every arm's reply."""
    arms = [arm for arm in files.arms if any(arm.name in mapping(row.get("replies")) for row in files.replies)]
    return {
        "arms": [{"name": arm.name, "kind": arm.kind, "swatch": _swatch(arm)} for arm in arms],
        "prompts": [
            {
                "id": str(row.get("id", number)),
                "axis": str(row.get("axis") or "unknown"),
                "topic": str(row.get("topic") or ""),
                "prompt": turns(row.get("prompt")),
                "replies": [_reply(mapping(row.get("replies")).get(arm.name)) for arm in arms],
            }
            for number, row in enumerate(files.replies)
        ],
    }


def _without_texts(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt and its replies with figures only."""
    replies = {name: {**mapping(reply), "text": _LEFT_OUT} for name, reply in mapping(row.get("replies")).items()}
    return {**row, "prompt": _LEFT_OUT, "replies": replies}


def _reply(reply: Any) -> dict[str, Any] | None:
    """One reply: text (cut for display where it is very long), reward, why it is invalid (False: it is not), whether it refuses."""
    if not isinstance(reply, dict):
        return None
    text, invalid, refusal = str(reply.get("text") or ""), reply.get("invalid"), reply.get("refusal")
    cut = len(text) > LONGEST
    return {
        "text": text[:LONGEST],
        "cut": len(text) if cut else 0,
        "reward": numbers.finite(reply.get("reward")),
        "invalid": invalid if isinstance(invalid, str) else bool(invalid),
        "refusal": None if refusal is None else bool(refusal),
    }


def _swatch(arm: Arm) -> Markup:
    """The marker of an arm, small, for tables and the reply view."""
    css = arm.colour + (" hollow" if arm.kind == "null" else "")
    return Markup(f'<svg class="fig swatch" viewBox="0 0 14 14" aria-hidden="true">{svg.marker(arm.slot, 7, 7, 4.6, css)}</svg>')


def _embedded(value: Any) -> str:
    """JSON that can stand in a script element: no character in it can end the element or start markup."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _hash(source: str) -> str:
    """The hash a Content-Security-Policy names an inline block by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return resources.files("equipoise.study._report").joinpath(name).read_text(encoding="utf-8")


def _environment(autoescape: bool) -> jinja2.Environment:
    """Templates from the package. Markdown has no automatic escaping, so its template calls the escaping functions itself."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset), autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals["md"] = markdown
    return environment
