"""Checkpoints that count only once they are whole: the `complete` mark is written after everything else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from equipoise.core.errors import EquipoiseError
from equipoise.core.files import write_json

COMPLETE = "complete.json"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Weights and optimizer state are written by libraries: what they raise on a full disk becomes one error that says what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch's writer of archives
            raise
        raise EquipoiseError(
            f"Could not write {folder}: {error}. Make room on the disk and give the same command again: it goes on from there."
        ) from error


class SaveEvery(TrainerCallback):
    """Asks for a checkpoint every so many steps, beside those the library makes: an epoch can take days."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The same step on every rank, so that all of them save. Not where the end of an epoch is about to do it."""
        ends = float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps
        if state.global_step % self._steps == 0 and not (ends and args.save_strategy == SaveStrategy.EPOCH):
            control.should_save = True


class CompleteMark(TrainerCallback):
    """Marks a checkpoint complete after the Trainer has written all of it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer once model, optimizer, schedule, random states and its own state are on disk."""
        if args.world_size > 1:
            torch.distributed.barrier()  # every rank writes its random state, and its shards
        if state.is_world_process_zero and args.output_dir is not None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / COMPLETE, {"step": state.global_step})


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_complete(folder: str | Path) -> Path | None:
    """The newest complete checkpoint, or None. Folders left half-written by a kill are removed."""
    found: list[tuple[int, Path]] = []
    for checkpoint in Path(folder).glob("checkpoint-*"):
        mark = checkpoint / COMPLETE
        if mark.is_file():
            found.append((step_of(checkpoint), checkpoint))
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)
    return max(found)[1] if found else None


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints. What else lies beside them stays: trackers (TensorBoard's events) and callbacks write there too."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    with suppress(OSError):  # not empty, or never made
        folder.rmdir()
