"""Preference training on one GPU: this package against TRL's recipe, in shapes of real models with random weights.

    python benchmarks/gpu.py > gpu.json                   one CUDA device, under 8 minutes, no network, neither TRL nor datasets
    python benchmarks/gpu.py --device cpu --tiny          the whole script on a CPU in a minute: that it runs, no figure to quote

Sides, one optimizer step each in turn on the same weights, rows and optimizer:
  ours          shared prompts, packed rows, one attention kernel for all of them, stored reference; token budget found by trial
  trl_defaults  stand-in for TRL's recipe: 8 pairs a micro-batch, gradient checkpointing, online reference
  trl_tuned     stand-in: pairs a micro-batch found by trial, checkpointing only where nothing fits without, precomputed reference
The stand-in is described in benchmarks/_gpu_sides.py. What the time budget does not allow is listed under `skipped`.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from _common import log, versions
from _gpu_sides import SHAPES, TINY, Autocast, Ours, Side, StandIn, Watch, make_model, make_rows, step_flops
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from equipoise.models import _varlen
from equipoise.models._elementwise import EAGER, Kernels, computing_with
from equipoise.models.attention import NAME, packed_attention, register
from equipoise.models.batch import Form
from equipoise.training import _step

SCHEMA_VERSION = 1
FLOPS = (
    "6 a layer weight and token, 6*H*V a reply token for the head, 12*H a seen (query, key) pair and layer; a shared prompt once "
    "(ours) or twice (stand-in); padding and recomputation not counted"
)
DEFAULT_MICRO = 8


def main() -> None:
    """Run everything the time allows and print one JSON object."""
    options = _options()
    bench = Bench(options)
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": "gpu",
        "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "machine": machine(bench.device),
        "versions": versions(),
        "settings": vars(options),
        "theirs": "stand-in for TRL's recipe (benchmarks/_gpu_sides.py), not TRL itself",
        "flops": FLOPS,
    }
    result["matmul_peak_tflops"] = bench.peaks = bench.matmul_peaks()
    result["runs"] = bench.runs()
    result["skipped"] = bench.skipped
    result["seconds"] = round(bench.clock(), 1)
    print(json.dumps(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and rows, for a machine without a GPU")
    parser.add_argument("--budget-seconds", type=float, default=420.0, help="start nothing new after this long")
    parser.add_argument("--pairs", type=int, default=64, help="pairs an optimizer step")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each side")
    parser.add_argument("--ours-only", action="store_true", help="without the stand-in: profile and ablations sooner")
    parser.add_argument("--shapes", nargs="+", default=None, help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--data", nargs="+", default=["hh", "ultrafeedback"], help="row lengths: hh, ultrafeedback")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No CUDA device. `--device cpu --tiny` runs the script without one.")
    known = TINY if options.tiny else SHAPES
    options.shapes = list(known) if options.shapes is None else options.shapes
    if unknown := set(options.shapes) - set(known):
        raise SystemExit(f"Unknown shape {', '.join(sorted(unknown))}; known: {', '.join(known)}.")
    if options.tiny:
        options.pairs, options.rounds, options.data = 4, 2, ["tiny"]
    return options


class Bench:
    """Everything measured in one process, against one clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device, self.started = options, torch.device(options.device), time.monotonic()
        self.watch = Watch(self.device)
        self.skipped: list[str] = []
        self.peaks: dict[str, float] = {}
        self.autocast: Autocast = lambda: torch.autocast(self.device.type, dtype=torch.bfloat16)
        self.budgets = (64, 128) if options.tiny else (4096, 8192, 16384)
        self.micros = (2, 4) if options.tiny else (4, 8, 16, 32)
        register()

    def clock(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def allowed(self, what: str, seconds: float) -> bool:
        """Whether the budget holds this long; noted as skipped where not."""
        if self.clock() + seconds <= self.options.budget_seconds:
            return True
        self.skipped.append(what)
        log(f"skipped for time: {what}")
        return False

    def matmul_peaks(self) -> dict[str, float]:
        """TFLOP/s of a large square product: bfloat16, and float32 with and without TF32. Best of eight."""
        size = 256 if self.options.tiny else 8192
        found = {}
        for name, dtype, precision in (
            ("bfloat16", torch.bfloat16, "highest"),
            ("tf32", torch.float32, "high"),
            ("float32", torch.float32, "highest"),
        ):
            torch.set_float32_matmul_precision(precision)
            one, other = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
            seconds = min(self.watch.run(lambda one=one, other=other: one @ other)[0] for _ in range(8))
            found[name] = float(f"{2 * size**3 / seconds / 1e12:.4g}")
        torch.set_float32_matmul_precision("highest")
        log(f"matmul peak {found}")
        return found

    def runs(self) -> list[dict[str, Any]]:
        """Every data kind and shape; the ones the goals are about come first."""
        done = []
        for kind in self.options.data:
            for name in self.options.shapes:
                if not self.allowed(f"{name} {kind}", 0 if self.options.tiny else 60):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        done.append(self.one(name, kind, Path(folder)))
                    except Exception as error:  # the other shapes are still worth having
                        done.append({"shape": name, "data": kind, "error": _say(error)})
                        log(f"{name} {kind}: {_say(error)}")
                self.clean()
        return done

    def one(self, name: str, kind: str, folder: Path) -> dict[str, Any]:
        """One shape on one kind of rows: the three sides in turn, then what single parts of ours are worth."""
        shape = (TINY if self.options.tiny else SHAPES)[name]
        log(f"== {name}, {kind} rows, at {self.clock():.0f} s")
        model, other = make_model(shape, self.device), make_model(shape, self.device).eval().requires_grad_(False)
        rows = make_rows(kind, self.options.pairs * (self.options.rounds + 1), shape["vocab_size"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7, fused=self.device.type == "cuda")
        pairs = self.options.pairs

        def ours(budget: int, given: Sequence[Any] = rows, store: str = "main", form: Form = "packed") -> Ours:
            return Ours(model, given, pairs, budget, folder / store, self.autocast, form)

        def standin(micro: int, checkpointing: bool, reference: Any = None, given: Sequence[Any] = rows) -> StandIn:
            return StandIn(model, given, pairs, micro, self.autocast, checkpointing, reference)

        # Trials run on one step's rows, so that their reference is soon there.
        first = rows[:pairs]
        budget = self.search("ours", self.budgets, lambda budget: ours(budget, first, f"trial-{budget}"), optimizer)
        if budget is None:
            raise RuntimeError(f"ours: not even {self.budgets[0]} tokens fit in memory")
        tuned = None
        if not self.options.ours_only:
            tuned = self.search("trl_tuned", self.micros, lambda micro: standin(micro, False, given=first), optimizer)

        def all_sides(given: Sequence[Any], store: str) -> dict[str, Side]:
            sides: dict[str, Side] = {"ours": ours(budget, given, store)}
            if not self.options.ours_only:
                sides["trl_defaults"] = standin(min(DEFAULT_MICRO, pairs), True, other, given)
                sides["trl_tuned"] = standin(tuned or self.micros[0], tuned is None, given=given)
            return sides

        sides = all_sides(rows, "main")
        found = self.in_turn(sides, optimizer)
        copy = sum(parameter.numel() * parameter.element_size() for parameter in other.parameters()) / 2**30
        for side in found.values():  # the copy lies in memory while all sides run, and only an online reference needs it
            if side["setting"].get("reference") != "online" and self.device.type == "cuda":
                side["peak_gib"] = round(side["peak_gib"] - copy, 2)
        # One step's pairs, and for all sides the reference of the weights as they began: by now the model has moved away from them.
        fresh = all_sides(first, "agreement")
        for side in fresh.values():
            side.reference(other)
        agreement = self.agreement(fresh)
        result: dict[str, Any] = {"shape": name, "data": kind, "pairs_a_step": pairs, "sides": found, "agreement": agreement}
        result["ratios"] = {theirs: _ratio(found["ours"], found[theirs]) for theirs in found if theirs != "ours"}
        log(f"{name} {kind}: {json.dumps(result['ratios'])}")
        other.to("meta")  # needed no more, and it would count in every peak below
        if kind == self.options.data[0]:
            if self.allowed(f"{name} profile", 10):
                result["profile"] = self.profile(sides["ours"])
            result["ablations"] = self.ablations(name, ours, budget, model, optimizer)
        return result

    def search(self, side: str, candidates: Sequence[int], make: Callable[[int], Side], optimizer: Any) -> int | None:
        """The candidate with the fastest second step; None where none fits. Larger ones are not tried once memory ran out."""
        seconds: dict[int, float] = {}
        for candidate in candidates:
            try:
                trial = make(candidate)
                trial.reference()
                self.step(trial, 0, optimizer)
                seconds[candidate] = self.step(trial, 0, optimizer)[0]
            except torch.OutOfMemoryError:
                log(f"{side}: {candidate} does not fit in memory")
            if candidate not in seconds:  # only now, when the error has let go of what it held
                optimizer.zero_grad()
                self.clean()
                break
        log(f"{side}: seconds a step by size {json.dumps({size: round(value, 3) for size, value in seconds.items()})}")
        return min(seconds, key=seconds.__getitem__) if seconds else None

    def step(self, side: Side, number: int, optimizer: Any) -> tuple[float, float]:
        """Seconds and peak GiB of one whole optimizer step."""

        def call() -> None:
            side.step(number)
            torch.nn.utils.clip_grad_norm_(side.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return self.watch.run(call)

    def in_turn(self, sides: Mapping[str, Side], optimizer: Any) -> dict[str, Any]:
        """Every side's reference, a step to warm up, then `rounds` timed steps in turn, another side first each round."""
        reference = {}
        for name, side in sides.items():
            reference[name] = self.watch.run(side.reference)[0] * self.options.pairs / len(side.rows)
            self.step(side, self.options.rounds, optimizer)
        timed: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        names = list(sides)
        for round_ in range(self.options.rounds):
            if round_ and not self.allowed(f"round {round_ + 1} of {self.options.rounds}", 0):
                break
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                timed[name].append(self.step(sides[name], round_, optimizer))
        return {name: self.figures(side, timed[name], reference[name]) for name, side in sides.items()}

    def figures(self, side: Side, timed: Sequence[tuple[float, float]], reference: float) -> dict[str, Any]:
        """What a side's timed steps say. Tokens count a shared prompt once, whoever runs it."""
        chosen = [side.step_rows(number) for number in range(len(timed))]
        seconds = statistics.median(second for second, _ in timed)
        tokens = statistics.mean(sum(row.tokens for row in rows) for rows in chosen)
        # Steps differ in length: speed is all of the work over all of the time.
        total = sum(second for second, _ in timed)
        flops = sum(step_flops(side.model, rows, side.shared) for rows in chosen) / total / 1e12
        setting = {"token_budget": side.budget, "form": side.form} if isinstance(side, Ours) else {"pairs_a_micro_batch": side.micro}
        if isinstance(side, StandIn):
            setting |= {"checkpointing": side.checkpointing, "reference": "online" if side.reference_model is not None else "precomputed"}
        return {
            "setting": setting,
            "step_seconds": {"median": round(seconds, 4), "low": round(min(timed)[0], 4), "high": round(max(timed)[0], 4)},
            "seconds_a_pair": total / sum(len(rows) for rows in chosen),
            "reference_seconds_a_pair": reference / self.options.pairs,
            "tokens_a_second": round(tokens * len(timed) / total),
            "peak_gib": round(max(peak for _, peak in timed), 2),
            "tflops": float(f"{flops:.4g}"),
            "share_of_peak": round(flops / self.peaks["bfloat16"], 4),
        }

    def agreement(self, sides: Mapping[str, Side]) -> dict[str, Any]:
        """Loss and gradient norm of each side over the same pairs: a fast side that computes something else has won nothing."""
        everything: dict[str, Any] = {}
        for name, side in sides.items():
            loss = side.step(0)
            parameters = [parameter.grad for parameter in side.model.parameters() if parameter.grad is not None]
            everything[name] = {"loss": float(loss), "gradient_norm": float(torch.nn.utils.get_total_norm(parameters))}
            side.model.zero_grad()
        return everything

    def ablations(self, name: str, ours: Callable[..., Ours], budget: int, model: Any, optimizer: Any) -> dict[str, Any]:
        """Seconds a step of ours with one part changed, on the very same steps. `as_it_is` is measured again beside them."""
        deep = name == self.options.shapes[0]  # compiling takes a while; one shape shows what it is worth
        parts: dict[str, tuple[Callable[[], Ours], AbstractContextManager[Any]]] = {
            "as_it_is": (lambda: ours(budget), nullcontext()),
            "attention_by_flex": (lambda: ours(budget), _without(_varlen)),
            "prompts_not_shared": (lambda: ours(budget, form="separate"), nullcontext()),
            "what_autograd_keeps_kept": (lambda: ours(budget), _without_lean_layers()),
            "kernels_not_compiled": (lambda: _with_kernels(ours(budget), EAGER), nullcontext()),
        } | ({"layers_compiled": (lambda: ours(budget), _compiled_layers(model))} if deep else {})
        found: dict[str, Any] = {}
        for part, (make, context) in parts.items():
            if not self.allowed(f"{name} ablation {part}", 0 if self.options.tiny else 45 if part == "layers_compiled" else 15):
                continue
            try:
                with context:
                    side = make()
                    side.reference()
                    self.step(side, 0, optimizer)
                    timed = [self.step(side, number, optimizer) for number in range(self.options.rounds)]
                found[part] = {
                    "step_seconds": round(statistics.median(second for second, _ in timed), 4),
                    "peak_gib": round(max(peak for _, peak in timed), 2),
                }
            except Exception as error:  # one part that fails says so and costs nothing else
                found[part] = {"error": _say(error)}
            optimizer.zero_grad()
            self.clean()
        return found

    def profile(self, side: Side) -> dict[str, Any]:
        """Share of a step that the device computes at all, and the two dozen operations of ours it spends most time on [ms]."""
        from torch.profiler import ProfilerActivity, profile

        cuda = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])) as measured:
            seconds = self.watch.run(lambda: side.step(0))[0]
        side.model.zero_grad()
        # On a GPU kernels alone: the operations that launched them carry the same time once more.
        kernels = [event for event in measured.key_averages() if not cuda or event.device_type == torch.autograd.DeviceType.CUDA]
        events = [(event.self_device_time_total if cuda else event.self_cpu_time_total, event) for event in kernels]
        top = sorted(events, key=lambda pair: -pair[0])[:24]
        whole = sum(spent for spent, _ in events)
        listed = [
            {"op": event.key[:80], "ms": round(spent / 1e3, 3), "share": round(spent / whole, 4), "calls": event.count}
            for spent, event in top
        ]
        return {"ms": round(whole / 1e3, 3), "share_of_the_step": round(whole / 1e6 / seconds, 3), "operations": listed}

    def clean(self) -> None:
        """Give freed device memory back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _without(kernel: Any) -> Iterator[None]:
    before = kernel.usable
    kernel.usable = lambda *_: False
    try:
        yield
    finally:
        kernel.usable = before


@contextmanager
def _without_lean_layers() -> Iterator[None]:
    before = _step.lean_layers
    _step.lean_layers = lambda model, kernels: computing_with(kernels)
    try:
        yield
    finally:
        _step.lean_layers = before


def _with_kernels(side: Ours, kernels: Kernels) -> Ours:
    side.forward.kernels = kernels
    return side


@contextmanager
def _compiled_layers(model: Any) -> Iterator[None]:
    """Decoder layers through torch.compile instead of ours; attention over packed rows stays outside the graph, with its own kernel."""
    layers = [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]
    ALL_ATTENTION_FUNCTIONS.register(NAME, torch.compiler.disable(packed_attention))
    for layer in layers:
        # The CPU's code generator takes a minute for a layer: there only the capture of the graph is tried.
        layer.compile(dynamic=True, backend="inductor" if next(model.parameters()).is_cuda else "aot_eager")
    try:
        with _without_lean_layers():  # the compiler decides itself what to make again
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        register()


def _ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """How many times faster ours is a pair: training alone, and with each side's reference, which an online one has in its step."""
    both = [side["seconds_a_pair"] + side["reference_seconds_a_pair"] for side in (ours, theirs)]
    return {"training": round(theirs["seconds_a_pair"] / ours["seconds_a_pair"], 3), "with_reference": round(both[1] / both[0], 3)}


def _say(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the host it is in."""
    facts: dict[str, Any] = {"device": device.type, "host": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return facts


if __name__ == "__main__":
    main()
