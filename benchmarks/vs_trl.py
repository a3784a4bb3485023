"""equipoise beside TRL on this machine: the same model, token rows, order, optimizer and precision, in turn, losses compared.

    python benchmarks/vs_trl.py --rows 128 --json

Sides: `ours` (equipoise's `fit` with its defaults), `default` (TRL as it comes: 8 pairs a micro-batch, gradient checkpointing,
the reference in every step) and `tuned` (the fastest of micro-batch 1, 2, 4 with and without gradient checkpointing, reference
precomputed, found on the first rows). Rows are cut into `--repeats` blocks; every side runs a block in a process of its own
before the next block begins, so what slows the machine slows all of them. Seconds are those of the reference pass and of
training; loading, tokenising and TRL's own data preparation are left out (see `prepare.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _common as common

CHILD = Path(__file__).with_name("_trl_sides.py")
MICRO_BATCHES = (1, 2, 4)


def main() -> None:
    """Parse, measure, print one JSON object."""
    arguments = _arguments()
    rows = token_rows(arguments)
    base = {
        "model": arguments.model,
        "objective": arguments.objective,
        "dtype": arguments.dtype,
        "lora": arguments.lora,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate or (2e-5 if arguments.lora else 1e-6),
        "threads": arguments.threads,
    }
    default = {"micro_batch": arguments.batch_size, "gradient_checkpointing": True, "precompute": False}
    ours = {"token_budget": arguments.token_budget} if arguments.token_budget else {}
    sides: dict[str, dict[str, Any]] = {"ours": ours, "tuned": {}, "default": default}
    searched: list[dict[str, Any]] = []
    if "tuned" in arguments.sides:
        sides["tuned"], searched = search(base, rows[: arguments.search_rows])
    size = -(-len(rows) // arguments.repeats)
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    limits = {name: limit for name, limit in (("default", arguments.default_blocks), ("tuned", arguments.tuned_blocks)) if limit}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.sides}
    for number, block in enumerate(blocks):
        turn = number % len(arguments.sides)
        for name in arguments.sides[turn:] + arguments.sides[:turn]:
            if number >= limits.get(name, len(blocks)):
                continue
            runs[name].append(child(base | {"side": name, "settings": sides[name], "rows": block}))
            common.log(
                f"block {number + 1} of {len(blocks)}, {name}: {total(runs[name][-1]):.1f} s, {runs[name][-1]['peak_rss_mb']:.0f} MiB"
            )
    peak = matmul_peak(arguments.dtype, arguments.threads)
    results = summarise(arguments, blocks, runs, peak)
    settings = {**vars(arguments), "rows": len(rows), "sides": {name: sides[name] for name in arguments.sides}, "blocks": len(blocks)}
    common.report("vs_trl", settings, results | {"search": searched}, one_line=arguments.json)


def search(base: dict[str, Any], rows: list[dict[str, list[int]]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The fastest TRL settings on a few rows, and what each of them took."""
    tried = []
    for micro_batch in MICRO_BATCHES:
        for checkpointing in (False, True):
            settings = {"micro_batch": micro_batch, "gradient_checkpointing": checkpointing, "precompute": True}
            result = child(base | {"side": "tuned", "settings": settings, "rows": rows, "batch_size": len(rows)})
            tried.append(settings | {"seconds": round(total(result), 3), "peak_rss_mb": result["peak_rss_mb"]})
            common.log(f"search {settings}: {tried[-1]['seconds']} s, {tried[-1]['peak_rss_mb']:.0f} MiB")
    best = min(tried, key=lambda item: item["seconds"])
    return {name: best[name] for name in ("micro_batch", "gradient_checkpointing", "precompute")}, tried


