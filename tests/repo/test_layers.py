"""Who may import whom: downward only, neighbours never, heavy and optional packages where they belong."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import equipoise

LAYERS = (
    ("core",),
    ("data",),
    ("models",),
    ("objectives", "generation"),
    ("reference", "scorers"),
    ("training", "evaluation"),
    ("rounds",),
    ("study",),
    ("cli",),
)
HEIGHT = {room: height for height, layer in enumerate(LAYERS) for room in layer}
OPTIONAL = ("datasets", "gguf", "matplotlib", "mpl_toolkits", "vllm", "openai", "bitsandbytes", "ray", "trl", "wandb", "trackio")
OBJECTIVES_MAY = {"torch", "numpy", "pydantic", "equipoise"} | set(sys.stdlib_module_names)


def test_every_folder_has_a_place_in_the_house(sources):
    assert {source.room for source in sources} - {""} <= set(HEIGHT)


def test_imports_point_down_and_never_to_a_neighbour(sources, imports_of):
    wrong = []
    for source in sources:
        if not source.room:
            continue
        for found in imports_of(source):
            parts = found.module.split(".")
            if parts[0] != "equipoise":
                continue
            rooms = [parts[1]] if len(parts) > 1 else [name for name in found.names if name in HEIGHT]
            for room in rooms:
                if room != source.room and room in HEIGHT and HEIGHT[room] >= HEIGHT[source.room]:
                    wrong.append(f"{source.path.name}:{found.line} ({source.room}) imports {room}")
    assert not wrong, "\n".join(wrong)


def test_core_and_data_know_no_torch(sources, imports_of):
    wrong = []
    for source in sources:
        if source.room in ("core", "data"):
            for found in imports_of(source):
                top = found.module.split(".")[0]
                if (top in ("torch", "peft", "accelerate") and found.scope != "typing") or (
                    top == "transformers" and found.scope == "module"
                ):
                    wrong.append(f"{source.name}:{found.line} imports {found.module}")
    assert not wrong, "\n".join(wrong)


def test_objectives_import_torch_and_core_only(sources, imports_of):
    wrong = []
    for source in sources:
        if source.room == "objectives":
            for found in imports_of(source):
                top, _, rest = found.module.partition(".")
                if top not in OBJECTIVES_MAY or (top == "equipoise" and rest.split(".")[0] not in ("core", "objectives")):
                    wrong.append(f"{source.name}:{found.line} imports {found.module}")
    assert not wrong, "\n".join(wrong)


def test_only_training_knows_the_trainer(sources, imports_of):
    wrong = []
    for source in sources:
        if source.room != "training":
            for found in imports_of(source):
                names = [*found.module.split("."), *found.names]
                if names[0] == "transformers" and any(name.startswith(("Trainer", "TrainingArguments", "trainer")) for name in names):
                    wrong.append(f"{source.name}:{found.line}")
    assert not wrong, "\n".join(wrong)


def test_optional_packages_stay_inside_one_file_and_its_functions(sources, imports_of):
    users: dict[str, set[str]] = {}
    at_module_scope = []
    for source in sources:
        for found in imports_of(source):
            top = found.module.split(".")[0]
            if top in OPTIONAL and found.scope != "typing":
                users.setdefault(top, set()).add(source.name)
                if found.scope == "module":
                    at_module_scope.append(f"{source.name}:{found.line} imports {top}")
    assert not at_module_scope, "\n".join(at_module_scope)
    assert not {package: names for package, names in users.items() if len(names) > 1}


def test_every_module_imports(sources):
    for source in sources:
        if source.name != "equipoise.__main__":
            importlib.import_module(source.name)


HEAVY = """
import sys
found = sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules))
sys.exit(repr(found) if found else 0)
"""
STARTS = {
    "the package": "import equipoise; assert {'__version__', 'fit', 'Objective'} <= set(dir(equipoise))",
    "--help": "from equipoise.cli.main import main; assert main(['--help']) == 0",
    "verbs": "import importlib; from equipoise.core.catalog import names\n"
    "for name in names('cli'): importlib.import_module('equipoise.cli.' + name)",
}


@pytest.mark.parametrize("what", STARTS)
def test_the_command_line_starts_without_torch(what):
    """The package, `equipoise --help`, and the modules of all verbs, import neither torch nor transformers."""
    done = subprocess.run([sys.executable, "-c", f"{STARTS[what]}\n{HEAVY}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    if what == "--help":
        assert "doctor" in done.stdout


def test_public_names_come_from_where_they_live():
    from equipoise.objectives import _base
    from equipoise.training import fit, settings

    homes = [_base, _base, _base, _base, settings, equipoise, fit]
    names = ["Losses", "Needs", "Objective", "Scored", "TrainSettings", "__version__", "fit"]
    assert equipoise.__all__ == names
    assert all(getattr(equipoise, name) is getattr(home, name) for name, home in zip(names, homes, strict=True))
    with pytest.raises(AttributeError, match="no attribute 'Loses'"):
        _ = equipoise.Loses


def test_the_example_of_an_own_objective_is_one():
    from equipoise.objectives._load import build

    built = build({"name": "own_objective", "file": "examples/own_objective.py", "tau": 0.2})
    assert isinstance(built, equipoise.Objective)
    assert built.tau == 0.2
