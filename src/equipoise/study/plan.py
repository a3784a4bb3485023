"""What a study will do, before it does it: stages, tokens, time, budget, and the smallest differences it can see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from equipoise.core.errors import UsageError
from equipoise.core.progress import say
from equipoise.generation._base import Prompt
from equipoise.study import _cost
from equipoise.study._graph import Graph, Node, asks_kl, build_graph, shows_credit
from equipoise.study._sizes import AxisSizes, Sizer, Sizes, detectable_differences
from equipoise.study.settings import StudySettings
from equipoise.training.machine import LOAD_SECONDS, Machine, measure

_BUDGETS = {"pairs": "pairs", "tokens": "tokens", "flops": "FLOPs"}


@dataclass(frozen=True)
class StagePlan:
    """One stage: what it reads and what it will take. None: not known before the data or the model is here.

    units: pairs or rows seen, repetitions counted. tokens: unique tokens trained on, generated or scored.
    counted: whether rows and tokens were counted on the real data (else estimated). memory: peak bytes of a training stage.
    """

    node: Node
    arms: tuple[str, ...]
    units: float | None = None
    tokens: float | None = None
    flops: float | None = None
    seconds: float | None = None
    counted: bool = False
    memory: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "stage": self.node.kind,
            "name": self.node.name,
            "seed": self.node.seed,
            "key": self.node.key,
            "arms": list(self.arms),
            "pairs": self.units,
            "tokens": self.tokens,
            "flops": self.flops,
            "seconds": None if self.seconds is None else round(self.seconds, 1),
            "counted": self.counted,
            "memory": self.memory,
        }


@dataclass(frozen=True)
class StudyPlan:
    """The whole plan. `spent` holds, for each arm that trains, what one seed of it spends; None: not known."""

    settings: StudySettings
    graph: Graph
    machine: Machine
    stages: tuple[StagePlan, ...]
    prompts: Mapping[str, int]
    spent: Mapping[str, Mapping[str, float | None]]
    detectable: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def seconds(self, node: Node) -> float | None:
        """Estimated seconds of one stage."""
        return next((row.seconds for row in self.stages if row.node.key == node.key), None)

    @property
    def total_seconds(self) -> float | None:
        """Estimated seconds of everything; None where a stage's is not known."""
        times = [row.seconds for row in self.stages]
        return None if None in times else sum(time for time in times if time is not None)

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        total = self.total_seconds
        return {
            "study": self.settings.name,
            "stages": [row.as_json() for row in self.stages],
            "seconds": None if total is None else round(total, 1),
            "prompts": dict(self.prompts),
            "budget": {"equal": self.settings.budget.equal, "tolerance": self.settings.budget.tolerance, "arms": dict(self.spent)},
            "detectable": self.detectable,
            "warnings": self.warnings,
            "machine": self.machine.as_json(),
        }


def plan_study(
    settings: StudySettings,
    prompts: Sequence[Prompt] | None = None,
    machine: Machine | None = None,
    chosen: Mapping[str, float] | None = None,
) -> StudyPlan:
    """Plan a study without training or downloading anything.

    Args:
        settings: the study.
        prompts: evaluation prompts, where the caller has them already; None: read where they are at hand.
        machine: measured speed; None: measured now (half a second).
        chosen: learning rates that searches have found (see `build_graph`).

    Tokens are counted on the real data with the real tokenizer where both are on this machine, and estimated from
    `expected` otherwise. Raises UsageError for settings that cannot work, such as an objective's hyper-parameter.
    """
    machine = machine or measure()
    graph = build_graph(settings, chosen)
    sizer = Sizer(settings)
    axes = sizer.axes(prompts)
    rows = tuple(_plan_stage(node, tuple(graph.users(node)), settings, sizer, axes, machine) for node in graph.nodes())
    spent = _spent(settings, graph, rows)
    warnings = [*sizer.notes, *_budget_problems(settings, spent)]
    counts = {axis: size.prompts for axis, size in axes.items()}
    return StudyPlan(settings, graph, machine, rows, counts, spent, detectable_differences(settings, counts), warnings)


def check_budget(plan: StudyPlan) -> None:
    """Raise UsageError where the budget is strict and not equal; say it otherwise."""
    problems = _budget_problems(plan.settings, plan.spent)
    if problems and plan.settings.budget.strict:
        raise UsageError("\n".join(problems))
    for problem in plan.warnings:
        say(f"warning: {problem}")


