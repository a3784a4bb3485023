"""Token credit in the report: the numbers of its file, its scale, hostile text, and what is left out without texts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from equipoise.study._report.credit import PIECES, PROMPTS, _unit
from equipoise.study.report import build_report

from . import synthetic
from .report_page import Page, page_of
from .synthetic_credit import add_credit


class Pieces(HTMLParser):
    """Every reply of the section: its whole text, and its pieces as (text, classes, what is told)."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.replies: list[tuple[str, list[tuple[str, list[str], dict[str, str]]]]] = []
        self._reply = self._piece = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        css = (found.get("class") or "").split()
        if tag == "p":
            self._reply = "pieces" in css
            if self._reply:
                self.replies.append(("", []))
        if tag == "span" and self._reply:
            self._piece = True
            told = dict(line.split("\t") for line in str(found["data-told"]).split("\n"))
            self.replies[-1][1].append(("", css, told))

    def handle_endtag(self, tag: str) -> None:
        self._reply = self._reply and tag != "p"
        self._piece = False

    def handle_data(self, data: str) -> None:
        if self._reply:
            text, pieces = self.replies[-1]
            if self._piece:
                pieces[-1] = (pieces[-1][0] + data, *pieces[-1][1:])
            if not (self._piece and "aside" in pieces[-1][1]):
                text += data
            self.replies[-1] = (text, pieces)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study whose trained arms are credited. Tests that change it take a copy."""
    return add_credit(synthetic.build_study(tmp_path_factory.mktemp("study") / "starter", prompts_per_axis=6), 2)


def credit_file(study: Path, arm: str) -> Path:
    return next(iter(study.glob(f"stages/score-{arm}-*/token_credit.jsonl")))


def rewrite(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def line(name: str, *pieces: tuple[str, float, float], **more: Any) -> dict[str, Any]:
    rows = [{"text": text, "tokens": 1, "credit": 0.1 * (policy - base), "policy": policy, "base": base} for text, policy, base in pieces]
    return {"id": name, "beta": 0.1, "credit": sum(row["credit"] for row in rows), "tokens": len(rows), "pieces": rows, **more}


def only(study: Path, *lines: dict[str, Any]) -> None:
    """Leave one arm's credit in the study: these lines."""
    for path in study.glob("stages/score-*/token_credit.jsonl"):
        path.unlink()
    rewrite(next(iter(study.glob("stages/score-dpo-*"))) / "token_credit.jsonl", list(lines))


