"""A stage is done once, is never mistaken for another, and goes on after an interruption."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from equipoise.core.errors import StageError
from equipoise.core.runs import environment, is_done, run_stage, stage_key


def counted(calls):
    def work(folder):
        calls.append(folder)
        (folder / "data.txt").write_text("data")
        return {"rows": 3}

    return work


def test_a_finished_stage_is_skipped_and_gives_its_results_again(tmp_path):
    calls = []
    first = run_stage(tmp_path / "a", "train", {"lr": 1}, {"data": "f1"}, counted(calls))
    again = run_stage(tmp_path / "a", "train", {"lr": 1}, {"data": "f1"}, counted(calls))
    assert (len(calls), first.skipped, again.skipped) == (1, False, True)
    assert again.results == {"rows": 3} == first.results
    assert {item.name for item in (tmp_path / "a").iterdir()} == {
        "settings.json",
        "inputs.json",
        "environment.json",
        "done.json",
        "data.txt",
    }


def test_where_a_stage_writes_does_not_change_what_it_is():
    assert stage_key("train", {"lr": 1, "output_dir": "a"}, {}) == stage_key("train", {"lr": 1, "output_dir": "b"}, {})
    assert len({stage_key("train", {"lr": 1}, {}), stage_key("score", {"lr": 1}, {}), stage_key("train", {"lr": 1}, {"x": "1"})}) == 3


@pytest.mark.parametrize(
    ("kind", "settings", "inputs", "named"),
    [
        ("train", {"lr": 2}, {"data": "f1"}, "lr"),
        ("train", {"lr": 1}, {"data": "f2"}, "input data"),
        ("score", {"lr": 1}, {"data": "f1"}, "kind"),
    ],
)
def test_other_work_in_the_folder_is_an_error_naming_the_difference(tmp_path, kind, settings, inputs, named):
    run_stage(tmp_path / "a", "train", {"lr": 1}, {"data": "f1"}, counted([]))
    with pytest.raises(StageError, match=rf"{named}.*--overwrite \(in Python overwrite=True\)"):
        run_stage(tmp_path / "a", kind, settings, inputs, counted([]))
    fresh = run_stage(tmp_path / "a", kind, settings, inputs, counted([]), overwrite=True)
    assert not fresh.skipped


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("years of work")
    with pytest.raises(StageError, match="not made by equipoise"):
        run_stage(tmp_path / "a", "train", {}, {}, counted([]))
    assert [item.name for item in (tmp_path / "a").iterdir()] == ["thesis.tex"]


def test_an_interrupted_stage_is_not_done_and_resumes_in_its_folder(tmp_path):
    seen = []

    def work(folder):
        seen.append(sorted(item.name for item in folder.iterdir() if item.name.startswith("part")))
        (folder / f"part-{len(seen)}").write_text("x")
        if len(seen) == 1:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "a", "train", {"lr": 1}, {}, work)
    assert not is_done(tmp_path / "a")
    assert not run_stage(tmp_path / "a", "train", {"lr": 1}, {}, work).skipped
    assert seen == [[], ["part-1"]]
    assert is_done(tmp_path / "a")


def test_a_stage_that_fails_before_it_makes_anything_does_not_stand_in_the_way_of_the_call_put_right(tmp_path):
    def mistyped(folder):
        raise ValueError("no such model")

    def half_way(folder):
        (folder / "part").write_text("x")
        raise ValueError("no such row")

    for work in (mistyped, half_way):
        with pytest.raises(ValueError, match="no such"):
            run_stage(tmp_path / "a", "generate", {"model": "tpyo"}, {}, work)
    with pytest.raises(StageError, match="other settings"):
        run_stage(tmp_path / "a", "generate", {"model": "typo"}, {}, counted([]))
    with pytest.raises(ValueError, match="no such"):
        run_stage(tmp_path / "b", "generate", {"model": "tpyo"}, {}, mistyped)
    assert not run_stage(tmp_path / "b", "generate", {"model": "typo"}, {}, counted([])).skipped


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_a_stage_error(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StageError, match=f"{name} cannot be made"):
        run_stage(tmp_path / name, "train", {}, {}, counted([]))


@pytest.mark.parametrize("name", ["inputs.json", "settings.json", "environment.json"])
def test_a_kill_while_the_folder_is_begun_can_be_resumed(tmp_path, monkeypatch, name):
    """Killed while one of the first files is written: its temporary file and those before it are what is left."""

    def killed(source, target):
        if Path(target).name == name:
            raise KeyboardInterrupt
        replace(source, target)

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # kill -9 cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            run_stage(tmp_path / "a", "train", {"lr": 1}, {}, counted([]))
    assert [item for item in (tmp_path / "a").iterdir() if item.name.endswith(".part")]
    if name != "inputs.json":
        with pytest.raises(StageError, match="other settings or inputs"):
            run_stage(tmp_path / "a", "train", {"lr": 2}, {}, counted([]))
    assert not run_stage(tmp_path / "a", "train", {"lr": 1}, {}, counted([])).skipped
    assert is_done(tmp_path / "a")


def test_killed_while_it_is_emptied_a_folder_is_neither_done_nor_somebody_elses(tmp_path, monkeypatch):
    run_stage(tmp_path / "a", "train", {"lr": 1}, {}, counted([]))
    (tmp_path / "a" / "model").mkdir()
    gone = []

    def killed(path, missing_ok=False):
        if len(gone) == 3:
            raise KeyboardInterrupt
        gone.append(path.name)
        unlink(path, missing_ok=missing_ok)

    unlink = Path.unlink
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            run_stage(tmp_path / "a", "train", {"lr": 2}, {}, counted([]), overwrite=True)
    assert gone[0] == "done.json"
    assert (tmp_path / "a" / "inputs.json").is_file()
    assert not run_stage(tmp_path / "a", "train", {"lr": 1}, {}, counted([])).skipped
    assert not run_stage(tmp_path / "a", "train", {"lr": 3}, {}, counted([]), overwrite=True).skipped
    assert not (tmp_path / "a" / "model").exists()


def test_the_environment_tells_versions_and_no_names_or_paths(monkeypatch):
    monkeypatch.setenv("USER", "marie-curie")
    found = environment()
    assert found["versions"]["numpy"]
    assert found["cores"] >= 1
    text = json.dumps(found)
    assert "marie-curie" not in text
    assert "/" not in text
