"""A whole study on tiny models."""

from __future__ import annotations

from equipoise.core.files import read_json
from equipoise.study.run import run_study
from equipoise.study.settings import StudySettings


def test_a_whole_study_from_pairs_to_report(values, tmp_path):
    folder = run_study(StudySettings.make(values), tmp_path / "study")
    arms = read_json(folder / "arms.json")["arms"]
    print(arms)
    assert (folder / "report" / "report.html").is_file()
