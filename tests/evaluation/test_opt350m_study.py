"""The released scores of arXiv 2509.09055: published figures from the real files, and how bad files are told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from equipoise.core.errors import DataError
from equipoise.evaluation.evaluate import compute, evaluate
from equipoise.evaluation.settings import EvaluateSettings, PassSettings

DATA = Path(os.environ.get("EQUIPOISE_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))
PUBLISHED = {"base": (42, 22, 32), "sft": (48, 56, 52), "dpo": (36, 46, 41), "sft_dpo": (44, 66, 55)}


@pytest.fixture(scope="module")
def released() -> Path:
    if not (DATA / "opt350m-study").is_dir():
        pytest.skip(f"the data folder beside the checkout is absent ({DATA})")
    return DATA / "opt350m-study"


@pytest.fixture(scope="module")
def real(released: Path) -> dict[str, Any]:
    return compute(EvaluateSettings(suite="opt350m-study", source=str(released)))[0]


def find(evaluation: dict[str, Any], a: str, b: str, metric: str) -> dict[str, Any]:
    return next(row for row in evaluation["comparisons"] if (row["a"], row["b"], row["metric"]) == (a, b, metric))


def test_published_figures(real: dict[str, Any]) -> None:
    found = {name: tuple(model[metric]["value"] for metric in ("hmr", "hpr", "cas")) for name, model in real["models"].items()}
    assert found == PUBLISHED
    assert {(model["hmr"]["n"], model["cas"]["n"], model["hmr"]["missing"]) for model in real["models"].values()} == {(50, 100, 0)}
    # Wilson's intervals as tabled for these counts, in whole percent.
    intervals = {name: tuple(round(model["hmr"][side]) for side in ("low", "high")) for name, model in real["models"].items()}
    assert intervals == {"base": (29, 56), "sft": (35, 61), "dpo": (24, 50), "sft_dpo": (31, 58)}
    intervals = {name: tuple(round(model["hpr"][side]) for side in ("low", "high")) for name, model in real["models"].items()}
    assert intervals == {"base": (13, 35), "sft": (42, 69), "dpo": (33, 60), "sft_dpo": (52, 78)}
    means = {name: round(model["reward_harmful"]["value"], 2) for name, model in real["models"].items()}
    assert means == {"base": -3.60, "sft": -3.52, "dpo": -3.58, "sft_dpo": -3.68}


def test_published_p_values_and_words(real: dict[str, Any]) -> None:
    claim = find(real, "sft_dpo", "sft", "hpr")
    assert (claim["verdict"], claim["primary"], claim["difference"], claim["n"]) == ("undecided", True, 10.0, 50)
    assert claim["p"] == pytest.approx(0.2266, abs=1e-4)
    assert claim["n_needed"] > 150
    assert claim["test"] == "exact McNemar (8 to 3); Bonett-Price interval"
    assert find(real, "sft", "base", "hpr")["p"] == pytest.approx(2e-4, rel=0.15)
    assert find(real, "dpo", "base", "hpr")["p"] == pytest.approx(2e-3, rel=0.15)
    best = find(real, "sft_dpo", "base", "hpr")
    assert best["p"] == pytest.approx(3e-6, rel=0.05)
    assert best["p_holm"] == pytest.approx(9 * best["p"], rel=1e-5)
    assert best["verdict"] == "real"
    assert min(row["p"] for row in real["comparisons"] if row["metric"] == "hmr") > 0.2
    assert all(row["verdict"] == "undecided" for row in real["comparisons"] if row["metric"] == "hmr")
    assert sum(row["primary"] for row in real["comparisons"]) == 9


def test_chances_are_those_of_the_released_ratings(real: dict[str, Any], released: Path) -> None:
    """P(A better) on helpful prompts by the ratings as they are, empty replies included; counted here from the file."""
    rows = json.loads((released / "helpfulness_classification.json").read_text(encoding="utf-8"))
    ratings = {name: [row["rating"] for row in rows if row["model"] == name] for name in PUBLISHED}
    for name, expected in (("sft", 0.88), ("dpo", 0.67), ("sft_dpo", 0.90)):
        pairs = zip(ratings[name], ratings["base"], strict=True)
        assert sum((a > b) + (a == b) / 2 for a, b in pairs) / 50 == pytest.approx(expected)
        found = next(row for row in real["comparisons"] if {row["a"], row["b"]} == {name, "base"} and row["metric"] == "reward_helpful")
        assert (found["a"], found["prob_a_better"]["value"]) == (name, expected)


def test_labels_empty_replies_and_sweep(real: dict[str, Any]) -> None:
    assert real["labels"] == {"compared": 400, "agree": 400, "differ": []}
    counts = {name: (axes["harmful"]["empty"], axes["helpful"]["empty"]) for name, axes in real["empty_replies"].items()}
    assert counts == {"base": (2, 3), "sft": (0, 0), "dpo": (3, 1), "sft_dpo": (0, 0)}
    assert real["empty_replies"]["dpo"]["helpful"]["pass"] == 1  # an empty reply that its judge calls helpful
    at = {row["threshold"]: row["values"] for row in real["sweep"]["hmr"]}
    assert at[-3.0] == {name: float(values[0]) for name, values in PUBLISHED.items()}
    assert any(warning.startswith("HmR: the leading arm depends on the threshold. At -3 it is sft;") for warning in real["warnings"])
    assert len(real["independence"]["unknown"]) == 2


def test_inclusive_thresholds_give_the_same_figures(released: Path) -> None:
    passing = PassSettings(harmful_inclusive=True, helpful_inclusive=True)
    found, _ = compute(EvaluateSettings(suite="opt350m_study", source=str(released), passing=passing, resamples=1000, flips=1000))
    assert {name: tuple(model[metric]["value"] for metric in ("hmr", "hpr", "cas")) for name, model in found["models"].items()} == PUBLISHED


def test_without_reproduction_empty_replies_never_pass(released: Path) -> None:
    strict = PassSettings(reproduction=False)
    found, _ = compute(EvaluateSettings(suite="opt350m_study", source=str(released), passing=strict, resamples=1000, flips=1000))
    assert found["models"]["dpo"]["hpr"]["value"] == 44.0  # 46 with the empty one
    assert found["models"]["sft_dpo"]["hpr"]["value"] == 66.0


ROW = {"model": "base", "prompt": "Why?", "response": "Because.", "rating": -2.5, "label": "harmless"}


def write(folder: Path, harmful: Any, helpful: Any = None) -> str:
    folder.mkdir(exist_ok=True)
    helpful = [ROW | {"label": "unhelpful"}] if helpful is None else helpful
    for name, value in (("harmfulness", harmful), ("helpfulness", helpful)):
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / f"{name}_classification.json").write_text(text, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("harmful", "message"),
    [
        ("{broken", r"harmfulness_classification\.json, line 1"),
        ({}, "expected a list"),
        ([], "an empty one"),
        ([7], "row 0: expected an object"),
        ([{key: value for key, value in ROW.items() if key != "rating"} | {"ratings": 1}], "row 0: no 'rating'.*Did you mean 'ratings'"),
        ([ROW, ROW | {"label": "harmles"}], "row 1: unknown label 'harmles'. Did you mean 'harmless'"),
        ([ROW | {"rating": "high"}], "`rating` must be a number"),
        ([ROW | {"rating": True}], "`rating` must be a number"),
        ([ROW, ROW | {"rating": float("inf")}], "row 1: `rating` must be a finite number"),
        ([ROW | {"response": None}], "must be text"),
    ],
)
def test_bad_files_are_told_with_their_row(tmp_path: Path, harmful: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compute(EvaluateSettings(suite="opt350m-study", source=write(tmp_path / "in", harmful)))


def test_a_wrong_folder_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"harmfulness_classification\.json and helpfulness"):
        compute(EvaluateSettings(suite="opt350m-study", source=str(tmp_path)))


def test_missing_ratings_differing_labels_and_doubled_prompts(tmp_path: Path) -> None:
    harmful = [ROW, ROW | {"rating": None}, ROW | {"rating": -4.0}, ROW | {"prompt": "How?", "rating": float("nan")}]
    source = write(tmp_path / "in", harmful)
    found, replies = compute(EvaluateSettings(suite="opt350m-study", source=source, resamples=1000))
    hmr = found["models"]["base"]["hmr"]
    assert (hmr["value"], hmr["n"], hmr["missing"]) == (50.0, 2, 2)  # "Why?" stands three times: three prompts
    assert found["labels"]["compared"] == 3
    assert found["labels"]["differ"] == [{"model": "base", "id": "harmful-002", "released": "harmless", "worked_out": "harmful"}]
    assert any("1 of 3 labels" in warning for warning in found["warnings"])
    assert found["comparisons"] == []
    assert len(replies) == 5


def test_it_runs_as_a_stage(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [ROW])
    settings = EvaluateSettings(suite="opt350m-study", source=source, output_dir=str(tmp_path / "out"), resamples=1000)
    assert (evaluate(settings).folder / "evaluation.json").is_file()
    assert evaluate(settings).skipped
