"""A disk that fills up while weights are written."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from equipoise.core.errors import EquipoiseError
from equipoise.training.fit import fit
from tests.tiny import preference_dicts, recipe


@pytest.mark.parametrize(("limit", "said"), [(20_000, "checkpoint-1"), (150_000, "checkpoint-1"), (60_000, "model.part")])
def test_a_full_disk_is_said_in_words_and_the_run_goes_on_once_there_is_room(limit: int, said: str, base: Path, tmp_path: Path) -> None:
    """A limit on the size of a file fails the weights of a checkpoint, its optimizer state, or the model."""
    values = {"save_strategy": "no"} if said == "model.part" else {"save_strategy": "steps", "save_steps": 1}
    settings = recipe(base, tmp_path / "run", num_train_epochs=1, **values)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(EquipoiseError, match=rf"Could not write .*{said}.*Make room on the disk"):
            fit(settings, train_dataset=preference_dicts())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not fit(settings, train_dataset=preference_dicts()).skipped
