"""Peak memory and time of a training run, before it starts and without its weights.

The micro-batches of the plan are run on shapes alone (`_simulate`), so activations, head, temporaries, gradients and
FLOPs are the engine's own. What such a run cannot see stands here as constants with names, each with where it was
measured: the libraries' own memory, what the allocator holds beyond what lives, and how close to the measured speed of
this machine its matrix products and its other operations come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Any

from equipoise.core.errors import UsageError
from equipoise.core.progress import say
from equipoise.data.plan import MicroBatch, Planner
from equipoise.models.batch import Form
from equipoise.models.logps import unwrapped
from equipoise.training._ranks import Ranks
from equipoise.training._simulate import Footprint, Lengths, Simulation
from equipoise.training.machine import LOAD_SECONDS, Machine, bfloat16_pays, gigabytes, memory_at_hand
from equipoise.training.settings import TrainSettings

LIBRARY_BYTES = {"cpu": 950_000_000, "cuda": 0}
"""Resident beside what lives: 0.55 GB after importing torch, transformers, PEFT and the Trainer, and what the kept heap holds on to after
loading, start check and reference pass (`benchmarks/plan_error.py`). A GPU's context is taken before its free memory is read."""
HOLES = {"cpu": 3, "cuda": 0}
"""Holes of [tokens, hidden] that every layer leaves in glibc's heap (docs/decisions/0010); a newer one leaves fewer."""
ALLOCATOR_SHARE = {"cpu": 1.0, "cuda": 1.05}
"""Bytes held for a live byte of a step: fragments the allocator cannot give back."""
MATRIX_SHARE = {"cpu": 0.7, "cuda": 0.8}
"""Share of the speed of a large matrix product that the products of a step reach. The CPU's are fitted to `benchmarks/plan_error.py`
(full-512, full-autocast-1024, lora-1024), a GPU's to nothing yet."""
MOVE_SHARE = {"cpu": 0.7, "cuda": 1.0}
"""Share of the memory bandwidth that all other operations of a step reach; measured as above."""
BUDGET_STEP = 128
DEFAULT_BUDGET = {"cpu": 512, "cuda": 8192}
BUDGET_CAP = {"cpu": 1024, "cuda": 32768}
"""Where a larger micro-batch brings no more speed: matrix products are at their peak."""
STEPS_LOOKED_AT = 64
PROBE_TOKENS = 2048

# Bytes of optimizer state for a trained weight, by the start of transformers' name; None stands for the weight's own dtype.
_STATES: tuple[tuple[str, int, float | None], ...] = (
    ("adamw_bnb_8bit", 2, 1.0),
    ("adamw_8bit", 2, 1.0),
    ("paged_adamw_8bit", 2, 1.0),
    ("ademamix_8bit", 3, 1.0),
    ("lion_8bit", 1, 1.0),
    ("paged_lion_8bit", 1, 1.0),
    ("rmsprop_bnb_8bit", 1, 1.0),
    ("adafactor", 0, None),
    ("sgd", 0, None),
    ("lion", 1, None),
    ("paged_lion", 1, None),
    ("adagrad", 1, None),
    ("rmsprop", 1, None),
    ("ademamix", 3, None),
)
SMALL_TENSOR = 4096
"""bitsandbytes keeps the state of tensors smaller than this in float32."""


@dataclass(frozen=True)
class Memory:
    """Peak bytes of a run. The parts are those of the training step; `moments` names every moment that could be the worst.

    library: torch and the others themselves, and what the heap cannot use. weights: the policy's, and those of a reference
    that is in memory beside it. activations: what the largest micro-batch's forward pass keeps, its logits too. working: what
    comes on top in its backward pass (gradients of activations and logits).
    """

    library: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    moments: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of the run."""
        return max(self.moments.values())

    @property
    def moment(self) -> str:
        """Which moment that is."""
        return max(self.moments, key=lambda name: self.moments[name])

    def as_json(self) -> dict[str, Any]:
        """Plain data, bytes."""
        parts = {name: getattr(self, name) for name in ("library", "weights", "gradients", "optimizer", "activations", "working")}
        return {"peak": self.peak, "moment": self.moment, "parts": parts, "moments": self.moments}


@dataclass(frozen=True)
class Estimate:
    """What a run will take. reference_seconds, train_seconds: of those passes; seconds: in all, loading included."""

    token_budget: int
    form: Form
    memory: Memory
    flops: float
    reference_seconds: float
    train_seconds: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole stage."""
        return LOAD_SECONDS + self.reference_seconds + self.train_seconds

    def as_json(self) -> dict[str, Any]:
        """Plain data: bytes, seconds, FLOPs."""
        return {
            "token_budget": self.token_budget,
            "form": self.form,
            "memory": self.memory.as_json(),
            "flops": self.flops,
            "reference_seconds": round(self.reference_seconds, 2),
            "train_seconds": round(self.train_seconds, 2),
            "seconds": round(self.seconds, 1),
        }


