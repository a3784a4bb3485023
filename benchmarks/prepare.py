"""Rows a second and peak memory of preparing preference pairs: `equipoise data prepare` beside TRL's DPOTrainer.

    python benchmarks/prepare.py --rows 2000 10000 50000 --json

Both sides start from the same file of JSON lines (TRL's conversational columns), with the same tokenizer, each size in a
process of its own. TRL's side is its own code: a trainer is built on a tiny random model, and the time is that of
`datasets.load_dataset("json")` and the trainer's `_prepare_dataset`. Ours is `prepare`: rows, accounting and prints on disk.
Rows are real HH-RLHF ones where EQUIPOISE_DATA (or ../shared/data) has them, varied beyond their number, else made up.
Seconds are wall-clock; CPU seconds count all threads and processes. Memory is the process's peak resident set in the timed
part, and beyond what it held just before (imports, tokenizer, trainer), both in MB (10⁶ bytes, unlike the MiB of the other
benchmarks); further processes are not counted. One JSON object on stdout, logs on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _common as common

SIDES = ("equipoise", "equipoise, one thread", "equipoise, two processes", "trl", "trl, two processes")
MAX_LENGTH = 1024
Side = tuple[Callable[[], Any], Callable[[Any], dict[str, int]]]
"""What is timed, and then how many rows and tokens it made."""


def main() -> None:
    """Run all sides at all sizes, in turn, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2000, 10000, 50000], help="sizes, in rows")
    parser.add_argument("--trl-rows", type=int, default=10000, help="the largest size TRL is asked for")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each size and side; medians are reported")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--tokenizer", default="smollm2-135m-instruct", help="asset name, local folder, or hub name")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of an indented object")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(work(given.worker[0], Path(given.worker[1]), given.tokenizer)))
        return
    result = compare(sorted(given.rows), given.trl_rows, given.repeats, given.tokenizer, given.sides)
    print(json.dumps(result, indent=None if given.json else 2))


def compare(sizes: list[int], trl_rows: int, repeats: int, tokenizer: str, sides: list[str]) -> dict[str, Any]:
    """Everything measured, and the ratios at the largest size both sides did."""
    from equipoise.core.runs import environment

    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for rows in sizes:
            path = Path(scratch) / f"pairs-{rows}.jsonl"
            real = write_rows(path, rows)
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides if not side.startswith("trl") or rows <= trl_rows}
            for _ in range(repeats):
                for side, done in runs.items():
                    done.append(run_side(side, path, tokenizer))
                    common.log(f"{rows} rows, {side}: {done[-1]}")
            measured += [{"side": side, "rows": rows, "real_rows": real, **summary(done, rows)} for side, done in runs.items()]
            path.unlink()
    versions = common.versions()
    packages = {name: versions.get(name) for name in ("trl", "tokenizers")}
    return {
        "schema_version": 1,
        "benchmark": "prepare",
        "command": " ".join(["python", *sys.argv]),
        "environment": environment() | packages | {"load_average": os.getloadavg()[0]},
        "max_length": MAX_LENGTH,
        "measured": measured,
        "scaling": {side: scaling([item for item in measured if item["side"] == side]) for side in sides},
        "ratios": ratios(measured),
    }


