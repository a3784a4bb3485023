"""Same model, rows, order, seed and optimizer: the loss of every step equals TRL's DPO. `make parity` installs TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from equipoise.core.files import read_jsonl
from equipoise.training.fit import fit
from equipoise.training.settings import TrainSettings
from tests.tiny import preference_dicts, tiny, tokenizer

pytestmark = pytest.mark.parity
STEPS, BATCH = 20, 4


def conversations() -> list[dict[str, Any]]:
    """TRL's conversational columns, so that both sides apply the same chat template; eight pairs over and over, to be learned."""
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in preference_dicts(8) * (STEPS * BATCH // 8)
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_loss_of_every_step_equals_trls(name: str, schedule: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed: make parity")
    from datasets import Dataset

    rows = conversations()
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type=schedule,
        max_steps=STEPS,
        logging_steps=1,
        beta=0.1,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_length=None,
        train_sampling_strategy="sequential",
        use_cpu=True,
    )
    theirs = trl.DPOTrainer(
        model=tiny(name, seed=5),
        ref_model=tiny(name, seed=5),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    theirs.train()
    expected = [line["loss"] for line in theirs.state.log_history if "loss" in line]

    run = fit(
        TrainSettings.make(
            {
                "model_name_or_path": "in memory",
                "output_dir": str(tmp_path / "ours"),
                "reference_store": str(tmp_path / "store"),
                "learning_rate": 1e-3,
                "lr_scheduler_type": schedule,
                "warmup_ratio": 0.0,
                "per_device_train_batch_size": BATCH,
                "max_steps": STEPS,
                "token_budget": 60,
                "shuffle": False,
            }
        ),
        model=tiny(name, seed=5),
        tokenizer=tokenizer(),
        train_dataset=rows,
    )
    losses = [line["loss"] for line in read_jsonl(run.folder / "log.jsonl") if "loss" in line]
    assert len(losses) == len(expected) == STEPS
    assert losses[-1] < 0.6, "both must have learned something for the comparison to mean anything"
    assert losses == pytest.approx(expected, abs=1e-4)
