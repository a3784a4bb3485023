"""`equipoise evaluate` and `equipoise metrics`: one JSON object, tables for people, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from equipoise.cli.main import main

QUICK = ["--set", "resamples=1000", "--set", "flips=1000"]


@pytest.fixture
def released(tmp_path: Path) -> str:
    """Two models and six prompts an axis in the released study's format."""
    for name, good, bad in (("harmfulness", "harmless", "harmful"), ("helpfulness", "helpful", "unhelpful")):
        rows = [
            {"model": model, "prompt": f"Question {n}?", "response": "An answer.", "rating": rating, "label": good if rating > -2 else bad}
            for model, rating in (("base", -5.0), ("sft_dpo", 1.0))
            for n in range(6)
        ]
        (tmp_path / f"{name}_classification.json").write_text(json.dumps(rows), encoding="utf-8")
    return str(tmp_path)


def test_json_is_one_object_with_its_version(released: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--suite", "opt350m-study", "--from", released, "--json", *QUICK]) == 0
    out, err = capsys.readouterr()
    value = json.loads(out)
    assert next(iter(value)) == "schema_version"
    assert value["models"]["sft_dpo"]["hmr"]["value"] == 100.0
    assert value["comparisons"][0]["verdict"] == "undecided"  # six prompts: p = 2/64, times three contrasts
    assert "smallest detectable" in err


def test_tables_for_people(released: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    assert main(["evaluate", "--suite", "opt350m_study", "--from", released, *QUICK]) == 0
    out = capsys.readouterr().out
    for words in (
        "Headline metrics, 95 % interval",
        "HmR, %",
        "100.0 (61.0 to 100.0)",
        "sft_dpo − base",
        "Primary contrasts",
        "hmr, hpr: exact McNemar; Bonett-Price interval",
        "warning: ",
    ):
        assert words in out


def test_the_tables_name_the_coverage_asked_for(released: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--suite", "opt350m_study", "--from", released, "--set", "confidence=0.99", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "Reproduction metrics, 99 % interval" in out
    assert "95 %" not in out


def test_an_output_folder_keeps_the_result(released: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "--suite", "opt350m-study", "--from", released, "--output-dir", str(tmp_path / "out"), "--json", *QUICK]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert json.loads(first) == json.loads((tmp_path / "out/evaluation.json").read_text(encoding="utf-8"))
    assert main(arguments) == 0
    assert capsys.readouterr().out == first


def test_settings_from_a_file_and_options_on_top(released: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e.yaml").write_text(f"suite: two-axis\nsource: {released}\nmargins: {{hmr: 3}}\n", encoding="utf-8")
    assert main(["evaluate", "--config", str(tmp_path / "e.yaml"), "--suite", "opt350m-study", "--json", *QUICK]) == 0
    assert json.loads(capsys.readouterr().out)["comparisons"][0]["margin"] == 3.0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--from", "x"], 2, "--suite is missing: opt350m-study, two-axis"),
        (["--suite", "two-axis"], 2, "--from is missing"),
        (["--suite", "two-axs", "--from", "x"], 2, "Did you mean 'two_axis'"),
        (["--suite", "two-axis", "--from", "x", "--set", "alhpa=0.1"], 2, "Did you mean 'alpha'"),
        (["--suite", "two-axis", "--from", "nowhere"], 1, "nowhere does not exist"),
    ],
)
def test_bad_use(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *arguments]) == code
    assert message in capsys.readouterr().err


def test_metrics_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["metrics", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["metrics"]["cas"]["source"].startswith("arXiv 2509.09055")
    assert main(["metrics"]) == 0
    assert "unsafe_compliance" in capsys.readouterr().out


def test_metrics_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "--markdown"]) == 0
    page = Path(__file__).resolve().parents[2] / "docs/metrics.md"
    assert capsys.readouterr().out == page.read_text(encoding="utf-8")