@dataclass
class Estimator:
    """Estimates runs of one recipe on one machine.

    settings: the recipe. streams: (P, (T1..TK)) of every row of every stream. readout, references: what the objectives
    read: log-probs or scores; for each stream none, stored or live. config: of a model in memory; None: read by name.
    Raises UsageError for a model that cannot be run on shapes.
    """

    settings: TrainSettings
    streams: Sequence[Sequence[Lengths]]
    machine: Machine
    readout: str = "logps"
    references: Sequence[str] = ("stored",)
    world_size: int = 1
    config: Any = None
    _seen: dict[Any, Footprint] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def simulation(self) -> Simulation:
        """The model on shapes."""
        return Simulation(self.settings, self.readout, self.machine.device, self.config, exchanged=self.world_size > 1)

    @cached_property
    def form(self) -> Form:
        """The layout the rows are expected to have: the start check may still fall back to a simpler one."""
        return self.simulation.form_of([row for rows in self.streams for row in rows[:1]])

    def budget(self) -> int:
        """The token budget: the one set, or (`auto`) the largest that fits and is of use, at least the longest row."""
        if self.settings.token_budget != "auto":
            return self.settings.token_budget or DEFAULT_BUDGET[self.machine.device]
        cap = max(BUDGET_CAP[self.machine.device], self.longest)
        if not self.machine.memory:
            return cap
        low, high = self._ends()
        fitting = [
            budget
            for budget in range(BUDGET_STEP, cap + 1, BUDGET_STEP)
            if budget > self.longest and self._memory(_between(low, high, budget)).peak <= self.machine.memory
        ]
        return max(fitting, default=self.longest)

    @cached_property
    def longest(self) -> int:
        """Positions of the longest row."""
        return max(self._positions([row]) for rows in self.streams for row in rows)

    def check(self) -> None:
        """Raise UsageError where even the longest row by itself does not fit, saying by how much and what would help."""
        memory = self._memory(self._ends()[0])
        if self.machine.memory and memory.peak > self.machine.memory:
            raise UsageError(does_not_fit(memory, self.machine, self.settings))

    def estimate(self, quick: bool = False) -> Estimate:
        """Memory and time of the whole run. quick: from the largest micro-batch alone, in proportion to tokens."""
        budget = self.budget()
        planner = self._planner(budget)
        epoch, settings = planner.steps_per_epoch, self.settings
        total = settings.total_steps(epoch)
        looked = [planner.step(number) for number in range(min(total, epoch, STEPS_LOOKED_AT))]
        micro = [cut for step in looked for cut in step.ranks[0]]
        worst, least = max(micro, key=self._size), min(micro, key=self._size)
        several = any(len(step.ranks[0]) > 1 for step in looked)
        large = self._run(self._rows(worst), several)
        small = large if quick or self._tokens(least) > 0.7 * large.tokens else self._run(self._rows(least), several)
        scale = total / len(looked)
        parts = [_between(small, large, self._tokens(cut)) for cut in micro]
        flops = scale * sum(part.flops for part in parts)
        train = scale * sum(self._seconds(part.flops, part.moved) for part in parts) + total * self._optimizer_seconds()
        reference = self._reference(large, budget, scale * sum(part.tokens for part in parts))
        return Estimate(budget, self.form, self._memory(large), flops + reference[0], reference[1], train)

    # ---- memory

    def _memory(self, step: Footprint) -> Memory:
        library = LIBRARY_BYTES[self.machine.device] + self._holes(step.tokens)
        share = ALLOCATOR_SHARE[self.machine.device]
        parameters = self.simulation.parameters
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        weights, gradients = _bytes(parameters) + self._reference_bytes(trained), _bytes(trained)
        state = optimizer_bytes(self.settings.optim, trained)
        largest = max(parameter.nbytes for parameter in trained)
        before = library + weights
        moments = {
            # Weights are read into their place: no second copy was seen (plan_error.py, lora-512: 1.29 GB until training began).
            "load": before,
            "start check": before + self._check_bytes(),
            "training step": before + state + int(share * step.peak),
            # Adam's update of a weight makes two temporaries of its size.
            "optimizer": before + state + gradients + 2 * largest,
            # safetensors takes a copy of what it writes.
            "save": before + state + (gradients if self.settings.use_peft else _bytes(parameters)),
        }
        return Memory(library, weights, gradients, state, step.kept, max(0, step.peak - step.kept - gradients), moments)

    def _holes(self, tokens: int) -> int:
        """Bytes of the heap that no tensor of a micro-batch of so many tokens fits into."""
        config = unwrapped(self.simulation.model).config.get_text_config()
        layers, hidden = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0)
        return HOLES[self.machine.device] * layers * tokens * hidden * self.simulation.parameters[0].element_size()

    def _reference_bytes(self, trained: Sequence[Any]) -> int:
        """Bytes of a reference in memory beside the policy; it shares what is not trained."""
        if self.settings.sync_ref_model:
            return _bytes(trained)
        if "live" not in self.references:
            return 0
        if self.settings.reference_model is not None:
            return _bytes(self.simulation.parameters)
        return 0 if self.settings.use_peft else _bytes(trained)

    def _check_bytes(self) -> int:
        """Logits of the longest row's plain forward pass, over the whole vocabulary, and what its log-softmax takes."""
        if self.readout == "score":
            return 0
        config = unwrapped(self.simulation.model).config.get_text_config()
        reach = max(prompt + max(branches) for rows in self.streams for prompt, branches in rows)
        return 2 * reach * int(config.vocab_size) * 4

    # ---- time

    def _seconds(self, flops: float, moved: float) -> float:
        rate = self.machine.rate(self.settings.dtype, self.settings.bf16) * MATRIX_SHARE[self.machine.device]
        return flops / rate + moved / (self.machine.bandwidth * MOVE_SHARE[self.machine.device])

    def _optimizer_seconds(self) -> float:
        trained = [parameter for parameter in self.simulation.parameters if parameter.requires_grad]
        # Clipping reads the gradient twice and writes it; Adam's seven element-wise operations read and write about 20 numbers a weight.
        return 23 * _bytes(trained) / (self.machine.bandwidth * MOVE_SHARE[self.machine.device])

    def _reference(self, step: Footprint, budget: int, tokens: float) -> tuple[float, float]:
        """FLOPs and seconds of the reference: each row once where it is stored, every token trained on where it is live."""
        read = 0.0
        for number, kind in enumerate(self.references):
            if kind == "stored" and not self.settings.sync_ref_model:
                models = 1 + len(self.settings.reference_mixture.models) if self.settings.reference_mixture else 1
                read += models * sum(self._tokens(cut) for cut in self._planner(budget).all_rows(number))
            elif kind != "none":
                read += tokens / len(self.references)
        flops, moved = (read * figure / step.tokens for figure in (step.forward_flops, step.forward_moved))
        return flops, self._seconds(flops, moved)

    # ---- rows and micro-batches

    def _planner(self, budget: int) -> Planner:
        settings = self.settings
        return Planner(
            tuple(self.streams),
            settings.batch_size(self.world_size),
            budget,
            seed=settings.seed,
            shuffle=settings.shuffle,
            shared=self.form == "packed",
            padded=self.form == "padded",
            world_size=self.world_size,
        )

    def _rows(self, cut: MicroBatch) -> list[Lengths]:
        return [self.streams[cut.stream][row] for row in cut.rows]

    def _tokens(self, cut: MicroBatch) -> int:
        return self._positions(self._rows(cut))

    def _size(self, cut: MicroBatch) -> tuple[int, int]:
        return self._tokens(cut), sum(sum(branches) for _, branches in self._rows(cut))

    def _positions(self, rows: Sequence[Lengths]) -> int:
        """Positions these rows take together, padding included."""
        if self.form == "packed":
            return sum(prompt + sum(branches) for prompt, branches in rows)
        sizes = [prompt + branch for prompt, branches in rows for branch in branches]
        return max(sizes) * len(sizes) if self.form == "padded" else sum(sizes)

    def _ends(self) -> tuple[Footprint, Footprint]:
        """Footprints of the longest row alone, and of the longest rows that fill `PROBE_TOKENS` (two at least)."""
        rows = sorted((row for rows in self.streams for row in rows), key=lambda row: -self._positions([row]))
        several = [rows[0], rows[min(1, len(rows) - 1)]]
        for row in rows[2:]:
            if self._positions([*several, row]) > PROBE_TOKENS:
                break
            several.append(row)
        return self._run(rows[:1]), self._run(several)

    def _run(self, rows: Sequence[Lengths], accumulate: bool = True) -> Footprint:
        key = (tuple(rows), accumulate)
        if key not in self._seen:
            self._seen[key] = self.simulation.run(rows, self.form, accumulate=accumulate)
        return self._seen[key]