def child(job: dict[str, Any]) -> dict[str, Any]:
    """Run one side in its own process: its peak memory is its own, and nothing is left over for the next."""
    done = subprocess.run([sys.executable, str(CHILD)], input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr[-4000:])
        raise SystemExit(f"the side {job['side']} failed with {job['settings']}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def total(run: dict[str, Any]) -> float:
    """Seconds of the reference pass and of training."""
    return float(run["reference_seconds"] + run["train_seconds"])


def token_rows(arguments: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Prompt and reply ids of the first rows, under the model's own tokenizer and chat template."""
    from equipoise.data.load import load
    from equipoise.data.settings import DataSettings, TokeniseSettings
    from equipoise.data.tokenise import tokenise
    from equipoise.models.load import load_tokenizer

    if arguments.data == "hh":
        records = common.preference_records(arguments.rows + 16)[1]
    else:
        folder = common.data_folder()
        records = load(DataSettings(dataset_name=str(folder / "trl-style-demos" / "dpo_en_demo.json"))).records
    limit = TokeniseSettings(max_length=arguments.max_length)
    rows, _ = tokenise(records, load_tokenizer(arguments.model), limit, ("chosen", "rejected"))
    if len(rows) < arguments.rows:
        raise SystemExit(f"only {len(rows)} rows are at hand, {arguments.rows} asked for")
    return [
        {"prompt": row.prompt.tolist()} | {branch.role: branch.ids.tolist() for branch in row.branches} for row in rows[: arguments.rows]
    ]


def summarise(
    arguments: argparse.Namespace, blocks: list[list[dict[str, list[int]]]], runs: dict[str, list[dict[str, Any]]], peak: float
) -> dict[str, Any]:
    """Rates, shares of the peak, loss curves and ratios. Ratios are medians over blocks; each block compares the same rows."""
    roles = ("chosen",) if arguments.objective == "sft" else ("chosen", "rejected")
    unique = [sum(len(row["prompt"]) + sum(len(row[role]) for role in roles) for row in block) for block in blocks]
    replies = [sum(len(row[role]) for row in block for role in roles) for block in blocks]
    body, head = model_weights(arguments.model)
    passes = (4 if arguments.lora else 6) + (2 if arguments.objective == "dpo" else 0)
    work = [passes * (body * tokens + head * scored) for tokens, scored in zip(unique, replies, strict=True)]
    sides = {}
    for name, done in runs.items():
        seconds = [total(run) for run in done]
        sides[name] = {
            "unique_tokens_per_second": common.summary([tokens / spent for tokens, spent in zip(unique, seconds, strict=False)]),
            "seconds": common.summary(seconds),
            "blocks": len(done),
            "reference_seconds": common.summary([run["reference_seconds"] for run in done]),
            "peak_rss_mb": common.summary([run["peak_rss_mb"] for run in done]),
            "useful_gflops": common.summary([flops / spent / 1e9 for flops, spent in zip(work, seconds, strict=False)]),
            "share_of_matmul_peak": common.summary([flops / spent / peak for flops, spent in zip(work, seconds, strict=False)]),
            "losses": [run["losses"] for run in done],
        }
    ratios: dict[str, float] = {}
    spread: dict[str, Any] = {}
    furthest: dict[str, float] = {}
    for name in ("default", "tuned"):
        if name not in runs or "ours" not in runs:
            continue
        pairs = list(zip(runs["ours"], runs[name], strict=False))  # a slow side may have run the first blocks only
        for what, values in {
            f"throughput_vs_{name}": [total(theirs) / total(mine) for mine, theirs in pairs],
            f"memory_vs_{name}": [mine["peak_rss_mb"] / theirs["peak_rss_mb"] for mine, theirs in pairs],
        }.items():
            ratios[what] = round(statistics.median(values), 3)
            spread[what] = common.summary(values)
        furthest[name] = max(
            abs(one - other) for mine, theirs in pairs for one, other in zip(mine["losses"], theirs["losses"], strict=True)
        )
    return {
        "ratios": ratios,
        "ratios_over_blocks": spread,
        "largest_loss_difference": furthest,
        "tokens": {"unique": sum(unique), "reply": sum(replies)},
        "matmul_peak_gflops": round(peak / 1e9, 1),
        "useful_flops": "(6, with LoRA 4, and 2 more for a reference) x (body weights x unique tokens + head weights x reply tokens)",
        "sides": sides,
    }


def model_weights(name: str) -> tuple[int, int]:
    """Weights of the body and of the output layer that take part in matrix products."""
    from equipoise.models.load import load_causal

    model: Any = load_causal(name)
    embeddings = model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings().weight
    everything = sum(parameter.numel() for parameter in model.parameters())
    tied = head is model.get_input_embeddings().weight
    return everything - embeddings - (0 if tied else head.numel()), head.numel()


def matmul_peak(dtype: str, threads: int) -> float:
    """FLOPs a second of the fastest of several matrix products, each the best of some tries: the most this machine shows."""
    import torch

    torch.set_num_threads(threads)
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    best = 0.0
    for rows, inner, columns in ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (1024, 576, 1536)):
        left, right = torch.randn(rows, inner).to(kind), torch.randn(columns, inner).to(kind)
        for _ in range(8):
            begin = time.perf_counter()
            torch.nn.functional.linear(left, right)
            best = max(best, 2.0 * rows * inner * columns / (time.perf_counter() - begin))
    return best


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="pairs, over all blocks")
    parser.add_argument("--repeats", type=int, default=4, help="blocks the rows are cut into")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", choices=["hh", "demos"], default="hh", help="hh: HH-RLHF harmless; demos: short prompts, long replies")
    parser.add_argument("--objective", choices=["dpo", "sft", "orpo", "simpo"], default="dpo")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast over float32 weights")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs an optimizer step, on every side")
    parser.add_argument("--learning-rate", type=float, default=None, help="default: 1e-6, with LoRA 2e-5")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--token-budget", type=int, default=None, help="of our micro-batches; default: the setting's own")
    parser.add_argument("--search-rows", type=int, default=8, help="rows on which TRL's settings are searched")
    parser.add_argument("--default-blocks", type=int, default=None, help="run the slow default side on the first blocks only")
    parser.add_argument("--tuned-blocks", type=int, default=None, help="the same for the tuned side")
    parser.add_argument("--sides", nargs="+", default=["ours", "tuned", "default"], choices=["ours", "tuned", "default"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="the JSON object on one line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
