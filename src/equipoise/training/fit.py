"""The one door to training: `fit(settings) -> Run`.

From Python, with objects in memory:

    run = fit(TrainSettings(model_name_or_path="smollm2-135m-instruct", output_dir="runs/dpo"), train_dataset=pairs)
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from equipoise.core.errors import NumericsError, UsageError
from equipoise.core.files import write_json, write_jsonl
from equipoise.core.prints import PromptPrints
from equipoise.core.progress import bar, say
from equipoise.core.runs import Run, run_stage
from equipoise.data.plan import Planner
from equipoise.models.attention import NAME
from equipoise.models.batch import Form
from equipoise.models.load import load_tokenizer
from equipoise.models.logps import unwrapped
from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._load import build, from_callable
from equipoise.training._heap import keep_freed_memory
from equipoise.training._model import autocast_for, fill_store, load_policy, make_trainable, model_identity, stored_tolerance
from equipoise.training._rows import Rows, checked_streams, make_streams
from equipoise.training._streams import Forward, Stream
from equipoise.training.checkpoints import CompleteMark, newest_complete
from equipoise.training.settings import TrainSettings
from equipoise.training.start_check import check_scores, choose_form
from equipoise.training.trainer import LogLines, PreferenceTrainer, ProgressLine

__all__ = ["Needs", "TrainSettings", "fit"]


def fit(
    settings: TrainSettings,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    objective: Objective | Callable[[Scored], Losses | torch.Tensor] | None = None,
    needs: Needs | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    overwrite: bool = False,
) -> Run:
    """Train as the settings say, or go on where an interrupted call stopped.

    Args:
        settings: the whole recipe; everything below may stay None.
        model: a loaded model to train (in place of `model_name_or_path`).
        tokenizer: its tokenizer.
        train_dataset: rows of the first stream: a `datasets.Dataset`, a list of dicts, `Record`s, or `TokenRows`.
        eval_dataset: dev rows, the same kinds.
        objective: an `Objective`, or any function `(Scored) -> losses [U]`, in place of the first stream's.
        needs: what such a function reads; pairs with a stored reference unless given.
        callbacks: `transformers.TrainerCallback`s.
        overwrite: start afresh where the output folder holds other work.

    Returns:
        The stage: `folder / "model"` loads with transformers (or PEFT); results hold the last loss, dev figures and cost.

    Raises:
        UsageError, DataError: settings or rows that cannot work. NumericsError: the start check failed, or a loss is not finite.
    """
    objectives = [build(stream.objective) for stream in settings.streams]
    if objective is not None:
        objectives[0] = objective if isinstance(objective, Objective) else from_callable(objective, needs)
    readouts = {item.needs.readout for item in objectives}
    if len(readouts) > 1:
        raise UsageError("Streams that read scores cannot be mixed with streams that read log-probs.")
    if tokenizer is None:
        tokenizer = load_tokenizer(settings.model_name_or_path)
    train, dev = make_streams(settings, objectives, tokenizer, train_dataset, eval_dataset)
    inputs = {"model": model_identity(settings, model)}
    for stream, rows, held_out in zip(settings.streams, train, dev, strict=True):
        inputs[f"rows {stream.name}"] = rows.fingerprint()
        if held_out is not None:
            inputs[f"dev {stream.name}"] = held_out.fingerprint()
    if objective is not None:
        kind = type(objectives[0])
        inputs["objective"] = f"{kind.__module__}.{kind.__qualname__} {getattr(objective, '__qualname__', '')} {objectives[0]!r}"

    def work(folder: Path) -> Mapping[str, Any]:
        return _Fit(settings, folder, objectives, tokenizer, train, dev, callbacks).run(model)

    return run_stage(settings.output_dir, "train", settings.resolved(), inputs, work, overwrite)


class _Fit:
    """One run of `fit`, in the order things happen."""

    def __init__(
        self,
        settings: TrainSettings,
        folder: Path,
        objectives: Sequence[Objective],
        tokenizer: Any,
        train: Sequence[Rows],
        dev: Sequence[Rows | None],
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self.settings, self.folder, self.tokenizer, self.callbacks = settings, folder, tokenizer, callbacks
        self.given, self.given_dev = train, dev
        self.streams = checked_streams(settings, objectives, train)
        # Dev figures are told for all streams or for none: a step's loss is their weighted sum.
        self.dev: list[Stream] = []
        held_out = [rows for rows in dev if rows is not None]
        if len(held_out) == len(self.streams):
            self.dev = checked_streams(settings, objectives, held_out)
        self.readout = objectives[0].needs.readout
        self.reference_cost = {"tokens": 0.0, "seconds": 0.0}

    def run(self, model: Any) -> Mapping[str, Any]:
        """Load, check, build the reference, train, save. Returns the stage's results."""
        self._write_provenance()
        arguments = self._arguments()
        device = arguments.device
        if device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(self.settings.seed)
        policy = load_policy(self.settings, self.readout) if model is None else model
        policy, fresh = make_trainable(policy.to(device), self.settings, self.readout)
        forward = self._start_check(policy, device)
        if fresh:
            forward.live_reference = policy.disable_adapter
        self._references(policy, fresh, forward, arguments)
        trainer = self._trainer(policy, arguments, forward)
        started = time.monotonic()
        resume = newest_complete(str(arguments.output_dir))
        if resume is not None:
            say(f"going on from {resume.name}")
        native = unwrapped(policy).config._attn_implementation
        if forward.form != "padded":
            unwrapped(policy).set_attn_implementation(NAME)
        try:
            outcome = trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
            final = trainer.evaluate() if self.dev else {}
        finally:
            if forward.form != "padded":
                unwrapped(policy).set_attn_implementation(native)
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, ProgressLine):
                    callback.close()
        self._save(trainer)
        cost = self._cost(policy, trainer, time.monotonic() - started)
        return {
            "model": "model",
            "steps": trainer.state.global_step,
            "train_loss": outcome.training_loss,
            "dev": {name: value for name, value in final.items() if isinstance(value, float)},
            "form": forward.form,
            "resumed_from": None if resume is None else resume.name,
            "cost": cost,
        }

    def _write_provenance(self) -> None:
        write_json(
            self.folder / "accounting.json",
            {
                stream.name: {"train": rows.accounting, "dev": held_out.accounting if held_out else []}
                for stream, rows, held_out in zip(self.settings.streams, self.given, self.given_dev, strict=True)
            },
        )
        prints = [rows.prints for rows in [*self.given, *self.given_dev] if rows is not None]
        if all(item is not None for item in prints):
            PromptPrints.merge([item for item in prints if item is not None]).save(self.folder / "trained_on.npz")

    def _start_check(self, policy: Any, device: torch.device) -> Forward:
        autocast = autocast_for(self.settings, device)
        rows = self.streams[0].rows
        if self.readout == "score":
            form: Form = "padded"
            report = check_scores(policy, rows, device, autocast)
        else:
            form, report = choose_form(policy, rows, self.settings.attention, device, autocast)
        ends = {self.tokenizer.eos_token_id, *_ends(policy)} - {None}
        learned = [(branch.ids[-1], branch.marks["learn"][-1]) for stream in self.streams for row in stream.rows for branch in row.branches]
        report["end_supervised"] = sum(bool(mark) and int(last) in ends for last, mark in learned) / max(1, len(learned))
        if report["end_supervised"] < 0.5 and self.readout == "logps":
            share = f"{report['end_supervised']:.0%}"
            say(f"start check: only {share} of the replies end in a learned end-of-sequence token; the model may not learn to stop")
        self.report = report
        return Forward(form, device, self.tokenizer.pad_token_id or 0, autocast)

    def _references(self, policy: Any, fresh: bool, forward: Forward, arguments: TrainingArguments) -> None:
        root = (
            Path(self.settings.reference_store or os.environ.get("EQUIPOISE_CACHE") or Path.home() / ".cache" / "equipoise") / "reference"
        )
        for stream in [*self.streams, *self.dev]:
            if stream.objective.needs.reference != "stored":
                continue
            stream.store, cost = fill_store(
                self.settings,
                policy,
                fresh,
                stream.rows,
                forward.form,
                stored_tolerance(self.report),
                root,
                forward.device,
                arguments.process_index,
                arguments.world_size,
            )
            for name in ("tokens", "seconds"):
                self.reference_cost[name] += cost[name]
        if self.settings.reference_model is None and self.streams[0].store is not None:
            self._check_start_is_reference(policy, forward)
        write_json(self.folder / "start_check.json", self.report)

    def _check_start_is_reference(self, policy: Any, forward: Forward) -> None:
        """Reference = start weights: the log-ratios of a few rows must be 0, so that a DPO run begins at ln 2."""
        training = policy.training
        policy.eval()
        with torch.no_grad(), forward.attention(unwrapped(policy)):
            scored, _ = forward.scored(policy, self.streams[0], [0])
        policy.train(training)
        assert scored.policy is not None
        assert scored.reference is not None
        # The store was filled from other batches, so low precision leaves the same distance as the start check allowed.
        off = float(((scored.policy - scored.reference) * scored.mask).abs().sum() / scored.mask.sum())
        allowed = stored_tolerance(self.report)
        self.report["start_log_ratio"] = off
        if not off <= allowed:
            raise NumericsError(
                f"The policy starts {off:.2g} nats a token away from its reference, which are the same weights (allowed {allowed:.2g})."
            )

    def _trainer(self, policy: Any, arguments: TrainingArguments, forward: Forward) -> PreferenceTrainer:
        planner = self._planner(self.streams, forward, arguments)
        dev_planner = self._planner(self.dev, forward, arguments) if self.dev else None
        total = (
            self.settings.max_steps if self.settings.max_steps > 0 else math.ceil(planner.steps_per_epoch * self.settings.num_train_epochs)
        )
        arguments.warmup_steps = math.ceil(total * self.settings.warmup_ratio)
        trainer = PreferenceTrainer(
            model=policy,
            args=arguments,
            streams=self.streams,
            dev=self.dev,
            planner=planner,
            dev_planner=dev_planner,
            forward=forward,
            callbacks=[
                CompleteMark(),
                LogLines(self.folder / "log.jsonl"),
                ProgressLine(bar, self.settings.streams[0].objective.get("name", "training")),
                *self.callbacks,
            ],
            processing_class=self.tokenizer,
        )
        for kind in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(kind)
        return trainer

    def _planner(self, streams: Sequence[Stream], forward: Forward, arguments: TrainingArguments) -> Planner:
        batch = self.settings.per_device_train_batch_size * self.settings.gradient_accumulation_steps * arguments.world_size
        return Planner(
            tuple(stream.lengths for stream in streams),
            batch_size=batch,
            token_budget=self.settings.token_budget,
            seed=self.settings.seed,
            shuffle=self.settings.shuffle,
            shared=forward.form == "packed",
            padded=forward.form == "padded",
            world_size=arguments.world_size,
        )

    def _arguments(self) -> TrainingArguments:
        settings = self.settings
        # Named only when wanted: transformers is renaming it, and warns whenever the old name is spoken.
        recompute: dict[str, Any] = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        return TrainingArguments(
            output_dir=str(self.folder / "checkpoints"),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            num_train_epochs=settings.num_train_epochs,
            max_steps=settings.max_steps,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.lr_scheduler_type,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            optim=settings.optim,
            logging_steps=settings.logging_steps,
            logging_nan_inf_filter=False,
            eval_strategy=("steps" if settings.eval_steps else "epoch") if self.dev else "no",
            eval_steps=settings.eval_steps or None,
            save_strategy="steps" if settings.save_steps else settings.save_strategy,
            save_steps=settings.save_steps or 500,
            save_total_limit=settings.save_total_limit,
            load_best_model_at_end=settings.load_best_model_at_end and bool(self.dev),
            metric_for_best_model="loss",
            greater_is_better=False,
            report_to=settings.report_to,
            seed=settings.seed,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            disable_tqdm=True,
            **(recompute if settings.gradient_checkpointing else {}),
        )

    def _save(self, trainer: PreferenceTrainer) -> None:
        """The model folder appears whole or not at all; checkpoints have served and go."""
        part, ready = self.folder / "model.part", self.folder / "model"
        trainer.save_model(str(part))
        if trainer.is_world_process_zero():
            (part / "training_args.bin").unlink(missing_ok=True)  # a pickle; settings.json says the same
            shutil.rmtree(ready, ignore_errors=True)
            part.rename(ready)
            write_jsonl(self.folder / "log.jsonl", trainer.state.log_history)
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def _cost(self, policy: Any, trainer: PreferenceTrainer, seconds: float) -> dict[str, float]:
        """What the run spent; `seconds` are those of the call that finished it (see `resumed_from`).

        FLOPs are counted as 2 a weight and token forward, 2 backward for activations, 2 more where weights have gradients.
        """
        total = sum(parameter.numel() for parameter in policy.parameters())
        trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
        spent = trainer.spent()
        cost = {
            **spent,
            "flops": float(spent["unique_tokens"] * (4 * total + 2 * trained) + 2 * total * self.reference_cost["tokens"]),
            "seconds": round(seconds, 3),
            "reference_seconds": self.reference_cost["seconds"],
            "reference_tokens": self.reference_cost["tokens"],
        }
        write_json(self.folder / "cost.json", cost)
        return cost


def _ends(model: Any) -> set[int | None]:
    """End-of-sequence ids the model's generation settings name."""
    end = getattr(getattr(unwrapped(model), "generation_config", None), "eos_token_id", None)
    return set(end) if isinstance(end, (list, tuple)) else {end}