def for_this_machine(
    settings: TrainSettings, lengths: Sequence[Sequence[Lengths]], readout: str, device: str, ranks: Ranks, model: Any
) -> TrainSettings:
    """These settings with what depends on the machine decided, the same on every rank: the token budget, and whether bfloat16 pays.

    Raises UsageError where the budget is `auto` and not even the longest row fits in memory.
    """
    changes: dict[str, Any] = {}
    if settings.bf16 and not ranks.first(lambda: bfloat16_pays(device)):
        say("bf16: this CPU multiplies bfloat16 far slower than float32, so the run computes in float32, which is also more exact")
        changes["bf16"] = False
    if settings.token_budget is None:
        changes["token_budget"] = DEFAULT_BUDGET[device]
    elif settings.token_budget == "auto":
        memory = memory_at_hand(device) // (ranks.size if device == "cpu" else 1)
        config = None if model is None else unwrapped(model).config
        estimator = Estimator(settings, lengths, Machine(device, 1.0, 1.0, memory=memory), readout, world_size=ranks.size, config=config)
        estimator.check()
        changes["token_budget"] = budget = min(ranks.gather(estimator.budget()))
        say(f"token_budget=auto: {budget} tokens a micro-batch ({gigabytes(memory)} of memory at hand)")
    return settings.model_copy(update=changes)


