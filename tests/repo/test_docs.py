"""What the pages say can be done: commands, options, imports, files, links and anchors."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer
from tests.tiny import tiny, tokenizer

from equipoise.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+(?:\([^()]*\))?)\)|(?:src|href)=\"([^\"]+)\"")
PATH = re.compile(r"`(?!\S*my_)([\w.-]+(?:/[\w.-]+)+\.(?:py|md|yaml|txt|toml))`")


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(path.read_text(encoding="utf-8")) if language in languages]


def shell_lines(path: Path) -> list[list[str]]:
    """The commands of a page's shell blocks as words, continuation lines joined, comments and outputs left out."""
    found = []
    for block in blocks(path, "sh", "bash", "console", "shell"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                found.append(words)
    return found


def slug(heading: str) -> str:
    """The anchor GitHub gives a heading."""
    plain = re.sub(r"[`*]|(?<!\w)_|_(?!\w)|\[([^\]]*)\]\([^)]*\)", lambda match: match.group(1) or "", heading.strip())
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return {slug(match) for match in re.findall(r"^#{1,6}\s+(.*)$", text, re.MULTILINE)} | set(
        re.findall(r"(?:id|name)=\"([^\"]+)\"", text)
    )


def check_equipoise_command(words: list[str]) -> None:
    """Every verb exists, and every option is one of its command's."""
    command = typer.main.get_command(cli.app)
    context = typer.Context(command)
    rest = words[1:]
    while rest and not rest[0].startswith("-") and hasattr(command, "get_command"):
        inner = command.get_command(context, rest[0])
        assert inner is not None, f"{' '.join(words)}: there is no {rest[0]!r}"
        command, rest = inner, rest[1:]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    unknown = [word.split("=")[0] for word in rest if word.startswith("--") and word.split("=")[0] not in options]
    assert not unknown, f"{' '.join(words)}: no option {unknown}; there are {sorted(options)}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_of_a_page_exist(page):
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for words in shell_lines(page):
        if words[0] == "make":
            named = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            assert set(named) <= targets, f"{' '.join(words)}: the Makefile has {sorted(targets)}"
        elif words[0] == "equipoise":
            check_equipoise_command(words)
        elif words[0].startswith("python") and len(words) > 1 and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), f"{' '.join(words)}: no such file"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_of_a_page_parses_and_imports_what_exists(page):
    for block in blocks(page, "python", "py"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("equipoise"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page.name}: {node.module} has no {alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_anchors_of_a_page_lead_somewhere(page):
    dead = []
    for match in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        target = match.group(1) or match.group(2)
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue  # another site; the tests use no network
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(target)
    assert not dead


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_named_by_a_page_exist(page):
    missing = []
    for name in PATH.findall(page.read_text(encoding="utf-8")):
        places = (ROOT / name, ROOT / "src" / "equipoise" / name, page.parent / name)
        if not any(place.exists() for place in places):
            missing.append(name)
    assert not missing


def test_anchors_follow_github():
    # Worked by hand against GitHub's rendering: case folded, punctuation dropped, spaces to hyphens, code marks gone.
    assert slug("What is honest about it?") == "what-is-honest-about-it"
    assert slug("`make test`, twice") == "make-test-twice"


def test_an_unknown_verb_or_option_would_be_found():
    with pytest.raises(AssertionError, match="there is no"):
        check_equipoise_command(["equipoise", "docter"])
    with pytest.raises(AssertionError, match="no option"):
        check_equipoise_command(["equipoise", "doctor", "--jsn"])


def test_readmes_python_runs_as_written(tmp_path, monkeypatch):
    """One block after another, as a reader pastes them, with a tiny model in place of the one that is fetched."""
    tiny().save_pretrained(tmp_path / "tiny")
    tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    names: dict[str, object] = {}
    for block in blocks(ROOT / "README.md", "python"):
        exec(block.replace("smollm2-135m-instruct", "tiny"), names)
    assert len(list(tmp_path.glob("runs/*/model"))) == 2


def test_readme_starts_with_the_two_commands():
    commands = [words for words in shell_lines(ROOT / "README.md") if words[0] == "make"]
    assert commands[:2] == [["make", "quickstart"], ["make", "test"]]


def test_ci_runs_the_readmes_test_command():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "make test"
