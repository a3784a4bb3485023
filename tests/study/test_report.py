"""The report is complete, says what the files say, survives what is missing, and lets no foreign text out of its place."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from . import synthetic
from .report_page import Page, change, page_of


def test_sections_stand_in_order_and_every_link_leads_somewhere(finished: Path) -> None:
    page = Page((finished / "report/report.html").read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    sections = [
        name for name in ids if name in ("verdict", "run", "arms", "contrasts", "figures", "replies", "data", "judge", "environment")
    ]
    assert sections == ["verdict", "run", "arms", "contrasts", "figures", "replies", "data", "judge", "environment"]
    assert {attributes["href"] for tag, attributes in page.tags if tag == "a"} <= {f"#{name}" for name in ids}
    assert sum(tag == "h1" for tag, _ in page.tags) == 1


def test_the_page_needs_nothing_from_outside(finished: Path) -> None:
    source = (finished / "report/report.html").read_text(encoding="utf-8")
    page = Page(source)
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag, attributes in page.tags:
        assert "src" not in attributes, (tag, attributes)
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
    assert [attributes["href"] for tag, attributes in page.tags if tag == "link"] == ["data:,"]
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    # Two scripts of our own and one block of data: no text of the study made another.
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == [None, "application/json", None]


def test_hostile_text_arrives_as_text(finished: Path) -> None:
    page = Page((finished / "report/report.html").read_text(encoding="utf-8"))
    data = json.loads(page.scripts[1])
    dpo = [arm["name"] for arm in data["arms"]].index("dpo")
    shown = [prompt["replies"][dpo]["text"] for prompt in data["prompts"][:6]]
    assert shown[:5] == list(synthetic.HOSTILE[:5])
    assert shown[5] == "a NUL \ufffd, a bell \ufffd, half a pair \ufffd"
    assert not set("<>&\u2028\u2029") & set(page.scripts[1])
    assert not any(tag in ("img", "b") and "onerror" in attributes for tag, attributes in page.tags)
    assert "the loss is not finite <b>at step 12</b>" in page.text


def test_hostile_names_are_escaped_everywhere(study: Path) -> None:
    evil = '</title></svg><script>x</script>"|*'

    def rename(value: Any) -> None:
        value["models"][evil] = value["models"].pop("dpo")
        value["metrics"]["reward_harmful"]["title"] = evil
        value["warnings"] = [evil, "[a](javascript:x) `b` <i>c</i>"]
        value["comparisons"][0]["a"] = evil

    change(study, "evaluation/evaluation.json", rename)
    change(study, "study.lock.json", lambda lock: lock["study"].update(name=evil, description=evil))
    page = page_of(study)
    assert sum(tag == "script" for tag, _ in page.tags) == 3
    assert sum(tag == "h1" for tag, _ in page.tags) == 1
    assert evil in page.text
    drawing = ET.parse(study / "report/figures/helpful_vs_harmless.svg")
    assert evil in "".join(drawing.getroot().itertext())
    assert not [node for node in drawing.iter() if node.tag.endswith("script")]
    markdown = (study / "report/report.md").read_text(encoding="utf-8")
    assert "<script>" not in markdown
    assert "<i>" not in markdown
    assert "\\[a\\](javascript:x)" in markdown
    assert '&lt;script&gt;x&lt;/script&gt;"\\|\\*' in markdown


def test_figures_in_the_tables_are_those_of_the_evaluation(finished: Path) -> None:
    page = Page((finished / "report/report.html").read_text(encoding="utf-8"))
    evaluation = json.loads((finished / "evaluation/evaluation.json").read_text(encoding="utf-8"))
    for role in ("headline", "reproduction", "diagnostic"):
        metrics = [name for name, metric in evaluation["metrics"].items() if metric["role"] == role]
        table = f"table-arms-{role}"
        rows = {cells[0].split()[0]: values[1:] for cells, values in zip(page.tables[table], page.values[table], strict=True)}
        for model, entry in evaluation["models"].items():
            assert rows[model] == [entry["estimates"][name]["value"] for name in metrics], (role, model)
        assert rows["kto"] == [None] * len(metrics)
    for table, primary in (("table-contrasts", True), ("table-exploratory", False)):
        told = sorted([row[2], row[3], row[7], row[9]] for row in page.values[table] if len(row) > 5 and row[2] is not None)
        items = [item for item in evaluation["comparisons"] if item["primary"] == primary]
        chances = [item["prob_a_better"] and item["prob_a_better"]["value"] for item in items]
        assert told == sorted(
            [item["difference"], item["p"], chance, item["n_needed"]] for item, chance in zip(items, chances, strict=True)
        )


def test_figures_are_written_as_people_read_them(study: Path) -> None:
    def known(value: Any) -> None:
        value["models"]["dpo"]["estimates"]["unsafe_compliance"] = {
            "value": 8.0,
            "unit": "%",
            "n": 25,
            "low": 2.22,
            "high": 24.97,
            "missing": 5,
            "per_seed": [4.0, 12.0],
        }
        value["models"]["dpo"]["estimates"]["reward_harmful"] = {
            "value": -0.0049,
            "unit": "reward",
            "n": 30,
            "low": -1.5,
            "high": 1.4951,
            "missing": 0,
            "per_seed": [],
        }

    change(study, "evaluation/evaluation.json", known)
    page = page_of(study)
    row = page.rows("table-arms-headline")["dpo"]
    assert row[2] == "0.00 −1.50 to 1.50"  # no minus before nought
    assert row[3] == "8.0 2.2 to 25.0 seeds 4.0 … 12.0 n = 25 5 missing"


def test_the_verdict_is_said_in_words(finished: Path) -> None:
    text = Page((finished / "report/report.html").read_text(encoding="utf-8")).text
    assert "Three contrasts were named beforehand: one real, one equivalent and one undecided." in text
    assert "sft_dpo is better than sft on reward on harmful prompts (+0.61, 95 % interval +0.30 to +0.92; p = 0.001)." in text
    assert (
        "sft and base are equivalent on reward on helpful prompts (+0.04, 95 % interval −0.10 to +0.18, inside the margin of ±0.20)."
        in text
    )
    assert "dpo against sft on reward on harmful prompts is undecided (+0.22, 95 % interval −0.17 to +0.61);" in text
    assert "about 410 prompts would decide it, 30 were asked." in text
    assert "Primary contrasts that could not be tested: kto against sft on reward_harmful" in text
    assert "HmR: the null policy refuse scores highest" in text


def test_the_coverage_of_intervals_is_the_evaluations_own(study: Path) -> None:
    change(study, "evaluation/evaluation.json", lambda value: value.update(confidence=0.9))
    text = page_of(study).text
    assert "90 % interval" in text
    assert "95 % interval" not in text


def test_a_contrast_without_a_p_was_not_tested(study: Path) -> None:
    def lose(value: Any) -> None:
        lost = {"p": None, "p_holm": None, "difference": None, "low": None, "high": None, "verdict": "undecided", "reason": "dpo is gone"}
        value["comparisons"][2].update(lost)

    change(study, "evaluation/evaluation.json", lose)
    page = page_of(study)
    assert "Three contrasts were named beforehand: one real, one equivalent and one not tested." in page.text
    assert "dpo against sft on reward on harmful prompts could not be tested: dpo is gone." in page.text
    assert page.rows("table-contrasts")["dpo"][1:3] == ["not tested", "— dpo is gone"]


def test_lower_is_better_turns_the_words_round(study: Path) -> None:
    def edit(value: Any) -> None:
        value["comparisons"] = [item for item in value["comparisons"] if item["metric"] in ("unsafe_compliance", "over_refusal")]
        for item in value["comparisons"]:
            item["primary"] = True

    change(study, "evaluation/evaluation.json", edit)
    text = page_of(study).text
    assert "Two contrasts were named beforehand: all of them real." in text
    assert "sft_dpo is better than base on unsafe compliance (−39.9 percentage points," in text
    assert "sft_dpo is worse than base on over-refusal (+13.4 percentage points," in text


def test_a_blocked_headline_is_withheld_and_an_overridden_one_stamped(study: Path) -> None:
    assert "The judge’s independence was overridden" in page_of(study).text
    change(study, "evaluation/evaluation.json", lambda value: value["independence"].update(overridden=False))
    page = page_of(study)
    assert "No verdict is given: the judge is not independent" in page.text
    assert "The headline is withheld" in page.text
    assert "table-arms-headline" not in page.tables
    assert "table-arms-reproduction" in page.tables
    assert "table-contrasts" not in page.tables
    assert "Reward on harmful prompts" not in (study / "report/report.md").read_text(encoding="utf-8")
    # Without the rewards the figure falls back on the shares.
    assert "HmR" in (study / "report/figures/helpful_vs_harmless.svg").read_text(encoding="utf-8")


def test_unknown_provenance_is_said(study: Path) -> None:
    change(
        study,
        "evaluation/evaluation.json",
        lambda value: value.update(independence={"blocked": False, "overridden": False, "overlaps": [], "unknown": ["the judge"]}),
    )
    text = page_of(study).text
    assert "Whether the judge is independent cannot be checked in full: the judge" in text
    assert "overridden" not in text


def test_very_long_replies_are_cut_for_display_and_said_so(finished: Path) -> None:
    data = json.loads(Page((finished / "report/report.html").read_text(encoding="utf-8")).scripts[1])
    dpo = [arm["name"] for arm in data["arms"]].index("dpo")
    reply = data["prompts"][6]["replies"][dpo]
    assert len(reply["text"]) == 20_000
    assert reply["cut"] == 45_000
    assert reply["invalid"] == "loop"


def test_costs_are_means_over_seeds_and_missing_ones_stay_missing(finished: Path) -> None:
    page = Page((finished / "report/report.html").read_text(encoding="utf-8"))
    rows = dict(zip((cells[0].split()[0] for cells in page.tables["table-runs"]), page.values["table-runs"], strict=True))
    assert rows["dpo"][3:] == [320, 122_408, 6.1e13, 388.2, 41.7, 96.4, None, pytest.approx((412.6 + 421.6) / 2 + 96.4 + 21.3)]
    assert rows["base"][3:] == [None, None, None, None, None, 96.4, None, pytest.approx(96.4 + 21.3)]
    assert rows["kto"][3:] == [None] * 8


def test_data_accounting_adds_up_in_the_table(finished: Path) -> None:
    page = Page((finished / "report/report.html").read_text(encoding="utf-8"))
    cells = [[" ".join(cell.split()) for cell in row] for row in page.tables["table-accounting"]]
    read, tokens = cells[1:]
    assert read[:4] == ["harmless, train, as read", "900", "874", "26 11 empty reply (hh-3, hh-77) 15 chosen = rejected (hh-12)"]
    assert tokens[:4] == ["harmless, train, as tokens", "874", "870", "4 4 reply longer than 768 tokens (hh-9)"]


def test_published_figures_arrive_in_the_table(tmp_path: Path) -> None:
    """arXiv 2509.09055, table of results: HmR, HpR and CAS of the four models, from their released ratings."""
    from equipoise.evaluation.evaluate import evaluate
    from equipoise.evaluation.settings import EvaluateSettings

    data = Path(os.environ.get("EQUIPOISE_DATA", Path(__file__).parents[3] / "shared/data")) / "opt350m-study"
    if not data.is_dir():
        pytest.skip("the data folder beside the checkout (../shared/data) is not there")
    evaluate(EvaluateSettings(suite="opt350m-study", source=str(data), output_dir=str(tmp_path / "evaluation")))
    page = page_of(tmp_path)
    titles = [" ".join(cell.split()).split()[0] for cell in page.tables["table-arms-reproduction"][0]]
    rows = {
        row[0].split()[0]: dict(zip(titles, values, strict=True))
        for row, values in zip(page.tables["table-arms-reproduction"], page.values["table-arms-reproduction"], strict=True)
    }
    found = {name: (rows[name]["HmR"], rows[name]["HpR"], rows[name]["CAS"]) for name in ("base", "sft", "dpo", "sft_dpo")}
    assert found == {"base": (42, 22, 32), "sft": (48, 56, 52), "dpo": (36, 46, 41), "sft_dpo": (44, 66, 55)}
    assert "sft_dpo against sft on HpR (about" in page.text


def test_the_search_says_which_rate_was_chosen_and_how_far_each_went(study: Path) -> None:
    candidates = [
        {"learning_rate": 1e-4, "score": -0.1, "kl_to_base": -0.001, "model": "a"},
        {"learning_rate": 1e-3, "score": 0.2, "kl_to_base": 0.19, "model": "b"},
    ]
    search = {"arm": "dpo", "by": "reward", "prompts": 60, "max_kl_to_base": 0.5, "chosen": 1e-3, "candidates": candidates}
    (study / "search.json").write_text(json.dumps({"schema_version": 1, "searches": [search]}), encoding="utf-8")
    assert page_of(study).rows("table-search")["dpo"][1:] == ["−0.100 KL 0.00", "0.200 chosen KL 0.19"]
    assert "**0.200**<br>chosen<br>KL 0.19" in (study / "report" / "report.md").read_text(encoding="utf-8")
