"""Training in little memory: LoRA over a 4-bit base, and optimizers that keep their state in 8 bits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from equipoise.core.errors import UsageError
from equipoise.core.files import read_json, read_jsonl
from equipoise.core.runs import Run
from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.identity import weights_fingerprint
from equipoise.models.load import load_causal
from equipoise.models.logps import unwrapped
from equipoise.models.quantised import FourBit
from equipoise.reference.build import build, reference_logps
from equipoise.reference.key import Context
from equipoise.reference.store import ReferenceStore
from equipoise.training import _preflight
from equipoise.training._preflight import check_optimizer
from equipoise.training.fit import fit
from equipoise.training.settings import TrainSettings
from tests.tiny import pairs, preference_dicts, recipe, tiny, tokenizer

register()
bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny(seed=5).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def settings(base: Path, out: Path, **values: Any) -> TrainSettings:
    return recipe(base, out, **{"max_steps": 3, **values})


def qlora(base: Path, out: Path, **values: Any) -> TrainSettings:
    return settings(base, out, use_peft=True, lora_r=4, load_in_4bit=True, **values)


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in read_jsonl(run.folder / "log.jsonl") if "loss" in line]


# ---- QLoRA


@pytest.mark.parametrize("how", [FourBit(), FourBit("fp4", double_quant=True)], ids=str)
def test_adapter_off_equals_what_was_stored_of_the_quantised_base(base: Path, tmp_path: Path, how: FourBit) -> None:
    from peft import LoraConfig, get_peft_model

    rows, cpu = pairs(6), torch.device("cpu")
    alone = load_causal(base, device="cpu", four_bit=how)
    store = ReferenceStore(tmp_path, Context(weights_fingerprint(alone), "none", "float32", "packed/cpu"))
    with attention_of(alone, NAME):
        build(alone, rows, store, "packed", 64, cpu)
    policy = get_peft_model(load_causal(base, device="cpu", four_bit=how), LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    stored = np.concatenate([values for row in rows for values in store.get(row)])

    def now() -> np.ndarray:
        with attention_of(unwrapped(policy), NAME):
            return np.concatenate([values for replies in reference_logps(policy, rows, "packed", cpu) for values in replies])

    assert np.abs(now() - stored).max() > 1e-2, "with the adapter on it is another model"
    with policy.disable_adapter():
        assert np.abs(now() - stored).max() < 1e-5


def test_qlora_starts_at_its_own_quantised_base_and_learns(base: Path, tmp_path: Path) -> None:
    run = fit(qlora(base, tmp_path / "one", max_steps=6), train_dataset=preference_dicts())
    log = losses(run)
    assert log[0] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1] < log[0] - 0.02
    assert run.results["cost"]["reference_tokens"] > 0
    assert read_json(run.folder / "start_check.json")["form"] == "packed"
    again = fit(qlora(base, tmp_path / "two", max_steps=1, learning_rate=1e-4), train_dataset=preference_dicts())
    assert again.results["cost"]["reference_tokens"] == 0, "the same quantised base: the store has its log-probs"
    flops = []
    for name, other in {"full": {"load_in_4bit": False}, "fp4": {"bnb_4bit_quant_type": "fp4"}}.items():
        changed = fit(qlora(base, tmp_path / name).model_copy(update={"max_steps": 1, **other}), train_dataset=preference_dicts())
        assert changed.results["cost"]["reference_tokens"] > 0, f"{name} is another base"
        flops.append(changed.results["cost"]["flops"])
    assert flops[0] == flops[1], "two 4-bit weights lie in one byte, and count as two"


def test_what_it_saves_is_an_ordinary_adapter(base: Path, tmp_path: Path) -> None:
    run = fit(qlora(base, tmp_path / "out"), train_dataset=preference_dicts())
    folder = run.folder / "model"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    saved = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in saved.items())
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        trained = load_causal(folder, device="cpu", four_bit=FourBit())(input_ids=ids).logits
        full: Any = load_causal(folder, device="cpu")  # as vLLM and transformers would: the adapter over the base's own weights
        over_full = full(input_ids=ids).logits
        merged = full.merge_and_unload()(input_ids=ids).logits
    assert (trained - over_full).abs().max() > 1e-2
    assert torch.allclose(merged, over_full, atol=1e-4)
    # Goes on from the adapter over the same 4-bit base; its reference is where it starts.
    further = fit(qlora(folder, tmp_path / "further", max_steps=1), train_dataset=preference_dicts())
    assert losses(further)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_products_in_bfloat16_are_checked_as_bfloat16_and_stored_apart(base: Path, tmp_path: Path) -> None:
    run = fit(qlora(base, tmp_path / "out", bnb_4bit_compute_dtype="bfloat16", max_steps=1), train_dataset=preference_dicts())
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-3)
    context = read_json(next((tmp_path / "store" / "reference").glob("*/context.json")))
    assert context["dtype"] == "float32/4bit-bfloat16"


def test_a_reward_model_over_a_4_bit_backbone(base: Path, tmp_path: Path) -> None:
    recipe = qlora(base, tmp_path / "rm", max_steps=12, streams=[{"objective": {"name": "bradley_terry"}}])
    run = fit(recipe, train_dataset=preference_dicts())
    assert np.mean(losses(run)[-3:]) < np.mean(losses(run)[:3])
    assert any("score" in name for name in load_file(run.folder / "model" / "adapter_model.safetensors"))


def test_a_4_bit_base_alone_is_not_trained(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="set use_peft=true"):
        fit(settings(base, tmp_path / "out", load_in_4bit=True), train_dataset=preference_dicts())
    model = load_causal(base, device="cpu", four_bit=FourBit())
    with pytest.raises(UsageError, match="only adapters on it"):
        fit(settings(base, tmp_path / "memory"), model=model, tokenizer=tokenizer(), train_dataset=preference_dicts())


# ---- optimizers


class States(TrainerCallback):
    """The optimizer as training leaves it."""

    optimizer: Any = None

    def on_train_end(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        self.optimizer = optimizer


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with matrices of at least 4096 weights: of smaller ones bitsandbytes keeps the state in 32 bits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(5)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=96, **shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize(
    ("name", "exact"), [("adamw_bnb_8bit", "adamw_torch"), ("paged_adamw_8bit", "adamw_torch"), ("lion_8bit", "lion_32bit")]
)
def test_states_of_8_bits_learn_as_those_of_32_do(wide: Path, tmp_path: Path, name: str, exact: str) -> None:
    states, found = States(), {}
    for optim in (name, exact):
        recipe = settings(wide, tmp_path / optim, optim=optim, learning_rate=1e-3, max_steps=6)
        found[optim] = losses(fit(recipe, train_dataset=preference_dicts(), callbacks=[states] if optim == name else []))
    kept = {parameter.numel() >= 4096: state["state1"].dtype for parameter, state in states.optimizer.state.items()}
    assert kept == {True: torch.uint8, False: torch.float32}
    assert found[name] == pytest.approx(found[exact], abs=0.02)
    assert found[name] != found[exact]
    assert found[name][-1] < found[name][0] - 0.05


def test_a_run_with_8_bit_states_resumes_to_the_same_bytes(wide: Path, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    recipe = {"optim": "adamw_bnb_8bit", "max_steps": 4, "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        fit(settings(wide, tmp_path / "cut", **recipe), train_dataset=preference_dicts(), callbacks=[Stop()])
    resumed = fit(settings(wide, tmp_path / "cut", **recipe), train_dataset=preference_dicts())
    whole = fit(settings(wide, tmp_path / "whole", **recipe), train_dataset=preference_dicts())
    assert resumed.results["resumed_from"] == "checkpoint-2"
    one, other = (load_file(run.folder / "model" / "model.safetensors") for run in (resumed, whole))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", ["adafactor", "sgd"])
def test_light_optimizers_that_run_everywhere(base: Path, tmp_path: Path, name: str) -> None:
    states = States()
    run = fit(settings(base, tmp_path / name, optim=name), train_dataset=preference_dicts(), callbacks=[states])
    assert losses(run)[-1] < losses(run)[0]
    weights = sum(parameter.numel() for parameter in tiny().parameters())
    kept = sum(value.numel() for state in states.optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    assert kept < 0.2 * weights, "AdamW would keep two numbers a weight"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamw_bnb_8bits", r"Unknown optimizer.*Did you mean 'adamw_bnb_8bit'"),
        ("adam8bit", r"Unknown optimizer"),
        ("lomo", "steps inside the backward pass"),
        ("galore_adamw", "optim_target_modules"),
        ("schedule_free_adamw", "nothing here switches"),
    ],
)
def test_an_optimizer_that_cannot_work_is_refused_before_anything_is_loaded(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit(settings(tmp_path / "no such model", tmp_path / "out", optim=name), train_dataset=preference_dicts())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "install"),
    [("adamw_bnb_8bit", r"equipoise\[quant\]"), ("paged_lion_8bit", r"equipoise\[quant\]"), ("adamw_torch_8bit", "torchao")],
)
def test_an_optimizer_without_its_package_names_it(monkeypatch: pytest.MonkeyPatch, name: str, install: str) -> None:
    monkeypatch.setattr(_preflight.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UsageError, match=rf"{name}.*pip install '{install}'"):
        check_optimizer(name)
    check_optimizer("adamw_torch")
    check_optimizer("adafactor")
