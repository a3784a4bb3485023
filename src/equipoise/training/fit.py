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
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from equipoise.core.errors import UsageError
from equipoise.core.files import file_fingerprint, fingerprint, read_json, write_json, write_jsonl
from equipoise.core.prints import PromptPrints
from equipoise.core.progress import say
from equipoise.core.runs import Run
from equipoise.data.plan import Planner
from equipoise.models._elementwise import kernels_for
from equipoise.models.attention import NAME
from equipoise.models.batch import Form
from equipoise.models.load import load_tokenizer
from equipoise.models.logps import unwrapped
from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._load import build, code_fingerprint, from_callable
from equipoise.training._arguments import training_arguments
from equipoise.training._heap import give_back_freed_memory, keep_freed_memory
from equipoise.training._model import (
    autocast_for,
    left_as_found,
    load_policy,
    made_trainable,
    model_identity,
    no_dropout,
    not_trained_on,
)
from equipoise.training._preflight import advice, check_recipe
from equipoise.training._ranks import Ranks
from equipoise.training._references import References, check_references, stored_tolerance
from equipoise.training._rows import Rows, checked_streams, make_streams, named_data, shared_rows
from equipoise.training._streams import Forward, Stream
from equipoise.training.checkpoints import CompleteMark, SaveEvery, newest_complete, remove_checkpoints, step_of, writing
from equipoise.training.estimate import for_this_machine
from equipoise.training.settings import NEUTRAL, TrainSettings
from equipoise.training.sharding import check_accelerate, shard
from equipoise.training.start_check import check_positions, check_scores, choose_form
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
        train_dataset: rows of the first stream: a `datasets.Dataset`, a list of dicts, `Record`s, or `TokenRows`; or the name of a
            file, folder or hub data set, which is then the settings' `data.dataset_name`.
        eval_dataset: dev rows, the same kinds; of a named one every row.
        objective: an `Objective`, or any function `(Scored) -> losses [U]`, in place of the first stream's.
        needs: what such a function reads; pairs with a stored reference unless given.
        callbacks: `transformers.TrainerCallback`s.
        overwrite: start afresh where the output folder holds other work.

    Returns:
        The stage: `folder / "model"` loads with transformers (or PEFT); results hold the last loss, dev figures and cost.

    Raises:
        UsageError, DataError: settings or rows that cannot work. NumericsError: the start check failed, or a loss is not finite.
    """
    check_recipe(settings)
    if isinstance(train_dataset, (str, Path)):
        settings, train_dataset = named_data(settings, train_dataset), None
    objectives = [build(stream.objective) for stream in settings.streams]
    if objective is not None:
        objectives[0] = objective if isinstance(objective, Objective) else from_callable(objective, needs)
    check_references(settings, objectives)
    readouts = {item.needs.readout for item in objectives}
    if len(readouts) > 1:
        raise UsageError("Streams that read scores cannot be mixed with streams that read log-probs.")
    ranks = Ranks.join()
    if tokenizer is None:
        tokenizer = load_tokenizer(settings.model_name_or_path)
    made: list[tuple[list[Rows], list[Rows | None]]] = []

    def inputs() -> dict[str, str]:
        """Rank 0 alone makes the rows and hashes what the stage reads."""
        train, dev = make_streams(settings, objectives, tokenizer, train_dataset, eval_dataset)
        made.append((train, dev))
        names = {"model": model_identity(settings, model)}
        for stream, rows, held_out in zip(settings.streams, train, dev, strict=True):
            names[f"rows {stream.name}"] = rows.fingerprint()
            if held_out is not None:
                names[f"dev {stream.name}"] = held_out.fingerprint()
            if "file" in stream.objective:
                names[f"objective {stream.name}"] = file_fingerprint(str(stream.objective["file"]))
        if objective is not None:
            names["objective"] = f"{objectives[0]!r} {code_fingerprint(objective)}"
        return names

    def work(folder: Path) -> Mapping[str, Any]:
        train, dev = shared_rows(made[0] if made else None, folder / "rows", ranks)
        return _Fit(settings, folder, objectives, tokenizer, train, dev, callbacks, ranks).run(model)

    return ranks.stage(settings.output_dir, "train", settings.resolved(), ranks.first(inputs), work, overwrite, NEUTRAL)


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
        ranks: Ranks,
    ) -> None:
        self.settings, self.folder, self.tokenizer, self.callbacks, self.ranks = settings, folder, tokenizer, callbacks, ranks
        self.given, self.given_dev = train, dev
        self.streams = checked_streams(settings, objectives, train)
        # Dev figures cover all streams or none: a step's loss is their weighted sum.
        self.dev: list[Stream] = []
        held_out = [rows for rows in dev if rows is not None]
        if len(held_out) == len(self.streams):
            self.dev = checked_streams(settings, objectives, held_out)
        self.readout = objectives[0].needs.readout

    def run(self, model: Any) -> Mapping[str, Any]:
        """Load, check, build the reference, train, save. Returns the stage's results."""
        self._write_provenance()
        arguments = training_arguments(self.settings, self.folder, dev=bool(self.dev))
        device = arguments.device
        if device.type == "cpu":
            keep_freed_memory()
        by_accelerate = check_accelerate(device)
        lengths = [stream.lengths for stream in self.streams]
        self.settings = for_this_machine(self.settings, lengths, self.readout, device.type, self.ranks, model)
        torch.manual_seed(self.settings.seed)
        start = load_policy(self.settings, self.readout, device) if model is None else model
        with self.ranks.one_voice():
            for hint in not_trained_on(start):
                say(hint)
        with made_trainable(start, self.settings, self.readout, given=model is not None) as (policy, fresh):
            return self._train(policy, fresh, arguments, by_accelerate)

    def _train(self, policy: Any, fresh: bool, arguments: TrainingArguments, by_accelerate: bool) -> Mapping[str, Any]:
        device = arguments.device
        references = References(self.settings, [*self.streams, *self.dev], self._store_root(), self.ranks)
        references.identify(policy, fresh)
        if self.settings.fsdp and self.ranks.size > 1 and not by_accelerate:
            shard(policy, device)
        else:
            policy.to(device)
        with self.ranks.one_voice():
            forward = self._start_check(policy, device)
        self._provide(references, policy, fresh, forward)
        resume = self.ranks.first(lambda: newest_complete(str(arguments.output_dir)))
        with left_as_found(policy):
            trainer = self._trainer(policy, arguments, forward, references, self._batch_size(resume))
            started = time.monotonic()
            if resume is not None:
                with self.ranks.one_voice():
                    say(f"going on from {resume.name}")
                    references.resume(resume)
            if device.type == "cpu":
                give_back_freed_memory()
            if forward.form != "padded":
                unwrapped(policy).set_attn_implementation(NAME)
            try:
                with nullcontext() if self.settings.dropout else no_dropout(policy):
                    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
                final = trainer.evaluate() if self.dev else {}
            finally:
                for callback in trainer.callback_handler.callbacks:
                    if isinstance(callback, ProgressLine):
                        callback.close()
        self._save(trainer)
        cost = self._cost(policy, trainer, references.cost, time.monotonic() - started)
        return {
            "model": "model",
            "steps": trainer.state.global_step,
            "train_loss": self._train_loss(trainer, resume),
            "dev": {name: value for name, value in final.items() if isinstance(value, float)},
            "form": forward.form,
            "token_budget": self.settings.token_budget,
            "bf16": self.settings.bf16,
            "resumed_from": None if resume is None else resume.name,
            "cost": cost,
        }

    def _train_loss(self, trainer: PreferenceTrainer, resume: Path | None) -> float:
        """The mean loss of all steps; of those before a resume, the ones up to the last log line."""
        first = 0 if resume is None else step_of(resume)
        since = sum(self.ranks.gather(trainer.summed_loss())) / self.ranks.size
        lines = [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line and line["step"] <= first]
        before = sum((step - last) * loss for (last, _), (step, loss) in pairwise([(0, 0.0), *lines]))
        known = lines[-1][0] if lines else 0
        return (before + since) / max(1, known + trainer.state.global_step - first)

    def _write_provenance(self) -> None:
        if self.ranks.rank:
            return  # rank 0 made the rows and knows how they came about
        for hint in advice(self.settings):
            say(hint)
        for stream, rows in zip(self.settings.streams, self.given, strict=True):
            if rows.accounting:
                say(f"data of {stream.name}: {rows.outcome()}")
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
        kernels = kernels_for(device, self.settings.torch_compile)
        every = (row for stream in [*self.streams, *self.dev] for row in stream.lengths)
        check_positions(policy, max(prompt + max(replies) for prompt, replies in every))
        rows = self.streams[0].rows
        if self.readout == "score":
            form: Form = "padded"
            report = check_scores(policy, rows, device, autocast)
        else:
            form, report = choose_form(policy, rows, self.settings.attention, device, autocast, kernels)
        ends = {self.tokenizer.eos_token_id, *_ends(policy)} - {None}
        learned = [(branch.ids[-1], branch.marks["learn"][-1]) for stream in self.streams for row in stream.rows for branch in row.branches]
        report["end_supervised"] = sum(bool(mark) and int(last) in ends for last, mark in learned) / max(1, len(learned))
        if report["end_supervised"] < 0.5 and self.readout == "logps":
            share = f"{report['end_supervised']:.0%}"
            say(f"start check: only {share} of the replies end in a learned end-of-sequence token; the model may not learn to stop")
        self.report = report
        return Forward(form, device, self.tokenizer.pad_token_id or 0, autocast, kernels=kernels)

    def _store_root(self) -> Path:
        return (
            Path(self.settings.reference_store or os.environ.get("EQUIPOISE_CACHE") or Path.home() / ".cache" / "equipoise") / "reference"
        )

    def _provide(self, references: References, policy: Any, fresh: bool, forward: Forward) -> None:
        allowed = stored_tolerance(self.report)
        references.provide(policy, fresh, forward, allowed)
        off = references.check_start(policy, self.streams[0], forward, allowed)
        if off is not None:
            self.report["start_log_ratio"] = off
        if not self.ranks.rank:
            write_json(self.folder / "start_check.json", self.report)

    def _batch_size(self, resume: Path | None) -> int:
        """Units of an optimizer step over all processes: as the run began, also where it goes on with more or fewer of them."""
        path = self.folder / "batch.json"

        def settle() -> int:
            if resume is not None and path.is_file():
                return int(read_json(path)["batch_size"])
            size = self.settings.batch_size(self.ranks.size)
            write_json(path, {"batch_size": size, "processes": self.ranks.size})
            return size

        return self.ranks.first(settle)

    def _trainer(
        self, policy: Any, arguments: TrainingArguments, forward: Forward, references: References, batch_size: int
    ) -> PreferenceTrainer:
        planner = self._planner(self.streams, forward, batch_size)
        self.ranks.agree("the plan of the steps", plan_fingerprint(planner))
        dev_planner = self._planner(self.dev, forward, batch_size) if self.dev else None
        arguments.warmup_steps = math.ceil(self.settings.total_steps(planner.steps_per_epoch) * self.settings.warmup_ratio)
        trainer = PreferenceTrainer(
            model=policy,
            args=arguments,
            streams=self.streams,
            dev=self.dev,
            planner=planner,
            dev_planner=dev_planner,
            forward=forward,
            fsdp=self.settings.fsdp,
            callbacks=[
                *references.callbacks(),
                *([SaveEvery(self.settings.save_steps)] if self.settings.save_steps and self.settings.save_strategy != "no" else []),
                CompleteMark(),
                LogLines(self.folder / "log.jsonl"),
                *([] if self.ranks.rank else [ProgressLine(self.settings.streams[0].objective.get("name", "training"))]),
                *self.callbacks,
            ],
            processing_class=self.tokenizer,
        )
        for kind in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(kind)
        return trainer

    def _planner(self, streams: Sequence[Stream], forward: Forward, batch_size: int) -> Planner:
        assert isinstance(self.settings.token_budget, int), "decided when the run began"
        return Planner(
            tuple(stream.lengths for stream in streams),
            batch_size=batch_size,
            token_budget=self.settings.token_budget,
            seed=self.settings.seed,
            shuffle=self.settings.shuffle,
            shared=forward.form == "packed",
            padded=forward.form == "padded",
            world_size=self.ranks.size,
        )

    def _save(self, trainer: PreferenceTrainer) -> None:
        """The model folder appears whole or not at all; checkpoints have served and go."""
        part, ready = self.folder / "model.part", self.folder / "model"
        with writing(part):
            trainer.save_model(str(part))
        if trainer.is_world_process_zero():
            (part / "training_args.bin").unlink(missing_ok=True)  # a pickle; settings.json says the same
            shutil.rmtree(ready, ignore_errors=True)
            part.rename(ready)
            write_jsonl(self.folder / "log.jsonl", trainer.state.log_history)
            remove_checkpoints(self.folder / "checkpoints")
            shutil.rmtree(self.folder / "rows", ignore_errors=True)

    def _cost(self, policy: Any, trainer: PreferenceTrainer, reference: Mapping[str, float], seconds: float) -> dict[str, float]:
        """What the run spent; `seconds` are those of the call that finished it (see `resumed_from`).

        FLOPs are counted as 2 a weight and token forward, 2 backward for activations, 2 more where weights have gradients.
        """
        total = unwrapped(policy).num_parameters()  # 4-bit weights lie two to a byte, and are counted as two
        trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
        spent = trainer.spent()
        cost = {
            **spent,
            "flops": float(spent["unique_tokens"] * (4 * total + 2 * trained) + 2 * total * reference["tokens"]),
            "seconds": round(seconds, 3),
            "reference_seconds": reference["seconds"],
            "reference_tokens": reference["tokens"],
        }
        if not self.ranks.rank:
            write_json(self.folder / "cost.json", cost)
        return cost


def _ends(model: Any) -> set[int | None]:
    """End-of-sequence ids the model's generation settings name."""
    end = getattr(getattr(unwrapped(model), "generation_config", None), "eos_token_id", None)
    return set(end) if isinstance(end, (list, tuple)) else {end}


def plan_fingerprint(planner: Planner) -> str:
    """A fingerprint of the first, the middle and the last step of the first epoch: other lengths, sizes or seeds show in them."""
    last = planner.steps_per_epoch - 1
    return fingerprint([repr(planner.step(number)) for number in sorted({0, last // 2, last})])