def test_every_reply_stands_whole_with_its_sum(finished: Path) -> None:
    source = build_report(finished).read_text(encoding="utf-8")
    replies = [json.loads(row) for row in (finished / "evaluation/replies.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [row for axis in synthetic.TOPICS for row in [row for row in replies if row["axis"] == axis][:2]]
    expected = [row["replies"][arm]["text"] for row in asked for arm in ("sft", "dpo", "sft_dpo")]
    assert [text for text, _ in Pieces(source).replies] == expected
    text = Page(source).text
    assert "with β = 0.1; the reference is smollm2-135m-instruct" in text
    assert "no causal attribution" in text
    for arm in ("sft", "dpo", "sft_dpo"):
        for found in map(json.loads, credit_file(finished, arm).read_text(encoding="utf-8").splitlines()):
            shown = f"{found['credit']:+.3f}".replace("-", "−")
            assert f">{shown}</data>" in source


def test_numbers_and_tints_worked_by_hand(study: Path) -> None:
    # β = 0.1. The sizes are 0.2, 0.1, 0.05, 0.025, 0.02 and 0: the scale's end is 0.2, its tints begin at 0.025, 0.05, 0.1, 0.2.
    pieces = [("Up", -1.0, -3.0), (" down", -2.0, -1.0), (" a", -1.0, -1.5), (" b", -1.25, -1.0), (" c", -1.2, -1.0), (".", -1.0, -1.0)]
    only(study, line("helpful-0", *pieces))
    ((text, found),) = Pieces(build_report(study).read_text(encoding="utf-8")).replies
    assert text == "Up down a b c."
    assert [piece for piece, _, _ in found] == ["Up", "down", "a", "b", "c", "."]
    assert [css[1:] for _, css, _ in found] == [["p4"], ["n3"], ["p2"], ["n1"], [], []]
    assert found[0][2] == {
        "credit": "+0.200",
        "trained": "−1.000 (36.8\u00a0%)",
        "reference": "−3.000 (5.0\u00a0%)",
        "ratio": "7.39 times",
    }
    assert found[1][2]["ratio"] == "0.368 times"
    text = page_of(study).text
    assert "−0.2 −0.1 −0.05 −0.025 near 0 +0.025 +0.05 +0.1 +0.2" in text


def test_the_scale_is_round_and_rounding_is_not_tinted() -> None:
    assert _unit([(0.31, 0.1)] * 20 + [(9.0, 0.1)]) == 0.2  # one far piece does not wash out the others
    assert _unit([(8.1, 0.1)] * 3) == 8
    assert _unit([(0.0999, 0.1)] * 3) == 0.08
    assert _unit([(1e-7, 0.1)] * 3) == 0.01
    assert _unit([]) == 1


def test_what_is_no_text_is_set_apart(study: Path) -> None:
    found = line("helpful-0", ("Yes", -1.0, -2.0), ("\n\n", -1.0, -1.0), ("", -0.1, -1.0))
    found["pieces"][2] |= {"aside": "<|im_end|> \n", "reward": 0.25, "tokens": 2}
    only(study, found)
    ((text, pieces),) = Pieces(build_report(study).read_text(encoding="utf-8")).replies
    assert text == "Yes\n\n"
    assert "line" in pieces[1][1]
    assert (pieces[2][0], pieces[2][1]) == ("<|im_end|>␣↵", ["c", "p3", "aside"])
    assert (pieces[2][2]["reward"], pieces[2][2]["tokens"]) == ("+0.250", "2")


def test_hostile_text_and_names_arrive_as_text(study: Path) -> None:
    evil = "</p></script><script>window.pwned=1</script>\"' onmouseover=x"
    only(study, line("helpful-0", (evil, -1.0, -2.0), ("", -1.0, -2.0)), line(evil, ("x", -1.0, -1.0)))
    path = credit_file(study, "dpo")
    found = [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]
    found[0]["pieces"][1]["aside"] = evil
    rewrite(path, found)
    scorers = [{"scorer": "token_credit", "base_model_name_or_path": evil}]
    (path.parent / "settings.json").write_text(json.dumps({"scorers": scorers}), encoding="utf-8")
    page = page_of(study)
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == [None, "application/json", None]
    assert not any(name.startswith("on") or name == "style" for _, attributes in page.tags for name in attributes)
    assert page.text.count("<script>window.pwned=1</script>") >= 4  # piece, end token, prompt id, reference
    assert "<script>" not in (study / "report/report.md").read_text(encoding="utf-8")


def test_a_copy_without_texts_leaves_it_out_and_says_so(finished: Path, tmp_path: Path) -> None:
    source = build_report(finished, tmp_path / "copy", texts=False).read_text(encoding="utf-8")
    assert Pieces(source).replies == []
    assert "with them what each word was credited" in Page(source).text
    words = {
        piece["text"].strip()
        for row in credit_file(finished, "sft").read_text(encoding="utf-8").splitlines()
        for piece in json.loads(row)["pieces"]
    }
    told = {word for word in words if re.fullmatch(r"[a-z]{7,}", word)} - set(re.findall(r"[a-z]+", source))
    assert told, "words of replies that stand nowhere in the copy"
    markdown = (tmp_path / "copy/report.md").read_text(encoding="utf-8")
    assert "## Token credit" in markdown
    assert "| helpful-0 |" in markdown


def test_sums_stand_in_the_markdown(study: Path) -> None:
    only(study, line("helpful-0", ("Up", -1.0, -3.0)), line("harmful-1", ("Down", -3.0, -1.0)))
    build_report(study)
    markdown = (study / "report/report.md").read_text(encoding="utf-8")
    assert "| helpful-0 | +0.200<br>1 tokens |" in markdown
    assert "| harmful-1 | −0.200<br>1 tokens |" in markdown


def test_much_of_it_is_cut_for_display_and_said_so(study: Path) -> None:
    long = [(" w", -1.0, -2.0)] * (PIECES + 5)
    only(study, line("helpful-0", *long), *(line(f"helpful-{number}", ("x", -1.0, -1.0)) for number in range(1, 6)))
    page = page_of(study)
    assert "5 more pieces, credit +0.500" in page.text
    assert len(Pieces((study / "report/report.html").read_text(encoding="utf-8")).replies) == PROMPTS
    assert "2 more credited prompts stand in the token_credit.jsonl" in page.text


def test_without_credit_there_is_no_section(study: Path) -> None:
    for path in study.glob("stages/score-*/token_credit.jsonl"):
        path.unlink()
    page = page_of(study)
    assert "Token credit" not in page.text
    assert "Token credit" not in (study / "report/report.md").read_text(encoding="utf-8")


def test_a_broken_file_costs_its_lines_only(study: Path) -> None:
    only(study, line("helpful-0", ("Yes", -1.0, -2.0)))
    path = credit_file(study, "dpo")
    path.write_text(
        path.read_text(encoding="utf-8") + '{"id": "x", "pieces": 3}\n{"id": "y", "pieces": [{"text": 7}, null]}\n{"to', encoding="utf-8"
    )
    page = page_of(study)
    assert "1 broken line left out" in page.text
    assert "Token credit" in page.text


def test_a_very_long_prompt_is_cut_for_display_as_in_the_view_of_replies(tmp_path: Path) -> None:
    folder = add_credit(synthetic.build_study(tmp_path / "starter", prompts_per_axis=2), 1)
    path = folder / "evaluation" / "replies.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[0]["prompt"] = [{"role": "user", "content": "long " * 9000}, {"role": "user", "content": "and now?"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    credit = page_of(folder).text.split("This is no causal attribution", 1)[1]
    assert f"{'long ' * 4000}… (cut for display; the whole turn has 45,000 characters)" in credit
    assert "long " * 4001 not in credit