def run_side(side: str, path: Path, tokenizer: str) -> dict[str, Any]:
    """One side in a fresh process."""
    # A process that has used the tokenizer's threads may not fork: ours does not, TRL's does where it is asked for several.
    threads = "false" if side.endswith(("one thread", "two processes")) else "true"
    command = [sys.executable, __file__, "--worker", side, str(path), "--tokenizer", tokenizer]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | {"TOKENIZERS_PARALLELISM": threads})
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summary(runs: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """Medians of the repeats."""
    middle = {name: statistics.median(run[name] for run in runs) for name in ("seconds", "cpu_seconds", "peak_mb", "peak_over_base_mb")}
    return {
        "rows_kept": runs[0]["rows"],
        "tokens": runs[0]["tokens"],
        "seconds": round(middle["seconds"], 3),
        "cpu_seconds": round(middle["cpu_seconds"], 3),
        "rows_per_second": round(rows / middle["seconds"], 1),
        "rows_per_cpu_second": round(rows / middle["cpu_seconds"], 1),
        "peak_mb": round(middle["peak_mb"], 1),
        "peak_over_base_mb": round(middle["peak_over_base_mb"], 1),
        "repeats": len(runs),
    }


def scaling(measured: list[dict[str, Any]]) -> dict[str, float] | None:
    """How time and memory grow from the smallest to the largest size: 1 is linear time, bytes a row by least squares."""
    if len(measured) < 2:
        return None
    first, last = measured[0], measured[-1]
    sizes = [float(item["rows"]) for item in measured]
    slope = statistics.linear_regression(sizes, [item["peak_mb"] * 1e6 for item in measured]).slope
    return {
        "from_rows": first["rows"],
        "to_rows": last["rows"],
        "cpu_per_row_ratio": round(first["rows_per_cpu_second"] / last["rows_per_cpu_second"], 3),
        "seconds_per_row_ratio": round(first["rows_per_second"] / last["rows_per_second"], 3),
        "peak_bytes_per_row": round(slope, 1),
    }


def ratios(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours against TRL's at the largest size TRL did: throughput above 1 and memory below 1 are in our favour."""
    trl = [item for item in measured if item["side"] == "trl"]
    if not trl:
        return {}
    rows = trl[-1]["rows"]
    sides = {item["side"]: item for item in measured if item["rows"] == rows}
    found: dict[str, Any] = {"rows": rows}
    pairs = [(side, "trl") for side in sides if not side.startswith("trl")] + [("equipoise, two processes", "trl, two processes")]
    for ours, theirs in pairs:
        if ours in sides and theirs in sides:
            one, other = sides[ours], sides[theirs]
            found[f"{ours} over {theirs}"] = {
                "throughput": round(one["rows_per_second"] / other["rows_per_second"], 2),
                "throughput_per_cpu_second": round(one["rows_per_cpu_second"] / other["rows_per_cpu_second"], 2),
                "memory": round(one["peak_mb"] / other["peak_mb"], 3),
                "memory_over_base": round(one["peak_over_base_mb"] / max(other["peak_over_base_mb"], 0.1), 3),
            }
    return found


def work(side: str, path: Path, name: str) -> dict[str, Any]:
    """In the worker: one side, timed."""
    from equipoise.models.load import load_tokenizer

    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        os.environ["HF_DATASETS_CACHE"] = f"{scratch}/datasets"  # read on import: nothing may come from an earlier run
        processes = 2 if side.endswith("two processes") else 1
        run, count = (trl_side if side.startswith("trl") else our_side)(path, load_tokenizer(name), Path(scratch), processes)
        common.reset_peak_rss()
        base = common.peak_rss()
        wall, cpu = time.perf_counter(), cpu_seconds()
        made = run()
        taken = {"seconds": time.perf_counter() - wall, "cpu_seconds": cpu_seconds() - cpu}
        peak = common.peak_rss()
        return {**taken, "peak_mb": peak / 1e6, "peak_over_base_mb": (peak - base) / 1e6, **count(made)}


def cpu_seconds() -> float:
    """Of this process and those it started that have ended."""
    import resource

    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def our_side(path: Path, tokenizer: Any, scratch: Path, processes: int) -> Side:
    """`prepare` of the file, all imports done."""
    from equipoise.data.prepare import prepare
    from equipoise.data.settings import DataSettings, PrepareSettings, TokeniseSettings

    data, limits = DataSettings(dataset_name=str(path)), TokeniseSettings(max_length=MAX_LENGTH)
    settings = PrepareSettings(data=data, tokenise=limits, dataset_num_proc=processes, output_dir=str(scratch / "rows"))

    def run() -> Any:
        return prepare(settings, tokenizer).results

    def count(results: Any) -> dict[str, int]:
        return {"rows": results["rows"], "tokens": results["tokens"]}

    return run, count


def trl_side(path: Path, tokenizer: Any, scratch: Path, processes: int) -> Side:
    """A DPOTrainer's own preparation of the file; the trainer is built on one pair before."""
    import datasets
    import transformers
    import trl

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    # From a folder, not from memory: TRL loads the reference once more by its name.
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(scratch / "tiny")
    several = {"dataset_num_proc": processes} if processes > 1 else {}
    settings = trl.DPOConfig(output_dir=str(scratch / "trl"), max_length=MAX_LENGTH, report_to="none", use_cpu=True, **several)
    one = {"prompt": [turn("user", "a")], "chosen": [turn("assistant", "b")], "rejected": [turn("assistant", "c")]}
    trainer = trl.DPOTrainer(
        str(scratch / "tiny"), args=settings, train_dataset=datasets.Dataset.from_list([one]), processing_class=tokenizer
    )

    def run() -> Any:
        loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(scratch / "datasets"))
        return trainer._prepare_dataset(loaded, tokenizer, settings, "train")

    def count(made: Any) -> dict[str, int]:
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        return {"rows": len(made), "tokens": sum(len(ids) for column in columns for ids in made[column])}

    return run, count


def write_rows(path: Path, rows: int) -> int:
    """Write so many pairs as JSON lines; how many of them are real rows as they are."""
    real = real_pairs()
    pairs = real or list(made_up_pairs(2000))
    words = sorted({word for pair in pairs for side in pair.values() for message in side for word in message["content"].split(" ")})
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            pair = pairs[number % len(pairs)]
            if number >= len(pairs):
                pair = {
                    name: [message | {"content": varied(message["content"], words, draw)} for message in side]
                    for name, side in pair.items()
                }
            stream.write(json.dumps({"id": f"pair-{number}", **pair}, ensure_ascii=False) + "\n")
    return min(rows, len(real))


def varied(text: str, words: list[str], draw: random.Random) -> str:
    """The text with every tenth word or so replaced by another word of the data."""
    parts = text.split(" ")
    for _ in range(1 + len(parts) // 10):
        parts[draw.randrange(len(parts))] = words[draw.randrange(len(words))]
    return " ".join(parts) if any(part.strip() for part in parts) else text


def real_pairs() -> list[dict[str, list[dict[str, str]]]]:
    """HH-RLHF rows in TRL's conversational columns, as far as they are at hand and both sides answer one prompt."""
    path = common.hh_file()
    if path is None:
        return []
    from equipoise.data.load import load
    from equipoise.data.settings import DataSettings

    return [
        {
            "prompt": [message.as_dict() for message in record.prompt],
            **{reply.role: [turn("assistant", reply.text)] for reply in record.replies},
        }
        for record in load(DataSettings(dataset_name=str(path))).records
    ]


def made_up_pairs(count: int) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Pairs of made-up words, as long as HH-RLHF's on average, common words common."""
    draw = random.Random(1)
    syllables = [first + vowel + last for first in "bdfgklmnprst" for vowel in "aeiou" for last in ("", "n", "r", "s", "t")]
    vocabulary = ["".join(draw.choices(syllables, k=1 + number % 3)) for number in range(5000)]
    weights = [1 / (1 + number) for number in range(len(vocabulary))]

    def said(role: str, mean: int) -> dict[str, str]:
        return turn(role, " ".join(draw.choices(vocabulary, weights, k=1 + int(draw.expovariate(1 / mean)))))

    for _ in range(count):
        earlier = [said(role, 25) for _ in range(draw.randrange(3)) for role in ("user", "assistant")]
        yield {"prompt": [*earlier, said("user", 20)], "chosen": [said("assistant", 40)], "rejected": [said("assistant", 40)]}


def turn(role: str, content: str) -> dict[str, str]:
    """One message."""
    return {"role": role, "content": content}


if __name__ == "__main__":
    main()
