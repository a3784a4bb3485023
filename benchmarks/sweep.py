"""A sweep over beta: what a reference store that outlives a run saves.

    python benchmarks/sweep.py --rows 32 --betas 0.05 0.1 0.3

Sides, each run in a process of its own, the sides in turn for every beta:

    store      our DPO; all runs read one reference store, which the first of them fills
    no_store   the same engine with an empty store folder for every run
    trl        (--trl) TRL's DPOTrainer, precompute_ref_log_probs=True, its own cache of them left on

Prints one JSON object. Rows are HH-RLHF pairs where they are at hand (folder EQUIPOISE_DATA, or ../shared/data beside the
checkout), else the bundled starter set. All sides read the same pairs with the same recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _common as common

RATE = 5e-7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="preference pairs (default 32)")
    parser.add_argument("--betas", type=float, nargs="+", default=[0.05, 0.1, 0.3], help="values of beta (default 0.05 0.1 0.3)")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="asset, folder or hub name (default smollm2-135m-instruct)")
    parser.add_argument("--batch", type=int, default=8, help="pairs per optimizer step (default 8)")
    parser.add_argument("--max-length", type=int, default=512, help="longest row in tokens (default 512)")
    parser.add_argument("--lora", action="store_true", help="train LoRA (r=16, all linear layers) instead of all weights")
    parser.add_argument("--trl", action="store_true", help="TRL too (slow)")
    parser.add_argument("--trl-micro-batch", type=int, default=2, help="pairs of a TRL micro-batch (default 2, the fastest on two cores)")
    parser.add_argument("--json", action="store_true", help="the object on one line")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        work(json.loads(options.task))
        return
    if options.rows < options.batch or len(options.betas) < 2:
        parser.error("a sweep takes two values of beta or more, and at least one full batch of rows")
    settings = {name: value for name, value in vars(options).items() if name not in ("task", "json")} | {"learning_rate": RATE}
    common.report("sweep", settings, sweep(options), one_line=options.json)


def sweep(options: argparse.Namespace) -> dict[str, Any]:
    """Run every side for every beta and put the figures side by side."""
    sides = ["store", "no_store", *(["trl"] if options.trl else [])]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory(prefix="sweep-") as name:
        folder = Path(name)
        data = write_rows(options.rows, folder / "rows.jsonl")
        for number, beta in enumerate(options.betas):
            turn = number % len(sides)
            for side in sides[turn:] + sides[:turn]:
                task = {
                    "side": side,
                    "beta": beta,
                    "rows": str(folder / "rows.jsonl"),
                    "output": str(folder / f"{side}-{number}"),
                    "cache": str(folder / "cache" / (f"{side}-{number}" if side == "no_store" else side)),
                    **{key: getattr(options, key) for key in ("model", "batch", "max_length", "lora", "trl_micro_batch")},
                }
                runs[side].append(run_side(task, folder / "result.json"))
                shutil.rmtree(task["output"], ignore_errors=True)  # a model each
                line = runs[side][-1]
                print(f"{side}, beta {beta}: {line['seconds']:.1f} s, reference {line['reference_seconds']:.1f} s", file=sys.stderr)
    return {"data": data, **compared(runs)}


def run_side(task: dict[str, Any], result: Path) -> dict[str, Any]:
    """One run in a process of its own, whose output goes to stderr, and the seconds the whole process took."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--task", json.dumps(task | {"result": str(result)})]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise SystemExit(f"{task['side']} failed; see above.")
    return json.loads(result.read_text()) | {"process_seconds": round(time.perf_counter() - start, 3)}


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Every run, the sums over the sweep, and how many times as long the other sides took as `store`."""
    kinds = ("seconds", "cpu_seconds", "reference_seconds", "process_seconds")
    totals = {side: {kind: round(sum(run[kind] for run in done), 3) for kind in kinds} for side, done in runs.items()}
    times = {
        side: {kind: round(totals[side][kind] / totals["store"][kind], 3) for kind in kinds if totals["store"][kind] > 0}
        for side in runs
        if side != "store"
    }
    apart = max(
        abs(one - two)
        for left, right in zip(runs["store"], runs["no_store"], strict=True)
        for one, two in zip(left["losses"], right["losses"], strict=True)
    )
    return {"runs": runs, "totals": totals, "times_as_long_as_store": times, "largest_loss_difference_store_no_store": apart}


def write_rows(count: int, path: Path) -> str:
    """The first pairs in TRL's conversational columns, for all sides. Returns the name of their source."""
    name, records = common.preference_records(count)
    with path.open("w") as stream:
        for record in records:
            row: dict[str, Any] = {"prompt": [message.as_dict() for message in record.prompt]}
            for reply in record.replies:
                row[reply.role] = [{"role": "assistant", "content": reply.text}]
            stream.write(json.dumps(row) + "\n")
    return name


