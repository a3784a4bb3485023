"""The report when pieces are missing or broken, and the files beside the page: the same bytes again, figures, Markdown."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from equipoise.core.errors import DataError
from equipoise.study.report import build_report

from .report_page import change, page_of


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("study.lock.json", "study.lock.json is not there"),
        ("arms.json", "arms.json is not there"),
        ("evaluation", "There is no verdict yet"),
        ("evaluation/replies.jsonl", "No replies were recorded."),
        ("stages", "No stage wrote an account of its data."),
    ],
)
def test_what_is_missing_is_said(study: Path, lost: str, said: str) -> None:
    path = study / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert said in page_of(study).text
    assert (study / "report/report.md").is_file()


def test_missing_inside_the_files_is_not_zero(study: Path) -> None:
    def edit(value: Any) -> None:
        value["judge"]["held_out"] = None
        value["models"]["dpo"]["estimates"]["reward_harmful"].update(value=None, low=None, high=None, n=0, missing=30)
        del value["models"]["sft"]["estimates"]["reward_harmful"]
        value["comparisons"][2].update(p=None, p_holm=None, n_needed=None, low=None, high=None, prob_a_better=None)
        del value["sweep"], value["detectable"], value["warnings"]

    change(study, "evaluation/evaluation.json", edit)
    page = page_of(study)
    rows = page.rows("table-arms-headline")
    assert rows["dpo"][2].startswith("—")
    assert rows["dpo"][2].endswith("30 missing")
    assert rows["sft"][2] == "—"
    assert "Pair accuracy, held out not measured" in page.text
    assert not (study / "report/figures/threshold_sweep.svg").exists()


def test_an_empty_study_still_makes_a_report(tmp_path: Path) -> None:
    arm = {"name": "dpo", "seed": 0, "status": "pending", "error": None, "stages": [], "model": None, "cost": {}}
    (tmp_path / "arms.json").write_text(json.dumps({"schema_version": 1, "arms": [arm]}))
    text = page_of(tmp_path).text
    assert "There is no verdict yet" in text
    assert "The study is not finished; still to run: dpo, seed 0" in text


def test_torn_and_broken_files_are_named(study: Path) -> None:
    stage = next((study / "stages").glob("train-dpo-*"))
    with open(stage / "log.jsonl", "ab") as stream:
        stream.write(b'{"step": 61, "lo')
    (stage / "accounting.json").write_text('{"rows_in": ')
    text = page_of(study).text
    assert f"stages/{stage.name}/log.jsonl: 1 broken line left out." in text
    assert f"stages/{stage.name}/accounting.json, line 1" in text
    assert str(study) not in text


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        build_report(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not a study folder"):
        build_report(tmp_path)


def test_same_files_same_bytes_wherever_they_lie(finished: Path, study: Path) -> None:
    again = build_report(study, study.parent / "elsewhere").parent
    first = finished / "report"
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(again)) for path in again.rglob("*") if path.is_file())
    assert {
        "report.html",
        "report.md",
        "figures/helpful_vs_harmless.svg",
        "figures/refusal_vs_compliance.svg",
        "figures/threshold_sweep.svg",
        "figures/training_curves.svg",
    } == set(names)
    for name in names:
        assert (first / name).read_bytes() == (again / name).read_bytes(), name


def test_figures_are_whole_svg_files_with_both_themes(finished: Path) -> None:
    for path in sorted((finished / "report/figures").glob("*.svg")):
        root = ET.parse(path).getroot()
        style = "".join(node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}style"))
        assert "prefers-color-scheme:dark" in style
        assert "var(" not in style
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        for node in root.iter():
            for name, most in (
                ("x", width),
                ("cx", width),
                ("x1", width),
                ("x2", width),
                ("y", height),
                ("cy", height),
                ("y1", height),
                ("y2", height),
            ):
                assert -1 <= float(node.attrib.get(name, 0)) <= most + 1, (path.name, node.attrib)


def test_markers_stand_where_the_figures_say(finished: Path) -> None:
    """Positions of two arms, read off the drawing, are in the proportion of their values."""
    evaluation = json.loads((finished / "evaluation/evaluation.json").read_text(encoding="utf-8"))
    source = (finished / "report/figures/refusal_vs_compliance.svg").read_text(encoding="utf-8")
    ticks = [
        (float(x), float(label))
        for x, label in re.findall(r'<text x="([\d.]+)" y="[\d.]+" class="tick" text-anchor="middle">([\d.]+)</text>', source)
    ]
    (x0, v0), (x1, v1) = ticks[0], ticks[-1]
    base = evaluation["models"]["base"]["estimates"]["over_refusal"]["value"]
    drawn = next(
        float(x) for x, note in re.findall(r'<circle cx="([\d.]+)"[^>]*><title>([^<]*)</title>', source) if note.startswith("base:")
    )
    assert drawn == pytest.approx(x0 + (base - v0) / (v1 - v0) * (x1 - x0), abs=0.02)


def test_markdown_says_the_same(finished: Path) -> None:
    text = (finished / "report/report.md").read_text(encoding="utf-8").replace("\xa0", " ")
    assert "**[real]** sft\\_dpo is better than sft on reward on harmful prompts (+0.61, 95 % interval +0.30 to +0.92; p = 0.001)." in text
    for line in text.splitlines():
        if line.startswith("| *refuse*"):
            assert "63.0" in text
    tables = re.findall(r"((?:^\|.*\|\n)+)", text, flags=re.MULTILINE)
    assert len(tables) >= 6
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table
    assert "figures/helpful_vs_harmless.svg" in text


def test_a_copy_to_hand_on_holds_no_texts(study: Path, tmp_path: Path) -> None:
    """Prompts and replies belong to whoever licensed them; figures, rewards and flags are ours."""
    rows = [json.loads(line) for line in (study / "evaluation/replies.jsonl").read_text(encoding="utf-8").splitlines()]
    whole = build_report(study).read_text(encoding="utf-8")
    bare = build_report(study, tmp_path / "copy", texts=False).read_text(encoding="utf-8")
    shown = [reply["text"] for row in rows for reply in row["replies"].values() if re.fullmatch(r"[\w ,.]{30,200}", reply["text"])]
    assert shown, "the synthetic study has plain replies to look for"
    assert all(text in whole for text in shown)
    assert not any(text in bare for text in shown)
    assert "left out of this copy" in bare
    assert "left out of this copy" in (tmp_path / "copy" / "report.md").read_text(encoding="utf-8")
