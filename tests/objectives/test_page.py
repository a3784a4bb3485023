"""The page of methods is current, and holds what a reader needs of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from equipoise.cli.main import main
from equipoise.cli.methods import page
from equipoise.objectives._load import load_class, methods

PAGE = Path(__file__).resolve().parents[2] / "docs/methods.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: equipoise methods --markdown > docs/methods.md"


def test_types_are_plain() -> None:
    assert "| `weights` | dict[str, float] |" in page()
    assert "FieldInfo" not in page()


def test_the_command_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--markdown"]) == 0
    assert capsys.readouterr().out == page()


@pytest.mark.parametrize("name", methods())
def test_each_method_has_its_section(name: str) -> None:
    section = page().split(f"\n## {name}\n")[1].split("\n## ")[0]
    kind = load_class(name)
    assert kind.paper in section
    assert kind.departures in section
    for setting, field in kind.model_fields.items():
        assert f"| `{setting}` |" in section
        assert field.description, f"{name}.{setting} has no description"
    assert all(role in section for role in kind.needs.roles)


def test_the_advice_names_every_method() -> None:
    text = (PAGE.parent / "choosing.md").read_text(encoding="utf-8")
    assert [name for name in methods() if f"`{name}`" not in text] == []