# ---- one run, in its own process


def work(task: dict[str, Any]) -> None:
    """Train once, and write seconds, reference seconds, losses and peak memory to the file `result`."""
    side = trl_run if task["side"] == "trl" else our_run
    with contextlib.redirect_stdout(sys.stderr):
        found = side(task)
    Path(task["result"]).write_text(json.dumps(found | {"beta": task["beta"], "peak_rss_mb": common.peak_rss_mb()}))


@contextlib.contextmanager
def clock(found: dict[str, Any]) -> Iterator[None]:
    """Wall and CPU seconds of a block, imports before it left out."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    found |= {"seconds": round(time.perf_counter() - wall, 3), "cpu_seconds": round(time.process_time() - cpu, 3)}


def our_run(task: dict[str, Any]) -> dict[str, Any]:
    from equipoise.core.files import read_jsonl
    from equipoise.training.fit import fit
    from equipoise.training.settings import TrainSettings

    settings = TrainSettings.make(
        {
            "model_name_or_path": task["model"],
            "output_dir": task["output"],
            "reference_store": task["cache"],
            "streams": [{"data": {"dataset_name": task["rows"]}, "objective": {"name": "dpo", "beta": task["beta"]}}],
            "tokenise": {"max_length": task["max_length"]},
            "learning_rate": RATE,
            "per_device_train_batch_size": task["batch"],
            "use_peft": task["lora"],
            "eval_on_dev": False,
            "shuffle": False,
        }
    )
    found: dict[str, Any] = {}
    with clock(found):
        run = fit(settings)
    losses = [line["loss"] for line in read_jsonl(run.folder / "log.jsonl") if "loss" in line]
    return found | {"reference_seconds": run.results["cost"]["reference_seconds"], "losses": losses, "form": run.results["form"]}


def trl_run(task: dict[str, Any]) -> dict[str, Any]:
    os.environ["HF_DATASETS_CACHE"] = task["cache"]
    import trl
    from datasets import load_dataset
    from peft import LoraConfig

    from equipoise.models.load import load_causal, load_tokenizer

    reference = [0.0]

    class Timed(trl.DPOTrainer):
        def _precompute_ref_logps(self, *arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            rows = super()._precompute_ref_logps(*arguments, **named)
            reference[0] += time.perf_counter() - start
            return rows

    arguments = trl.DPOConfig(
        output_dir=task["output"],
        beta=task["beta"],
        precompute_ref_log_probs=True,
        per_device_train_batch_size=task["trl_micro_batch"],
        gradient_accumulation_steps=task["batch"] // task["trl_micro_batch"],
        num_train_epochs=1,
        max_length=task["max_length"],
        learning_rate=RATE,
        warmup_steps=0.1,  # below 1 a share of the steps, in transformers 5
        logging_steps=1,
        train_sampling_strategy="sequential",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    found: dict[str, Any] = {}
    with clock(found):
        trainer = Timed(
            model=load_causal(task["model"]),
            args=arguments,
            train_dataset=load_dataset("json", data_files=task["rows"], split="train"),
            processing_class=load_tokenizer(task["model"]),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if task["lora"] else None,
        )
        trainer.train()
        trainer.save_model(f"{task['output']}/model")
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return found | {"reference_seconds": round(reference[0], 3), "losses": losses}


if __name__ == "__main__":
    main()
