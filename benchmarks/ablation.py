"""What each part of the engine buys: one step's forward and backward passes with a part left out, beside all of it.

    python benchmarks/ablation.py --rows 16 --json

Every variant runs the same pairs in a process of its own (its peak memory is its own), in turn, `--repeats` times. The gradient
must be the same in all of them: its distance from the full engine's is part of the result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, redirect_stdout
from typing import Any

import _common as common

FULL = {"form": "packed", "planned": True, "head": "chunked", "heap": True, "lean": True, "dtype": "float32"}
VARIANTS: dict[str, dict[str, Any]] = {
    "all of it": {},
    "prompts not shared": {"form": "separate"},
    "rows padded": {"form": "padded"},
    "rows padded, pairs in file order, two at a time": {"form": "padded", "planned": False},
    "head without chunks": {"head": "logits"},
    "head on every position": {"head": "everywhere"},
    "what autograd keeps, kept": {"lean": False},
    "all of the five left out": {"form": "padded", "planned": False, "head": "everywhere", "heap": False, "lean": False},
    "freed memory given back": {"heap": False},
    "bfloat16 autocast": {"dtype": "bfloat16"},
}


def main() -> None:
    """Parse, run every variant in turn, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="pairs, all in one optimizer step")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--token-budget", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--leave-out", nargs="*", default=[], help="variants not to run")
    parser.add_argument("--json", action="store_true", help="the JSON object on one line")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        with redirect_stdout(sys.stderr):
            found = work(json.loads(arguments.child))
        print(json.dumps(found | {"peak_rss_mb": common.peak_rss_mb()}))
        return
    names = [name for name in VARIANTS if name not in arguments.leave_out]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    shared = {key: getattr(arguments, key) for key in ("rows", "model", "lora", "token_budget", "threads")}
    for repeat in range(arguments.repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            runs[name].append(child(shared | FULL | VARIANTS[name]))
            common.log(f"{name}, {repeat + 1} of {arguments.repeats}: {runs[name][-1]['step_seconds']:.1f} s")
    settings = {key: value for key, value in vars(arguments).items() if key not in ("child", "json")}
    common.report("ablation", settings, {"variants": compared(runs)}, one_line=arguments.json)


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Figures of every variant, and how they stand to the full engine's (medians)."""
    table: dict[str, Any] = {}
    for name, done in runs.items():
        kinds = ("step_seconds", "reference_seconds", "peak_rss_mb")
        table[name] = {kind: common.summary([run[kind] for run in done]) for kind in kinds}
        table[name] |= {"loss": done[0]["loss"], "gradient_norm": done[0]["gradient_norm"], "micro_batches": done[0]["micro_batches"]}
    base = table["all of it"]
    for row in table.values():
        row["times_as_long"] = round(row["step_seconds"]["median"] / base["step_seconds"]["median"], 3)
        row["times_the_memory"] = round(row["peak_rss_mb"]["median"] / base["peak_rss_mb"]["median"], 3)
        row["gradient_norm_off"] = abs(row["gradient_norm"] / base["gradient_norm"] - 1)
    return table


def child(job: dict[str, Any]) -> dict[str, Any]:
    """One variant in its own process."""
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(job)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


# ---- one variant


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Fill a reference store, then run one step; seconds of both."""
    import torch

    from equipoise.data.plan import Planner, Step
    from equipoise.models.attention import NAME, attention_of, register
    from equipoise.models.gradients import gradients_in_place
    from equipoise.models.logps import unwrapped
    from equipoise.objectives._load import build
    from equipoise.reference.build import build as fill
    from equipoise.reference.key import Context
    from equipoise.reference.store import ReferenceStore
    from equipoise.training._heap import keep_freed_memory
    from equipoise.training._step import StepRunner
    from equipoise.training._streams import Forward, Stream
    from equipoise.training.meters import Meters

    torch.set_num_threads(job["threads"])
    if job["heap"]:
        keep_freed_memory()
    use_head(job["head"])
    if not job["lean"]:
        keep_everything()
    register()
    model, rows = policy(job), token_rows(job)
    cpu, form = torch.device("cpu"), job["form"]
    autocast: Any = (lambda: torch.autocast("cpu", dtype=torch.bfloat16)) if job["dtype"] == "bfloat16" else nullcontext
    with tempfile.TemporaryDirectory() as folder, nullcontext() if form == "padded" else attention_of(unwrapped(model), NAME):
        store = ReferenceStore(folder, Context("weights", "none", job["dtype"], form))
        budget = job["token_budget"]
        reference = fill(model, rows, store, form, budget, cpu, autocast)["seconds"]
        stream = Stream("main", rows, build({"name": "dpo"}), 1.0, store)
        planner = Planner((stream.lengths,), len(rows), budget, shuffle=False, shared=form == "packed", padded=form == "padded")
        step = planner.step(0) if job["planned"] else in_file_order(len(rows), Step)
        runner = StepRunner(
            [stream],
            Forward(form, cpu, autocast=autocast),
            Meters(),
            lambda loss: loss.backward(),
            lambda last: gradients_in_place() if job["lean"] else nullcontext(),
        )
        begin = time.perf_counter()
        loss = runner.run(model, step)
        seconds = time.perf_counter() - begin
    gradient = torch.stack([parameter.grad.double().norm() for parameter in model.parameters() if parameter.grad is not None])
    return {
        "reference_seconds": reference,
        "step_seconds": round(seconds, 3),
        "loss": float(loss),
        "gradient_norm": float(gradient.norm()),
        "micro_batches": len(step.ranks[0]),
    }


def policy(job: dict[str, Any]) -> Any:
    """The model, all weights or LoRA trainable."""
    from equipoise.models.load import load_causal

    model: Any = load_causal(job["model"])
    model.train()
    if not job["lora"]:
        return model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


def token_rows(job: dict[str, Any]) -> list[Any]:
    """The first pairs as tokens."""
    from equipoise.data.settings import TokeniseSettings
    from equipoise.data.tokenise import tokenise
    from equipoise.models.load import load_tokenizer

    records = common.preference_records(job["rows"] + 8)[1]
    rows, _ = tokenise(records, load_tokenizer(job["model"]), TokeniseSettings(), ("chosen", "rejected"))
    return rows[: job["rows"]]


def in_file_order(count: int, step: Any) -> Any:
    """One step whose micro-batches are two neighbouring rows each, as a plain loop has them."""
    from equipoise.data.plan import MicroBatch

    cuts = tuple(MicroBatch(0, tuple(range(first, min(first + 2, count)))) for first in range(0, count, 2))
    return step((cuts,), (tuple(range(count)),))


def use_head(kind: str) -> None:
    """Put another head in the place of the chunked one: all replies' logits at once, or those of every position."""
    from equipoise.models import logps

    if kind == "logits":
        logps.head_of = lambda model, batch: "logits"
    elif kind == "everywhere":

        def everywhere(model: Any, batch: Any) -> Any:
            scores = logps._run(model, batch).flatten(0, 1).float().log_softmax(-1)
            return scores[batch.source, batch.target]

        logps.head_of = lambda model, batch: "chunked"
        logps._chunked = everywhere


def keep_everything() -> None:
    """Leave norms, gated MLPs and row-by-row attention to plain autograd."""
    from equipoise.models import _rows
    from equipoise.training import _step

    _rows.usable = lambda *_: False
    _step.lean_layers = lambda model, kernels: nullcontext()


if __name__ == "__main__":
    main()
