"""How far the estimate of `equipoise train --plan` is from what a run takes: peak memory and time, on this CPU.

    python benchmarks/plan_error.py --only full-512 --only lora-1024

Each setting runs in a process of its own, for an honest peak of resident memory: two optimizer steps of DPO on real pairs
(HH, from the data folder of `_common.py`), after that process has measured its own speed. Memory is the process's
largest resident size over its whole life; time is the wall seconds of the reference pass and of the steps, so run it on a quiet
machine. The estimate knows settings and row lengths only. Prints one JSON object; logs go to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from typing import Any

import _common as common

SETTINGS: dict[str, dict[str, Any]] = {
    "full-512": {"token_budget": 512},
    "full-1024": {"token_budget": 1024},
    "full-2048": {"token_budget": 2048},
    "full-bfloat16-1024": {"token_budget": 1024, "dtype": "bfloat16"},
    "full-autocast-1024": {"token_budget": 1024, "bf16": True},
    "full-checkpointing-1024": {"token_budget": 1024, "gradient_checkpointing": True},
    "full-checkpointing-2048": {"token_budget": 2048, "gradient_checkpointing": True},
    "lora-512": {"token_budget": 512, "use_peft": True},
    "lora-1024": {"token_budget": 1024, "use_peft": True},
    "lora-2048": {"token_budget": 2048, "use_peft": True},
    "lora-checkpointing-2048": {"token_budget": 2048, "use_peft": True, "gradient_checkpointing": True},
}
MODEL = "smollm2-135m-instruct"


def settings_of(name: str, rows: int, steps: int, folder: str) -> Any:
    """The run of one setting: `steps` optimizer steps over `rows` pairs."""
    from equipoise.training.settings import TrainSettings

    pairs = common.hh_file()
    if pairs is None:
        raise SystemExit(f"no hh-harmless-base/pairs.jsonl.gz in {common.data_folder()}; EQUIPOISE_DATA names another data folder")
    return TrainSettings.make(
        {
            "model_name_or_path": MODEL,
            "output_dir": f"{folder}/run",
            "reference_store": f"{folder}/store",
            "streams": [{"data": {"dataset_name": str(pairs), "max_rows": rows}, "objective": {"name": "dpo"}}],
            "tokenise": {"max_length": 512},
            "per_device_train_batch_size": rows // steps,
            "max_steps": steps,
            "learning_rate": 1e-6,
            **SETTINGS[name],
        }
    )


def run_one(name: str, rows: int, steps: int, folder: str) -> dict[str, Any]:
    """In a process of its own: measure the machine, train, and say what it took."""
    from transformers import TrainerCallback

    from equipoise.training.fit import fit
    from equipoise.training.machine import measure

    class SecondsOfSteps(TrainerCallback):
        """Seconds inside optimizer steps, and the largest resident size until training began and until its last step."""

        seconds = 0.0
        start = 0.0
        before = 0
        after = 0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.before = common.peak_rss()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds += time.perf_counter() - self.start
            self.after = common.peak_rss()
            common.log(f"{name}: {self.before / 1e9:.2f} GB before training, {self.after / 1e9:.2f} GB after a step")

    imported = common.peak_rss()
    speed = measure(seconds=1.0)
    watch = SecondsOfSteps()
    start = time.perf_counter()
    done = fit(settings_of(name, rows, steps, folder), callbacks=[watch])
    cost = done.results["cost"]
    return {
        "machine": speed.as_json(),
        "form": done.results["form"],
        "tokens": cost["unique_tokens"],
        "imported": imported,
        "peak_before_training": watch.before,
        "peak_after_steps": watch.after,
        "peak": common.peak_rss(),
        "train_seconds": watch.seconds,
        "reference_seconds": cost["reference_seconds"],
        "all_seconds": time.perf_counter() - start,
    }


def compare(name: str, rows: int, steps: int) -> dict[str, Any]:
    """Estimate one setting, then run it; errors in percent of what was measured, positive where too much was estimated."""
    from equipoise.models.load import load_tokenizer
    from equipoise.objectives._load import build
    from equipoise.training._rows import make_streams
    from equipoise.training.estimate import Estimator
    from equipoise.training.machine import Machine

    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(name, rows, steps, folder)
        objective = build(settings.streams[0].objective)
        train, _ = make_streams(settings, [objective], load_tokenizer(MODEL), None, None)
        lengths = [(len(row.prompt), tuple(len(branch.ids) for branch in row.branches)) for row in train[0].rows]
        started = time.perf_counter()
        estimator = Estimator(settings, [lengths], Machine("cpu", 1.0, 1.0, 1.0))
        memory = estimator.estimate().memory
        took = time.perf_counter() - started
        words = [sys.executable, __file__, "--child", name, "--rows", str(rows), "--steps", str(steps), "--folder", folder]
        result = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        measured = json.loads(result.stdout.strip().splitlines()[-1])
        estimator.machine = Machine(**measured["machine"])
        estimate = estimator.estimate()
    seconds, spent = estimate.train_seconds + estimate.reference_seconds, measured["train_seconds"] + measured["reference_seconds"]
    return {
        "setting": name,
        "memory_error_percent": round(100 * (memory.peak / measured["peak"] - 1), 1),
        "time_error_percent": round(100 * (seconds / spent - 1), 1),
        "estimate": estimate.as_json(),
        "measured": measured,
        "estimating_seconds": round(took, 2),
    }


def main() -> None:
    """Compare every setting asked for and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=sorted(SETTINGS), help="settings to compare (default: all)")
    parser.add_argument("--rows", type=int, default=12, help="pairs")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps over them")
    parser.add_argument("--child", choices=sorted(SETTINGS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(run_one(chosen.child, chosen.rows, chosen.steps, chosen.folder)))
        return
    import torch

    results = []
    for name in chosen.only or list(SETTINGS):
        results.append(compare(name, chosen.rows, chosen.steps))
        last = results[-1]
        common.log(f"{name}: memory {last['memory_error_percent']:+} %, time {last['time_error_percent']:+} %")
    report = {
        "schema_version": 1,
        "command": shlex.join(sys.argv),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": common.versions(),
        "model": MODEL,
        "pairs": chosen.rows,
        "steps": chosen.steps,
        "worst": {
            "memory_error_percent": max(abs(row["memory_error_percent"]) for row in results),
            "time_error_percent": max(abs(row["time_error_percent"]) for row in results),
        },
        "results": results,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