def _plan_stage(
    node: Node, arms: tuple[str, ...], settings: StudySettings, sizer: Sizer, axes: Mapping[str, AxisSizes], machine: Machine
) -> StagePlan:
    if node.kind == "train":
        return _plan_training(node, arms, settings, sizer, machine)
    judge = _judge_parameters(settings)
    if node.kind == "held_out":
        size = sizer.block(settings.judge.held_out, node, node.streams[0].objective)
        if size is None or judge is None:
            return StagePlan(node, arms, size.rows if size else None)
        flops = _cost.forward_flops(judge, size.tokens)
        seconds = LOAD_SECONDS + flops / (machine.float32 * _cost.FORWARD_SHARE)
        return StagePlan(node, arms, size.rows, size.tokens, flops, seconds, size.counted)
    if node.search:
        axes = sizer.search_axes()
    prompts = sum(size.prompts for size in axes.values())
    asked = sum(size.tokens for size in axes.values())
    new = float(prompts * settings.evaluation.sampling.max_new_tokens)
    if node.policy is not None and node.kind == "generate":
        return StagePlan(node, arms, prompts, 0.0, 0.0, 1.0)
    model = _cost.parameters_of(settings.model_name_or_path, settings.expected_parameters)
    if model is None or judge is None or not prompts:
        return StagePlan(node, arms, prompts or None)
    if node.kind == "generate":
        flops = _cost.forward_flops(model, asked + new)
        peak = machine.peak(str(settings.evaluation.generation.get("dtype", "float32")))
        read = _cost.forward_flops(model, asked) / (peak * _cost.FORWARD_SHARE)
        write = _cost.forward_flops(model, new) / (peak * _cost.GENERATE_SHARE)
        return StagePlan(node, arms, prompts, new, flops, LOAD_SECONDS + read + write)
    # An empty reply costs nothing; nobody knows beforehand how long the other policies' replies are, so they count in full.
    flops = _cost.forward_flops(judge, asked + (0.0 if node.policy == "empty" else new))
    seconds = LOAD_SECONDS + flops / (machine.float32 * _cost.FORWARD_SHARE)
    if asks_kl(settings, node) and node.policy is None and node.start is not None and node.start.start is not None:
        both = 2 * _cost.forward_flops(model, asked + new)
        dtype = str(settings.evaluation.scoring.get("kl_to_base", {}).get("dtype", "float32"))
        flops, seconds = flops + both, seconds + both / (machine.peak(dtype) * _cost.FORWARD_SHARE)
    if node.start is not None and shows_credit(settings, node.start):
        shown = sum(min(size.prompts, settings.evaluation.token_credit) for size in axes.values()) / prompts
        both = 2 * _cost.forward_flops(model, shown * (asked + new))
        flops, seconds = flops + both, seconds + LOAD_SECONDS + both / (machine.float32 * _cost.FORWARD_SHARE)
    return StagePlan(node, arms, prompts, asked + new, flops, seconds)


def _judge_parameters(settings: StudySettings) -> int | None:
    """Weights the judge runs a token through: a reward model's without an output layer, an implicit reward's two models."""
    judge, expected = settings.judge, settings.expected_parameters
    if judge.base_model_name_or_path is None:
        return _cost.parameters_of(judge.model_name_or_path, expected, head=False)
    policy, base = (_cost.parameters_of(name, expected) for name in (judge.model_name_or_path, judge.base_model_name_or_path))
    return None if policy is None or base is None else policy + base


def _plan_training(node: Node, arms: tuple[str, ...], settings: StudySettings, sizer: Sizer, machine: Machine) -> StagePlan:
    """Rows, tokens and FLOPs of a training stage: every stream gives as many units a step as the first."""
    from equipoise.training._preflight import check_recipe

    recipe = sizer.recipe(node)
    check_recipe(recipe)
    sizes: list[Sizes | None] = [sizer.block(stream.data, node, stream.objective) for stream in node.streams]
    first = sizes[0]
    units = recipe.total_units(0 if first is None else first.rows)
    if first is None:
        return StagePlan(node, arms, units or None)
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return StagePlan(node, arms, units * len(sizes))
    tokens = sum(units * size.tokens / size.rows for size in known)
    parameters = _cost.parameters_of(recipe.model_name_or_path, settings.expected_parameters, head=not node.judge)
    counted = all(size.counted for size in known)
    if parameters is None:
        return StagePlan(node, arms, units * len(known), tokens, counted=counted)
    flops = sum(
        _cost.train_flops(parameters, units * size.tokens / size.rows, recipe.use_peft, sizer.needs_reference(stream.objective))
        for size, stream in zip(known, node.streams, strict=True)
    )
    estimate = sizer.estimate(node, known, machine)
    if estimate is not None:
        return StagePlan(node, arms, units * len(known), tokens, flops, estimate.seconds, counted, estimate.memory.peak)
    peak = machine.rate(recipe.dtype, recipe.bf16)
    return StagePlan(node, arms, units * len(known), tokens, flops, LOAD_SECONDS + flops / (peak * _cost.TRAIN_SHARE), counted)


def _spent(settings: StudySettings, graph: Graph, rows: Sequence[StagePlan]) -> dict[str, dict[str, float | None]]:
    """What one seed of every training arm spends, its shared stages counted in full."""
    by_key = {row.node.key: row for row in rows}
    spent: dict[str, dict[str, float | None]] = {}
    for arm in graph.arms:
        if arm.kind == "arm" and arm.training and arm.seed == settings.seeds[0]:
            plans = [by_key[node.key] for node in arm.training]
            spent[arm.name] = {
                "pairs": _total([plan.units for plan in plans]),
                "tokens": _total([plan.tokens for plan in plans]),
                "flops": _total([plan.flops for plan in plans]),
            }
    return spent


def _total(values: Sequence[float | None]) -> float | None:
    return None if any(value is None for value in values) else float(sum(value for value in values if value is not None))


def _budget_problems(settings: StudySettings, spent: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """What differs between arms in the unit the study says must be equal."""
    unit = settings.budget.equal
    if unit == "none" or len(spent) < 2:
        return []
    unknown = [arm for arm, figures in spent.items() if figures[unit] is None]
    if unknown:
        return [f"Equal budget in {_BUDGETS[unit]} cannot be checked: not known for {', '.join(unknown)}."]
    known = {arm: float(figures[unit] or 0.0) for arm, figures in spent.items()}
    low, high = min(known, key=lambda arm: known[arm]), max(known, key=lambda arm: known[arm])
    if known[high] - known[low] <= settings.budget.tolerance * known[high]:
        return []
    shown = ", ".join(f"{arm} {value:.4g}" for arm, value in known.items())
    return [f"The arms do not spend the same {_BUDGETS[unit]} ({shown}): {high} spends more than {low}, so more budget may explain it."]
