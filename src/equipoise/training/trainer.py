"""A thin subclass of `transformers.Trainer`: optimizers, schedules, PEFT, callbacks, trackers and saving are the library's.

Ours is the step. One data item is one optimizer step of one rank, so the Trainer's own accumulation stays at 1 and the
DataLoader is not handed to accelerate: every rank has the same plan and takes its own part.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from equipoise.core.errors import UsageError
from equipoise.core.files import JsonlAppender, write_jsonl
from equipoise.core.progress import Bar, bar
from equipoise.data.plan import MicroBatch, Planner, Step
from equipoise.models.layers import rounded_once
from equipoise.reference.build import levelled
from equipoise.training._step import StepRunner
from equipoise.training._streams import Forward, Stream, detached, join
from equipoise.training.checkpoints import writing
from equipoise.training.meters import Meters
from equipoise.training.sharding import ShardedCheckpoints

Tensor = torch.Tensor


class Steps(Dataset[Step]):
    """The steps of the current epoch, as the DataLoader sees them."""

    def __init__(self, planner: Planner) -> None:
        self.planner, self.epoch = planner, 0

    def __len__(self) -> int:
        return self.planner.steps_per_epoch

    def __getitem__(self, index: int) -> Step:
        return self.planner.step(self.epoch * len(self) + index)


class PreferenceTrainer(ShardedCheckpoints):
    """Trains any objectives on packed rows.

    Args:
        streams: what to train on. dev: the same, for evaluation while training (may be empty).
        planner: which rows make which step. dev_planner: how dev rows are cut.
        forward: how a micro-batch goes through the model. fsdp: checkpoints are in shards (see `sharding`).
    """

    def __init__(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        streams: Sequence[Stream],
        dev: Sequence[Stream],
        planner: Planner,
        dev_planner: Planner | None,
        forward: Forward,
        fsdp: bool = False,
        callbacks: Sequence[TrainerCallback] = (),
        processing_class: Any = None,
    ) -> None:
        self.steps, self.fsdp = Steps(planner), fsdp
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.steps,
            eval_dataset=self.steps if dev else None,
            processing_class=processing_class,
            callbacks=[_EpochOfSteps(self.steps), *callbacks],
        )
        if self.args.n_gpu > 1:
            raise UsageError("Several GPUs in one process (DataParallel) are not supported: start with `accelerate launch` or `torchrun`.")
        self.streams, self.dev, self.dev_planner, self.forward = streams, dev, dev_planner, forward
        self.meters = Meters()
        self.runner: StepRunner | None = None

    # The library's hooks, in the order it calls them.

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Steps in order. Batch size 1 rather than None, because resuming skips through a batch sampler."""
        return DataLoader(self.steps, batch_size=1, shuffle=False, collate_fn=_only)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One optimizer step's forward and backward passes. Returns its loss."""
        model.train()
        step: Step = inputs["step"]
        if self.runner is None:
            self.runner = StepRunner(
                self.streams,
                self.forward,
                self.meters,
                backward=self.accelerator.backward,
                sync=lambda last: self.exchange(model, last),
                rank=self.args.process_index,
                world_size=self.args.world_size,
            )
        return self.runner.run(model, step)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and meters of every dev stream, each objective over all of its rows at once."""
        start = time.monotonic()
        model = self.model_wrapped
        training = model.training
        model.eval()
        metrics: dict[str, float] = {}
        total = 0.0
        for index, stream in enumerate(self.dev):
            loss, values = self._evaluate_stream(model, index, stream)
            total += stream.weight * loss
            prefix = f"{metric_key_prefix}_" + (f"{stream.name}/" if len(self.dev) > 1 else "")
            metrics |= {prefix + name: value for name, value in values.items()}
        model.train(training)
        metrics |= {f"{metric_key_prefix}_loss": total, f"{metric_key_prefix}_runtime": round(time.monotonic() - start, 3)}
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with writing(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the meters of the steps since the last line; the only place where they are synchronised."""
        if "loss" in logs:
            logs.update(self.meters.read())
        for wrong in ("train_samples_per_second", "total_flos"):
            logs.pop(wrong, None)  # the library takes a step for one sample and counts padded inputs; `cost` has pairs and FLOPs
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Counted per step in `cost`; the library's own estimate needs padded inputs, and there are none."""
        return 0

    # What the hooks use.

    def _evaluate_stream(self, model: Any, index: int, stream: Stream) -> tuple[float, dict[str, float]]:
        assert self.dev_planner is not None
        parts, counts = [], 0.0
        with torch.no_grad(), rounded_once(model, self.forward.device):
            for micro in levelled(self.dev_planner.all_rows(index, self.args.process_index), MicroBatch(index, (0,), idle=True)):
                scored = detached(self.forward.scored(model, stream, micro.rows))
                if not micro.idle:
                    parts.append(scored)
                    counts += float(stream.counts[list(micro.rows)].sum())
            if self.args.world_size > 1:
                everyone: list[Any] = [None] * self.args.world_size
                torch.distributed.all_gather_object(everyone, (parts, counts))
                parts, counts = [part for mine, _ in everyone for part in mine], sum(count for _, count in everyone)
            losses = stream.objective(join(parts))
        meters = {name: value[~torch.isnan(value)] for name, value in losses.meters.items()}
        return float(losses.sum.double().sum()) / counts, {
            name: float(value.double().mean()) for name, value in meters.items() if len(value)
        }

    def summed_loss(self) -> float:
        """The losses of the steps since the run began or was resumed; since the last log line, this rank's part only.

        Versions of the library divide it by one number of steps or another in what `train` returns.
        """
        return float(self._total_loss_scalar)

    def spent(self) -> dict[str, int]:
        """Units, unique tokens (a shared prompt once) and learned tokens of all steps so far, also those before a resume."""
        spent = {"pairs": 0, "unique_tokens": 0, "trained_tokens": 0}
        planner = self.steps.planner
        for number in range(self.state.global_step):
            for stream, lengths, rows in zip(self.streams, planner.lengths, planner.step(number).rows, strict=True):
                spent["pairs"] += len(rows)
                spent["unique_tokens"] += sum(lengths[row][0] + sum(lengths[row][1]) for row in rows)
                spent["trained_tokens"] += sum(int(branch.marks["learn"].sum()) for row in rows for branch in stream.rows[row].branches)
        return spent


class _EpochOfSteps(TrainerCallback):
    """Tells the steps which epoch begins: from the step counter, which a resumed run has right."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called before the first step of an epoch."""
        self.steps.epoch = state.global_step // len(self.steps)


class LogLines(TrainerCallback):
    """Writes every logged line to a file as it comes, so that a run can be watched; a resumed run first puts back what counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: JsonlAppender | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The history up to the checkpoint; lines of steps that a kill undid are gone."""
        if state.is_world_process_zero:
            write_jsonl(self._path, state.log_history)
            self._lines = JsonlAppender(self._path)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One more line."""
        if self._lines is not None:
            self._lines.add(state.log_history[-1:])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the file; `fit` writes it once more as a whole, with the last evaluation."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None


class ProgressLine(TrainerCallback):
    """One progress bar over all steps, with the time left."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._context: AbstractContextManager[Bar] | None = None
        self._bar: Bar | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar; a resumed run starts where it stopped."""
        self._context = bar(self._title, state.max_steps)
        self._bar = self._context.__enter__()
        self._bar.advance(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One step further."""
        if self._bar is not None:
            self._bar.advance()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar, also when training failed."""
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = self._bar = None


def _only(items: list[Step]) -> dict[str, Step]:
    return {"step": items[0]}
