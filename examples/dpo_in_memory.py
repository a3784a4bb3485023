"""DPO with everything in memory: a model, its tokenizer, a list of pairs, a callback.

python examples/dpo_in_memory.py            # about a minute on two cores
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from equipoise import TrainSettings, fit
from equipoise.data.load import load
from equipoise.data.settings import DataSettings
from equipoise.models.load import load_causal, load_tokenizer

MODEL = "smollm2-135m-instruct"


class Margins(TrainerCallback):
    """Prints how far the model has pulled chosen and rejected replies apart."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "rewards/margins" in logs:
            print(f"step {state.global_step:3d}  loss {logs['loss']:.3f}  margin {logs['rewards/margins']:+.3f}")


pairs = load(DataSettings(dataset_name="starter", max_rows=32)).records
settings = TrainSettings(model_name_or_path=MODEL, output_dir="runs/example", use_peft=True, learning_rate=1e-4)
run = fit(settings, model=load_causal(MODEL), tokenizer=load_tokenizer(MODEL), train_dataset=pairs, callbacks=[Margins()])
print(f"adapter in {run.folder / 'model'}; {run.results['cost']['unique_tokens']} tokens")