def optimizer_bytes(optim: str, trained: Sequence[Any]) -> int:
    """Bytes of the state an optimizer keeps for these weights; names that are not known count as AdamW, two numbers a weight."""
    numbers, size = next(((numbers, size) for name, numbers, size in _STATES if optim.startswith(name)), (2, None))
    total = 0.0
    for parameter in trained:
        small = size is not None and parameter.numel() < SMALL_TENSOR
        total += numbers * parameter.numel() * (4 if small else size or parameter.element_size())
    return int(total)


def does_not_fit(memory: Memory, machine: Machine, settings: TrainSettings) -> str:
    """What is missing, and which settings would take less."""
    ways = []
    if not settings.gradient_checkpointing:
        ways.append("gradient_checkpointing=true (recomputes activations)")
    if not settings.use_peft:
        ways.append("use_peft=true (LoRA: gradients and optimizer state of a few weights only)")
    if settings.dtype == "float32":
        ways.append("dtype=bfloat16 (half of the weights)")
    if not settings.use_peft and "8bit" not in settings.optim:
        ways.append("optim=adamw_bnb_8bit (a quarter of the optimizer state)")
    ways.append(f"tokenise.max_length below {settings.tokenise.max_length} (shorter rows)")
    return (
        f"The run needs about {gigabytes(memory.peak)} at its {memory.moment}, and {gigabytes(machine.memory)} are at hand: "
        f"{gigabytes(memory.peak - machine.memory)} too little. What takes less: {'; '.join(ways)}."
    )


def _bytes(tensors: Sequence[Any]) -> int:
    return sum(int(tensor.numel() * tensor.element_size()) for tensor in tensors)


def _between(low: Footprint, high: Footprint, tokens: int) -> Footprint:
    """The footprint at so many tokens on the line through two: all its parts grow with tokens."""
    if high.tokens == low.tokens:
        share, low = tokens / high.tokens, Footprint(0, 0, 0, 0.0, 0.0, 0.0, 0.0)
    else:
        share = (tokens - low.tokens) / (high.tokens - low.tokens)
    one, other = astuple(low), astuple(high)
    figures = [start + share * (end - start) for start, end in zip(one, other, strict=True)]
    return Footprint(tokens, int(figures[1]), int(figures[2]), *figures[3:])
