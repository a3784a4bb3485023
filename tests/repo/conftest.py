"""What the repository's tests of itself look at: its modules as syntax trees, and its tracked files."""

from __future__ import annotations

import ast
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "equipoise"


@dataclass(frozen=True)
class Source:
    name: str  # equipoise.core.files
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        """core, data, …; empty for the package's own files."""
        parts = self.path.relative_to(PACKAGE).parts
        return parts[0] if len(parts) > 1 else ""


@dataclass(frozen=True)
class Import:
    module: str
    names: tuple[str, ...]
    scope: str  # module, function or typing
    line: int


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def sources() -> list[Source]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("equipoise", *path.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Source(name, path, ast.parse(path.read_text(encoding="utf-8"), str(path))))
    assert len(found) > 20, "the package's files were not found"
    return found


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """Text files under version control (in an unpacked archive without git: every file that is not a build product)."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [
            path for path in ROOT.rglob("*") if not any(part.startswith(".") or part in ("build", "dist", "runs") for part in path.parts)
        ]
    texts = [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:8192]]
    assert ROOT / "pyproject.toml" in texts
    return texts


@pytest.fixture(scope="session")
def imports_of():
    """Every import of a source, with the scope it stands in."""

    def of(source: Source) -> list[Import]:
        found: list[Import] = []

        def visit(node: ast.AST, scope: str) -> None:
            if isinstance(node, ast.Import):
                found.extend(Import(alias.name, (), scope, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{source.path}:{node.lineno}: relative imports hide where a thing lives"
                found.append(Import(node.module or "", tuple(alias.name for alias in node.names), scope, node.lineno))
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and scope == "module":
                scope = "function"
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                for child in node.body:
                    visit(child, "typing")
                for child in node.orelse:
                    visit(child, scope)
                return
            for child in ast.iter_child_nodes(node):
                visit(child, scope)

        visit(source.tree, "module")
        return found

    return of
