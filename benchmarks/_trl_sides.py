"""One side of `vs_trl.py`, in a process of its own: TRL's trainers or equipoise's `fit` on the very same token rows.

Started by `vs_trl.py`, which writes jobs to stdin and reads results from stdout, a line of JSON each. Data preparation is
handed over (it has its own benchmark): every side reads the same prompt and reply ids, in the same order, so that losses can
be compared step by step.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stdout
from typing import Any

import _common as common


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do the job; seconds of the reference pass and of training, peak memory [MiB], the loss of every step."""
    import torch

    cuda = job["device"] == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        torch.set_num_threads(job["threads"])
    side = _ours if job["side"] == "ours" else _theirs
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = side(job, folder)
    except Exception as error:  # the other sides are still worth having, and a search goes on to its next setting
        traceback.print_exc(file=sys.stderr)
        found = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else common.peak_rss_mb()
    if cuda:  # the other sides' processes need the room
        gc.collect()
        torch.cuda.empty_cache()
    return found | {common.memory_key(job["device"]): round(peak, 1)}


# ---- equipoise


def _ours(job: dict[str, Any], folder: str) -> dict[str, Any]:
    from pathlib import Path

    import numpy as np

    from equipoise.core.files import read_jsonl
    from equipoise.data.rows import Branch, TokenRow
    from equipoise.training.fit import fit
    from equipoise.training.settings import TrainSettings

    roles = {"sft": ("gold",)}.get(job["objective"], ("chosen", "rejected"))

    def branch(role: str, ids: list[int]) -> Branch:
        return Branch(role, np.array(ids, dtype=np.int32), {"learn": np.ones(len(ids), dtype=bool)})

    rows = [
        TokenRow(str(number), np.array(row["prompt"], dtype=np.int32), tuple(branch(role, row[_column(role)]) for role in roles))
        for number, row in enumerate(job["rows"])
    ]
    settings: dict[str, Any] = {
        "model_name_or_path": job["model"],
        "output_dir": f"{folder}/run",
        "reference_store": f"{folder}/store",
        "streams": [{"name": "main", "objective": _objective(job)}],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "per_device_train_batch_size": job["batch_size"],
        "shuffle": False,
        "bf16": job["dtype"] == "bfloat16",
        "use_peft": job["lora"],
        "save_strategy": "no",
        **job["settings"],
    }
    run = fit(TrainSettings.make(settings), train_dataset=rows)
    done = json.loads((run.folder / "done.json").read_text())["results"]
    cost = done["cost"]
    return {
        "reference_seconds": cost["reference_seconds"],
        "train_seconds": cost["seconds"],
        "losses": [line["loss"] for line in read_jsonl(Path(run.folder) / "log.jsonl") if "loss" in line],
    }


def _column(role: str) -> str:
    return "chosen" if role == "gold" else role


def _objective(job: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters that mean the same as TRL's defaults for the method."""
    found: dict[str, dict[str, Any]] = {
        "dpo": {"name": "dpo", "beta": 0.1},
        "sft": {"name": "sft"},
        "orpo": {"name": "orpo"},
        "simpo": {"name": "simpo", "beta": 2.0, "gamma": 1.0},
    }
    return found[job["objective"]]


# ---- TRL


def _theirs(job: dict[str, Any], folder: str) -> dict[str, Any]:
    from datasets import Dataset

    spent = {"reference": 0.0}
    trainer_class, config_class, special, rows = _recipe(job, spent)
    settings = job["settings"]
    arguments = config_class(
        output_dir=folder,
        per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=max(1, job["batch_size"] // settings["micro_batch"]),
        gradient_checkpointing=settings["gradient_checkpointing"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        num_train_epochs=1,
        bf16=job["dtype"] == "bfloat16",
        use_cpu=job["device"] == "cpu",
        use_liger_kernel=settings.get("liger", False),
        logging_steps=1,
        seed=0,  # an adapter's random factors as `fit` draws them, so that losses compare
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **special,
    )
    adapter = None
    if job["lora"]:
        from peft import LoraConfig

        adapter = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model, tokenizer = _model(job["model"])
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=adapter
    )
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"reference_seconds": round(spent["reference"], 3), "train_seconds": round(seconds, 3), "losses": losses}


def _model(name: str) -> tuple[Any, Any]:
    from equipoise.models.load import load_causal, load_tokenizer

    model = load_causal(name)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model, load_tokenizer(name)


def _recipe(job: dict[str, Any], spent: dict[str, float]) -> tuple[Any, Any, dict[str, Any], list[dict[str, Any]]]:
    """TRL's trainer (its tokenising left out), its config, what the method adds to it, and rows in its columns."""
    rows = job["rows"]
    if job["objective"] == "dpo":
        import trl

        class Trainer(trl.DPOTrainer):
            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                return dataset

            def _precompute_ref_logps(self, *arguments: Any) -> Any:
                begin = time.perf_counter()
                result = super()._precompute_ref_logps(*arguments)
                spent["reference"] += time.perf_counter() - begin
                return result

        special = {"precompute_ref_log_probs": job["settings"]["precompute"], "beta": 0.1, "max_length": None}
        return Trainer, trl.DPOConfig, special, [{f"{name}_ids": row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    if job["objective"] == "sft":
        import trl

        columns = [{"input_ids": row["prompt"] + row["chosen"], "labels": [-100] * len(row["prompt"]) + row["chosen"]} for row in rows]
        return trl.SFTTrainer, trl.SFTConfig, {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}, columns
    if job["objective"] == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Base

        special = {"max_length": 4096}
    else:
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Base

        special = {"max_length": 4096, "loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}

    class Tokenised(Base):
        def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
            row = rows[int(feature["prompt"])]
            result = _sequence("prompt_", row["prompt"], 0)
            for name in ("chosen", "rejected"):
                result |= _sequence(f"{name}_", row["prompt"] + row[name], len(row["prompt"]))
            return result

    return Tokenised, Config, special, [{"prompt": str(number), "chosen": "c", "rejected": "r"} for number in range(len(rows))]


def _sequence(prefix: str, ids: list[int], prompt: int) -> dict[str, list[int]]:
    columns = {f"{prefix}input_ids": ids, f"{prefix}attention_mask": [1] * len(ids)}
    return columns | ({f"{prefix}labels": [-100] * prompt + ids[prompt:]} if prompt else {})


if __name__ == "__main__":
    import transformers  # noqa: F401  (while the other sides are at work)

    for line in sys.stdin:
        with redirect_stdout(sys.stderr):
            result = run(json.loads(line))
        print(json.dumps(result), flush=True)
