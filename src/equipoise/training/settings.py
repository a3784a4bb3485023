"""Settings of a training run. Hugging Face's names where it has a name for the thing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from equipoise.core.errors import UsageError
from equipoise.core.settings import Settings
from equipoise.data.settings import DataSettings, TokeniseSettings

NEUTRAL = (
    "token_budget",
    "gradient_checkpointing",
    "torch_compile",
    "logging_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "report_to",
    "reference_store",
)
"""Settings that change how a run computes and what it writes on the way, not what is trained: an interrupted run may go on with others."""


class StreamSettings(Settings):
    """One stream of rows and the objective that reads it. Each step takes its share from every stream."""

    name: str = Field(default="main", description="shown in logs")
    data: DataSettings | tuple[DataSettings, ...] | None = Field(
        default=None, description="where the rows come from, one source or several mixed; None: given in memory"
    )
    objective: dict[str, Any] = Field(default={"name": "dpo"}, description="method and hyper-parameters; `file`: of your own")
    weight: float = Field(default=1.0, ge=0.0, description="weight of this stream's mean loss in the step's loss")

    @field_validator("objective", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class ReferenceMixture(Settings):
    """Several reference models as one (MRPO): `reference_model`, or the start weights, comes first and these follow it."""

    models: tuple[str, ...] = Field(min_length=1, description="further reference models, of the same tokenizer")
    weights: tuple[float, ...] | Literal["adaptive"] = Field(
        default="adaptive", description="one per reference, the first one's too, 1 in all; adaptive: by how far each tells the pair apart"
    )
    clip: float | None = Field(
        default=0.1, gt=0, lt=1, description="share of the first one's log-prob by which the others' may differ; None: any"
    )

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.weights != "adaptive":
            if len(self.weights) != len(self.models) + 1:
                raise UsageError(f"reference_mixture.weights: {len(self.weights)} weights for {len(self.models) + 1} references.")
            if min(self.weights) < 0 or abs(sum(self.weights) - 1) > 1e-6:
                raise UsageError(f"reference_mixture.weights: {list(self.weights)} must not be negative, and must add up to 1.")
        return self


class TrainSettings(Settings):
    """One training stage: a start model, streams of data with objectives, and the recipe."""

    HINTS: ClassVar[Mapping[str, str]] = {
        "beta": "Settings of a loss stand with it: streams.0.objective.beta.",
        "loss_type": "A loss is a method by its name: streams.0.objective.name (`equipoise methods` lists them).",
        "torch_dtype": "Did you mean 'dtype'?",
        "resume_from_checkpoint": "Runs resume by themselves: give the same command again.",
        "padding_free": "Rows are packed without padding wherever the model family allows it, and replies share their prompt.",
        "precompute_ref_log_probs": "Log-probs of the reference are computed beforehand and kept, unless a loss needs more of it.",
        "use_liger_kernel": "The output layer never makes a full table of logits; nothing has to be switched on.",
        "max_prompt_length": "Prompt and reply share tokenise.max_length; the oldest turns of a prompt give way.",
        "deepspeed": "DeepSpeed is not supported; fsdp=true cuts weights and optimizer over the processes.",
        "push_to_hub": "Nothing is uploaded; `hf upload` takes the model folder of a run.",
    }

    model_name_or_path: str = Field(description="asset name, local folder (also a PEFT adapter's), or hub name")
    output_dir: str = Field(default="runs/train", description="stage folder")
    streams: tuple[StreamSettings, ...] = Field(default=(StreamSettings(),), min_length=1, description="data and objectives")
    tokenise: TokeniseSettings = Field(default=TokeniseSettings(), description="how records become tokens")
    reference_model: str | None = Field(default=None, description="reference of the preference losses; None: the start weights")
    reference_mixture: ReferenceMixture | None = Field(default=None, description="further reference models, mixed with the reference")
    sync_ref_model: bool = Field(default=False, description="the reference follows the policy (TR-DPO): a copy of it in memory")
    ref_model_mixup_alpha: float = Field(default=0.6, gt=0, le=1, description="share of the policy mixed in; 1 replaces the reference")
    ref_model_sync_steps: int = Field(default=512, ge=1, description="optimizer steps between two mixings; 1: an exponential average")
    reference_store: str | None = Field(default=None, description="folder of the reference store; None: the user's cache folder")

    learning_rate: float = Field(default=1e-6, gt=0, description="peak learning rate")
    lr_scheduler_type: str = Field(default="linear", description="a transformers schedule")
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1, description="share of the steps spent warming up")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay")
    max_grad_norm: float = Field(default=1.0, ge=0, description="clip the gradient's norm; 0: never")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's first moment decay")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's second moment decay")
    optim: str = Field(default="adamw_torch_fused", description="a transformers optimizer name; adamw_bnb_8bit keeps its state in 8 bits")
    num_train_epochs: float = Field(default=1.0, gt=0, description="passes over the first stream")
    max_steps: int = Field(default=-1, ge=-1, description="optimizer steps; -1: as many as the epochs take")
    per_device_train_batch_size: int = Field(default=8, ge=1, description="units (pairs, rows) per device and accumulation step")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="multiplies the batch, as in transformers; never cuts memory")
    token_budget: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        default=None,
        description="tokens of a micro-batch; cuts the batch, never changes the recipe. None: 512 on a CPU (more is no faster "
        "there), 8192 on a GPU; auto: the largest that fits in the memory at hand and is of use",
    )
    shuffle: bool = Field(default=True, description="a fresh order each epoch; off: the data's order")

    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="dtype of the weights")
    bf16: bool = Field(
        default=False, description="bfloat16 autocast over float32 weights; left out, saying so, on a CPU that multiplies it slower"
    )
    use_peft: bool = Field(default=False, description="train LoRA instead of all weights")
    load_in_4bit: bool = Field(default=False, description="hold the base in 4 bits under LoRA (QLoRA); a reference_model as well")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(default="nf4", description="the 4-bit number format")
    bnb_4bit_use_double_quant: bool = Field(default=False, description="quantise the scales of the 4-bit weights too")
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="dtype of the products with 4-bit weights; None: bfloat16 with bf16, else that of the other weights"
    )
    lora_r: int = Field(default=16, ge=1, description="LoRA rank")
    lora_alpha: int = Field(default=32, ge=1, description="LoRA scale numerator")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="LoRA dropout")
    lora_target_modules: tuple[str, ...] | Literal["all-linear"] = Field(default="all-linear", description="modules that get LoRA")
    trainable: str | None = Field(default=None, description="regular expression: train only weights whose name matches")
    fsdp: bool = Field(default=False, description="cut weights, gradients and optimizer state over the processes (FSDP2)")
    gradient_checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
    torch_compile: bool | None = Field(
        default=None,
        description="norms, gates, rotations and the head's softmax as compiled kernels (needs Triton on a GPU, a C++ compiler on a "
        "CPU), never the whole model. None: on a GPU where it can be had",
    )
    attention: Literal["auto", "packed", "separate", "padded"] = Field(
        default="auto", description="auto: shared prompts where the start check agrees, else falls back; the others force one way"
    )
    dropout: bool = Field(default=False, description="keep the model's own dropout on (LoRA's is always its own)")

    eval_on_dev: bool = Field(default=True, description="where the data names its train part, evaluate on its dev part while training")
    eval_steps: int = Field(default=0, ge=0, description="steps between dev evaluations; 0: at the end of each epoch")
    logging_steps: int = Field(default=1, ge=1, description="steps between log lines")
    save_strategy: Literal["epoch", "steps", "no"] = Field(
        default="epoch",
        description="when to write checkpoints. epoch: at the end of each, and every save_steps; no: an interrupted run starts anew",
    )
    save_steps: int = Field(default=500, ge=0, description="steps between checkpoints; 0: none but an epoch's")
    save_total_limit: int = Field(default=2, ge=2, description="checkpoints kept")
    load_best_model_at_end: bool = Field(
        default=False, description="end with the weights of the lowest dev loss (dev only, never test); saves at every dev evaluation"
    )
    report_to: str = Field(default="none", description="none, tensorboard, wandb, trackio")
    seed: int = Field(default=0, description="data order, LoRA initialisation, dropout")

    @field_validator("save_strategy", mode="before")
    @classmethod
    def _no(cls, value: Any) -> Any:
        """YAML reads a bare `no` as false."""
        return "no" if value is False else value

    def batch_size(self, processes: int = 1) -> int:
        """Units of an optimizer step over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * processes

    def total_steps(self, an_epoch: int) -> int:
        """Optimizer steps of the run, of a first stream that takes `an_epoch` of them."""
        return self.max_steps if self.max_steps > 0 else math.ceil(an_epoch * self.num_train_epochs)

    def total_units(self, rows: int) -> float:
        """Units a stream gives in the whole run on one process, where the first stream has so many rows."""
        return float(self.max_steps * self.batch_size()) if self.max_steps > 0 else rows * self.num_train_epochs
