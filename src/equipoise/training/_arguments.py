"""Our settings in the words of `transformers.TrainingArguments`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from equipoise.core.errors import UsageError
from equipoise.training._ranks import on_cpu
from equipoise.training.settings import TrainSettings


def training_arguments(settings: TrainSettings, folder: Path, dev: bool) -> TrainingArguments:
    """The library's arguments for a run in `folder`; dev: whether there are dev rows to evaluate while training."""
    best = settings.load_best_model_at_end
    if best and not dev:
        raise UsageError(
            "load_best_model_at_end: there are no dev rows to choose by. Give every stream a part (data.part=train) and leave eval_on_dev "
            "on, or hand over eval_dataset."
        )
    evaluates = ("steps" if settings.eval_steps else "epoch") if dev else "no"
    # transformers is renaming it, and warns whenever the old name is spoken.
    recompute = "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
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
        eval_strategy=evaluates,
        eval_steps=settings.eval_steps or None,
        save_strategy=evaluates if best else settings.save_strategy,
        save_steps=(settings.eval_steps if best else settings.save_steps) or 1,
        save_total_limit=settings.save_total_limit,
        load_best_model_at_end=best,
        metric_for_best_model="loss",
        greater_is_better=False,
        report_to=settings.report_to,
        seed=settings.seed,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        use_cpu=on_cpu(),
        disable_tqdm=True,
        **({recompute: True, f"{recompute}_kwargs": {"use_reentrant": False}} if settings.gradient_checkpointing else {}),
    )
    if arguments.device.type == "cpu":
        # Among several processes accelerate numbers the CPU (cpu:0). torch restores nothing to a numbered one, and transformers
        # 5.17 asks it to when a run is resumed.
        vars(arguments)["_setup_devices"] = torch.device("cpu")
    return arguments
