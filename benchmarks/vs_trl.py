"""equipoise beside TRL on this machine: the same model, token rows, order, optimizer and precision, in turn, losses compared.

    python benchmarks/vs_trl.py --rows 128 --json
    python benchmarks/vs_trl.py --shape llama-3.2-1b --rows 1024 --repeats 2 --batch-size 64 --dtype bfloat16   one GPU, no network

Sides: `ours` (equipoise's `fit` with its defaults), `default` (TRL as it comes: 8 pairs a micro-batch, gradient checkpointing,
the reference in every step) and `tuned` (the fastest of several micro-batches, reference precomputed, found on the first rows:
on a CPU with and without gradient checkpointing; on a GPU without, unless nothing fits, and also with Liger's kernels where
they are installed). Rows are cut into `--repeats` blocks; every side runs a block before the next block begins, so what slows
the machine slows all of them: on a CPU each time in a new process, whose peak memory is its own; on a GPU in one process a
side, which first runs a step to compile and warm up. Seconds are those of the reference pass and of training; loading,
tokenising and TRL's own data preparation are left out (see `prepare.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _common as common

CHILD = Path(__file__).with_name("_trl_sides.py")
MICRO_BATCHES = {"cpu": (1, 2, 4), "cuda": (4, 8, 16)}
TRL_MICRO_BATCH = 8
NEAR = 1.2


def main() -> None:
    """Parse, measure, print one JSON object."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        if arguments.shape:
            arguments.model = folder
            rows = random_model_and_rows(arguments, folder)
        else:
            rows = token_rows(arguments)
        compare(arguments, rows)


def compare(arguments: argparse.Namespace, rows: list[dict[str, list[int]]]) -> None:
    """Search TRL's settings, run the blocks, print."""
    memory, started = common.memory_key(arguments.device), time.monotonic()
    base = {
        "device": arguments.device,
        "model": arguments.model,
        "objective": arguments.objective,
        "dtype": arguments.dtype,
        "lora": arguments.lora,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate or (2e-5 if arguments.lora else 1e-6),
        "threads": arguments.threads,
    }
    default = {"micro_batch": min(TRL_MICRO_BATCH, arguments.batch_size), "gradient_checkpointing": True, "precompute": False}
    ours = {"token_budget": arguments.token_budget} if arguments.token_budget else {}
    sides: dict[str, dict[str, Any]] = {"ours": ours, "tuned": {}, "default": default}
    searched: list[dict[str, Any]] = []
    cuda = arguments.device == "cuda"
    workers = {name: Worker(arguments.device) for name in arguments.sides}
    if cuda:
        for name in ("ours", "default"):
            if name in workers:
                workers[name].run(base | {"side": name, "settings": sides[name], "rows": rows[: arguments.batch_size]})
                common.log(f"{name} is warm")
    if "tuned" in arguments.sides:
        # Liger patches the model's classes for the whole process, so it has one of its own.
        liger = Worker(arguments.device) if cuda and find_spec("liger_kernel") else None
        chosen, searched = search(workers["tuned"], liger, base, rows[: arguments.search_rows], arguments.micro_batches)
        sides["tuned"] = chosen
        if liger is not None:
            unused = workers["tuned"] if "liger" in chosen else liger
            workers["tuned"] = liger if "liger" in chosen else workers["tuned"]
            unused.close()
    size = -(-len(rows) // arguments.repeats)
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    limits = {name: limit for name, limit in (("default", arguments.default_blocks), ("tuned", arguments.tuned_blocks)) if limit}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.sides}
    for number, block in enumerate(blocks):
        turn = number % len(arguments.sides)
        for name in arguments.sides[turn:] + arguments.sides[:turn]:
            if number >= limits.get(name, len(blocks)) or (number and time.monotonic() - started > arguments.budget_seconds):
                continue
            job = base | {"side": name, "settings": sides[name], "rows": block}
            result = workers[name].try_run(job) if number else workers[name].run(job)
            if "error" in result:  # what the blocks before have shown is worth having
                common.log(f"block {number + 1} of {len(blocks)}, {name}: {result['error']}")
                limits[name] = number
                continue
            runs[name].append(result)
            common.log(f"block {number + 1} of {len(blocks)}, {name}: {total(runs[name][-1]):.1f} s, {runs[name][-1][memory]:.0f} MiB")
    for worker in workers.values():
        worker.close()
    peak = matmul_peak(arguments.dtype, arguments.threads, arguments.device)
    results = summarise(arguments, blocks, runs, peak)
    settings = {**vars(arguments), "rows": len(rows), "sides": {name: sides[name] for name in arguments.sides}, "blocks": len(blocks)}
    common.report("vs_trl", settings, results | {"search": searched}, one_line=arguments.json)


