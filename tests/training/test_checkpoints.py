"""What is left of a run's checkpoints, and of what lies beside them, once it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from equipoise.training.fit import fit
from tests.tiny import preference_dicts, recipe


class Tracker(TrainerCallback):
    """Writes where transformers' TensorBoard callback does: into the output folder the Trainer knows of."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / "runs"
        folder.mkdir(parents=True)
        (folder / "events").write_text("a curve")


def test_what_a_tracker_wrote_outlives_the_checkpoints(base: Path, tmp_path: Path) -> None:
    run = fit(recipe(base, tmp_path / "tracked"), train_dataset=preference_dicts(), callbacks=[Tracker()])
    assert [item.name for item in (run.folder / "checkpoints").iterdir()] == ["runs"]
    assert (run.folder / "checkpoints" / "runs" / "events").read_text() == "a curve"
    run = fit(recipe(base, tmp_path / "alone"), train_dataset=preference_dicts())
    assert not (run.folder / "checkpoints").exists()
