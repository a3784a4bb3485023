"""What a recipe asks for that cannot work here, said before a model or a row is loaded."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence

from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from equipoise.core.errors import UsageError, nearest
from equipoise.models.quantised import require_bitsandbytes
from equipoise.training.settings import TrainSettings

# Which package holds an optimizer: the first pattern that fits its name. What fits none comes with torch or transformers.
_PACKAGES = (
    (r"adamw_torch_[48]bit", "torchao", "torchao"),
    (r"adamw_torch_xla", "torch_xla", "torch_xla"),
    (r"adamw_torch_npu_fused", "torch_npu", "torch_npu"),
    (r"adamw_anyprecision", "torchdistx", "torchdistx"),
    (r"grokadamw", "grokadamw", "grokadamw"),
    (r"stable_adamw", "optimi", "torch-optimi"),
    (r"paged_.*|ademamix.*|lion_.*|rmsprop_bnb.*|adamw_bnb_8bit|adamw_8bit", "bitsandbytes", "equipoise[quant]"),
)
# Families that would not do here what their name says.
_REFUSED = (
    (
        r"galore_.*|apollo_.*",
        "it projects chosen modules only and wants optim_target_modules, which is no setting here; use_peft saves more",
    ),
    (r"lomo|adalomo", "it steps inside the backward pass, while a step here is the sum of several micro-batches"),
    (r"schedule_free_.*", "its weights for evaluation are other ones than those for training, and nothing here switches between them"),
)


def check_recipe(settings: TrainSettings) -> None:
    """Raise UsageError for what cannot work: a name that is not known, an optimizer not right here, settings that exclude each other."""
    check_optimizer(settings.optim)
    schedules = [item.value for item in SchedulerType]
    if settings.lr_scheduler_type not in schedules:
        raise UsageError(
            f"Unknown schedule lr_scheduler_type={settings.lr_scheduler_type!r}.{nearest(settings.lr_scheduler_type, schedules)}"
        )
    if settings.max_steps == 0:
        raise UsageError("max_steps=0 would train nothing; -1 takes as many steps as the epochs have.")
    if settings.save_strategy == "steps" and not settings.save_steps:
        raise UsageError("save_strategy=steps needs save_steps, the steps between two checkpoints.")
    if settings.save_strategy == "no" and settings.load_best_model_at_end:
        raise UsageError("load_best_model_at_end needs checkpoints: leave out save_strategy=no.")
    if settings.load_in_4bit:
        if not settings.use_peft:
            raise UsageError("load_in_4bit holds the base's weights fixed, and nothing else is trained: set use_peft=true.")
        require_bitsandbytes()


def check_optimizer(name: str) -> None:
    """Raise UsageError unless transformers knows this optimizer, its package is installed, and its step is the one taken here."""
    known = [item.value for item in OptimizerNames]
    usable = [item for item in known if _match(_REFUSED, item) is None]
    if name not in known:
        raise UsageError(f"Unknown optimizer optim={name!r}.{nearest(name, usable)}")
    refused = _match(_REFUSED, name)
    if refused is not None:
        raise UsageError(f"optim={name!r} cannot be used: {refused[0]}.")
    package = _match(_PACKAGES, name)
    if package is not None and importlib.util.find_spec(package[0]) is None:
        raise UsageError(f"optim={name!r} needs {package[0]}, which is not installed: pip install '{package[1]}'.")


def _match(table: Sequence[tuple[str, ...]], name: str) -> tuple[str, ...] | None:
    """What stands behind the first pattern that is the whole name."""
    return next((line[1:] for line in table if re.fullmatch(line[0], name)), None)