def search(
    plain: Worker, liger: Worker | None, base: dict[str, Any], rows: list[dict[str, list[int]]], micro_batches: Sequence[int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The fastest TRL settings on a few rows, and what each of them took or why it failed.

    On a CPU, whose speed moves by a tenth, all within a fifth of the fastest run once more, and the better of their two times counts.
    """
    cuda = base["device"] == "cuda"
    tried = []
    job = base | {"side": "tuned", "rows": rows, "batch_size": len(rows)}
    if cuda:  # the first run pays for what is compiled and loaded once
        plain.try_run(job | {"settings": _trl_settings(micro_batches[0], False)})

    def attempt(worker: Worker, settings: dict[str, Any]) -> None:
        result = worker.try_run(job | {"settings": settings})
        tried.append(settings | ({"seconds": round(total(result), 3)} if "error" not in result else {}) | _facts(result))
        common.log(f"search {tried[-1]}")

    def best() -> dict[str, Any]:
        done = [item for item in tried if "error" not in item]
        if not done:
            raise SystemExit("none of TRL's settings ran")
        return min(done, key=lambda item: item["seconds"])

    # A micro-batch larger than the step would be another recipe.
    sizes = [micro for micro in micro_batches if micro <= len(rows)]
    for micro in sizes:
        for checkpointing in (False,) if cuda else (False, True):
            attempt(plain, _trl_settings(micro, checkpointing))
    if all("error" in item for item in tried):
        attempt(plain, _trl_settings(sizes[0], True))
    near = [item for item in tried if "error" not in item and item["seconds"] <= NEAR * best()["seconds"]]
    if not cuda and len(near) > 1:
        for item in near:
            attempt(plain, _trl_settings(item["micro_batch"], item["gradient_checkpointing"]))
    if liger is not None:  # it takes less memory, so also sizes that did not fit without
        liger.try_run(job | {"settings": _trl_settings(sizes[0], False) | {"liger": True}})
        for micro in [size for size in sizes if size >= best()["micro_batch"]]:
            attempt(liger, _trl_settings(micro, False) | {"liger": True})
    return {name: best()[name] for name in ("micro_batch", "gradient_checkpointing", "precompute", "liger") if name in best()}, tried


def _trl_settings(micro_batch: int, checkpointing: bool) -> dict[str, Any]:
    return {"micro_batch": micro_batch, "gradient_checkpointing": checkpointing, "precompute": True}


def _facts(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name in ("error", "peak_rss_mb", "peak_device_mb")}


class Worker:
    """One side's process. On a CPU every job has a new one: its peak memory is its own, and nothing is left over for the next."""

    def __init__(self, device: str) -> None:
        self.lasting = device == "cuda"
        self._process: Any = None
        if self.lasting:
            self._start()

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Do a job; end everything where it fails."""
        result = self.try_run(job)
        if "error" in result:
            raise SystemExit(f"the side {job['side']} failed with {job['settings']}: {result['error']}")
        return result

    def try_run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The same with an `error` where it fails. What the process says goes to stderr where it failed."""
        if self._process is None:
            self._start()
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        result: dict[str, Any] = json.loads(line) if line else {"error": f"it ended with code {self._process.wait()}"}
        if "error" in result:
            self._said.seek(0)
            sys.stderr.write(self._said.read()[-4000:])
        if not self.lasting or not line:
            self.close()
        return result

    def _start(self) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
            self._said.close()
            self._process = None


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


def random_model_and_rows(arguments: argparse.Namespace, folder: str) -> list[dict[str, list[int]]]:
    """Saves random weights of a known shape and a tokenizer of nothing but special tokens; rows of random tokens, long as the data's."""
    import torch
    from _gpu_sides import SHAPES, TINY, make_model, make_rows
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    shape = (SHAPES | TINY)[arguments.shape]
    make_model(shape, torch.device(arguments.device)).save_pretrained(folder)
    if arguments.device == "cuda":
        torch.cuda.empty_cache()  # this process only waits for the others from now on
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(special.values())}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    kind = {"hh": "hh", "demos": "ultrafeedback"}[arguments.data]
    rows = make_rows(kind, arguments.rows, shape["vocab_size"])
    return [{"prompt": row.prompt.tolist()} | {branch.role: branch.ids.tolist() for branch in row.branches} for row in rows]


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
    memory = common.memory_key(arguments.device)
    sides = {}
    for name, done in runs.items():
        seconds = [total(run) for run in done]
        sides[name] = {
            "unique_tokens_per_second": common.summary([tokens / spent for tokens, spent in zip(unique, seconds, strict=False)]),
            "seconds": common.summary(seconds),
            "blocks": len(done),
            "reference_seconds": common.summary([run["reference_seconds"] for run in done]),
            memory: common.summary([run[memory] for run in done]),
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
            f"memory_vs_{name}": [mine[memory] / theirs[memory] for mine, theirs in pairs],
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


def matmul_peak(dtype: str, threads: int, device: str) -> float:
    """FLOPs a second of the fastest of several matrix products, each the best of some tries: the most this machine shows."""
    import torch

    cuda = device == "cuda"
    if not cuda:
        torch.set_num_threads(threads)
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    best = 0.0
    sizes = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (1024, 576, 1536))
    for rows, inner, columns in ((4096, 4096, 4096), (8192, 8192, 8192)) if cuda else sizes:
        left, right = torch.randn(rows, inner, device=device).to(kind), torch.randn(columns, inner, device=device).to(kind)
        for _ in range(8):
            begin = time.perf_counter()
            torch.nn.functional.linear(left, right)
            if cuda:
                torch.cuda.synchronize()
            best = max(best, 2.0 * rows * inner * columns / (time.perf_counter() - begin))
    return best


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="pairs, over all blocks")
    parser.add_argument("--repeats", type=int, default=4, help="blocks the rows are cut into")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shape", default=None, help="in place of a model: random weights of this shape (see _gpu_sides.py), random rows")
    parser.add_argument("--scratch", default=None, help="folder for that model; default: the system's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None, help="default: cuda where there is one")
    parser.add_argument("--data", choices=["hh", "demos"], default="hh", help="hh: HH-RLHF harmless; demos: short prompts, long replies")
    parser.add_argument("--objective", choices=["dpo", "sft", "orpo", "simpo"], default="dpo")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast over float32 weights")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs an optimizer step, on every side")
    parser.add_argument("--learning-rate", type=float, default=None, help="default: 1e-6, with LoRA 2e-5")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--token-budget", type=int, default=None, help="of our micro-batches; default: the setting's own")
    parser.add_argument(
        "--search-rows", type=int, default=None, help="rows on which TRL's settings are searched; default: 8, on a GPU a batch"
    )
    parser.add_argument(
        "--micro-batches", type=int, nargs="+", default=None, help="the ones tried for TRL; default: 1 2 4, on a GPU 4 8 16"
    )
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no further block after this long")
    parser.add_argument("--default-blocks", type=int, default=None, help="run the slow default side on the first blocks only")
    parser.add_argument("--tuned-blocks", type=int, default=None, help="the same for the tuned side")
    parser.add_argument("--sides", nargs="+", default=["ours", "tuned", "default"], choices=["ours", "tuned", "default"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="the JSON object on one line")
    arguments = parser.parse_args()
    if arguments.device is None:
        import torch

        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.micro_batches = arguments.micro_batches or MICRO_BATCHES[arguments.device]
    arguments.search_rows = min(arguments.search_rows or (arguments.batch_size if arguments.device == "cuda" else 8), arguments.batch_size)
    return arguments


if __name__ == "__main__":
    main()
