"""Where a training step's time and memory go, and what no engine could save: the floor of both on this machine.

    python benchmarks/profile_step.py --rows 16 --json

Runs one optimizer step (reference pass, forward and backward passes, AdamW) under torch's profiler and groups its operators. The time
floor is the step's own matrix products at the fastest product this machine shows; the memory floor is weights, gradients and
optimizer state beside what the libraries take.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import _common as common
from ablation import FULL, policy, token_rows
from vs_trl import matmul_peak, model_weights

GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "attention": ("RowAttention", "aten::bmm", "aten::baddbmm", "_softmax"),
    "optimizer": ("fused_adamw", "aten::_fused", "foreach_norm", "linalg_vector_norm"),
    "copies": ("aten::cat", "aten::copy_", "aten::fill_", "aten::index", "embedding"),
}


def main() -> None:
    """Parse, profile, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="pairs, all in one optimizer step")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast over float32 weights")
    parser.add_argument("--token-budget", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="the JSON object on one line")
    arguments = parser.parse_args()
    settings = {key: value for key, value in vars(arguments).items() if key != "json"}
    common.report("profile_step", settings, profile(FULL | settings), one_line=arguments.json)


def profile(job: dict[str, Any]) -> dict[str, Any]:
    """Run a step once to warm up and once profiled."""
    import torch

    from equipoise.data.plan import Planner
    from equipoise.models.attention import NAME, attention_of, register
    from equipoise.models.batch import pack
    from equipoise.models.gradients import gradients_in_place
    from equipoise.models.layers import lean_layers, watching
    from equipoise.models.logps import policy_logps, unwrapped
    from equipoise.objectives._load import build
    from equipoise.reference.build import build as fill
    from equipoise.reference.key import Context
    from equipoise.reference.store import ReferenceStore
    from equipoise.training._heap import keep_freed_memory
    from equipoise.training._step import StepRunner
    from equipoise.training._streams import Forward, Stream
    from equipoise.training.meters import Meters

    torch.set_num_threads(job["threads"])
    keep_freed_memory()
    register()
    library = common.peak_rss_mb()
    autocast: Any = partial(torch.autocast, "cpu", dtype=torch.bfloat16) if job["dtype"] == "bfloat16" else nullcontext
    model, rows, cpu, budget = policy(job), token_rows(job), torch.device("cpu"), job["token_budget"]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    with tempfile.TemporaryDirectory() as folder, attention_of(unwrapped(model), NAME):
        if job["dtype"] == "bfloat16":
            with watching(model), torch.no_grad(), autocast():  # as the start check does before a run
                policy_logps(model, pack(rows[:1]))
        for name in ("warming up", "weights"):
            store = ReferenceStore(folder, Context(name, "none", job["dtype"], "packed"))
            with lean_layers(model):
                reference = fill(model, rows, store, "packed", budget, cpu, autocast)["seconds"]
        stream = Stream("main", rows, build({"name": "dpo"}), 1.0, store)
        step = Planner((stream.lengths,), len(rows), budget, shuffle=False).step(0)
        forward = Forward("packed", cpu, autocast=autocast)
        runner = StepRunner([stream], forward, Meters(), lambda loss: loss.backward(), lambda last: gradients_in_place())

        def once() -> None:
            runner.run(model, step)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        once()
        begin = time.perf_counter()
        once()
        seconds, memory = time.perf_counter() - begin, common.peak_rss_mb()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            once()
    peak = matmul_peak(job["dtype"], job["threads"], "cpu")
    body, head = model_weights(job["model"])
    unique, replies = sum(row.tokens for row in rows), sum(len(branch.ids) for row in rows for branch in row.branches)
    work = (4 if job["lora"] else 6) * (body * unique + head * replies)
    state = [sum(parameter.nbytes for parameter in group) / 2**20 for group in (model.parameters(), trained, trained, trained)]
    return {
        "step_seconds": round(seconds, 3),
        "reference_seconds": reference,
        "shares_of_profiled_time": shares(found.key_averages()),
        "matmul_peak_gflops": round(peak / 1e9, 1),
        "step_gflops": round(work / seconds / 1e9, 1),
        "step_share_of_peak": round(work / seconds / peak, 3),
        "floor_seconds": {"step": round(work / peak, 3), "reference": round(2 * (body * unique + head * replies) / peak, 3)},
        "peak_rss_mb": memory,
        "floor_mb": {
            "libraries": round(library, 1),
            **dict(zip(("weights", "gradients", "first moment", "second moment"), (round(size, 1) for size in state), strict=True)),
        },
    }


def shares(events: Any) -> dict[str, float]:
    """Share of operators' own time by group; what fits none is `elementwise and other`."""
    sums = dict.fromkeys([*GROUPS, "elementwise and other"], 0.0)
    for event in events:
        group = next((name for name, parts in GROUPS.items() if any(part in event.key for part in parts)), "elementwise and other")
        sums[group] += event.self_cpu_time_total
    total = sum(sums.values())
    return {name: round(value / total, 4) for name, value in sums.items()}


if __name__ == "__main__":
    main()
