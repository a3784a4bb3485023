"""Models in memory: what a run changes in them is their trained weights, and nothing else outlives it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, Starcoder2Config, Trainer

from equipoise.core.errors import UsageError
from equipoise.core.files import read_jsonl
from equipoise.core.runs import Run
from equipoise.models.load import load_sequence_classifier
from equipoise.training._model import no_dropout
from equipoise.training.fit import fit
from tests.tiny import preference_dicts, recipe, tiny, tokenizer


def train(model: Any, out: Path, **values: Any) -> Run:
    """Two steps of DPO (or of what the values say) on a model in memory."""
    data = {"tokenizer": tokenizer(), "train_dataset": preference_dicts()}
    return fit(recipe("in memory", out, **({"max_steps": 2} | values)), model=model, **data)


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in read_jsonl(run.folder / "log.jsonl") if "loss" in line]


def test_a_base_in_memory_serves_one_lora_run_after_the_other(tmp_path: Path) -> None:
    model = tiny(seed=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = train(model, tmp_path / "first", use_peft=True, lora_r=4)
    second = train(model, tmp_path / "second", use_peft=True, lora_r=4, seed=0, weight_decay=0.01)
    for run in (first, second):
        assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
        assert (run.folder / "model" / "adapter_config.json").is_file()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    full = train(model, tmp_path / "full")
    loaded = AutoModelForCausalLM.from_pretrained(full.folder / "model")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("values", [{}, {"trainable": "no such weight"}, {"trainable": "no such weight", "use_peft": False}])
def test_a_base_is_given_back_when_a_run_fails(values: dict[str, Any], tmp_path: Path) -> None:
    """In its objective, or before it began."""
    model = tiny(seed=5)
    with pytest.raises((ZeroDivisionError, UsageError)):
        fit(
            recipe("in memory", tmp_path / "out", **{"use_peft": True, **values}),
            model=model,
            tokenizer=tokenizer(),
            train_dataset=preference_dicts(),
            objective=lambda scored: 1 / 0,
        )
    assert not any("lora" in name for name in model.state_dict())
    assert not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
def test_recomputation_and_the_cache_are_as_before(use_peft: bool, tmp_path: Path) -> None:
    """A later run without recomputation does without it, and who generates with what was saved has a cache."""
    model = tiny(seed=5)
    run = train(model, tmp_path / "out", gradient_checkpointing=True, use_peft=use_peft)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not model.get_input_embeddings()._forward_hooks
    assert model.config.use_cache
    if not use_peft:
        assert AutoModelForCausalLM.from_pretrained(run.folder / "model").config.use_cache


def test_a_reward_model_in_memory_gets_its_own_head_back(tmp_path: Path) -> None:
    """PEFT trains a copy of the head; what it was copied from is the caller's."""
    tiny(seed=5).save_pretrained(tmp_path / "base")
    model = load_sequence_classifier(tmp_path / "base", from_backbone=True, device="cpu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = {"use_peft": True, "streams": [{"objective": {"name": "bradley_terry"}}]}
    first = train(model, tmp_path / "out", **wanted)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not first.skipped
    assert train(model, tmp_path / "out", **wanted).skipped


def test_the_inner_model_of_an_adapter_is_refused(tmp_path: Path) -> None:
    model = tiny(seed=5)
    get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(UsageError, match="hand over the PeftModel"):
        train(model, tmp_path / "out")


def test_what_the_caller_froze_stays_frozen(tmp_path: Path) -> None:
    model = tiny(seed=5)
    frozen = [model.model.embed_tokens.weight, *model.model.layers[0].parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = [parameter.clone() for parameter in frozen]
    free = model.model.layers[1].mlp.up_proj.weight.clone()
    train(model, tmp_path / "out")
    assert all(torch.equal(parameter, value) for parameter, value in zip(frozen, before, strict=True))
    assert not torch.equal(model.model.layers[1].mlp.up_proj.weight, free)
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="frozen before"):
        train(model, tmp_path / "none")


@pytest.mark.parametrize("objective", ["dpo", "simpo", "tdpo2"])
def test_only_the_named_part_of_an_adapter_is_trained(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a stored reference was computed with the adapter off (dpo), and where that happens in every step (tdpo)."""
    trained: list[set[str]] = []
    original = Trainer.create_optimizer

    def noted(self: Any, *given: Any) -> Any:
        trained.append({name.split(".")[-3] for name, parameter in self.model.named_parameters() if parameter.requires_grad})
        return original(self, *given)

    monkeypatch.setattr(Trainer, "create_optimizer", noted)
    run = train(tiny(seed=5), tmp_path / "out", use_peft=True, trainable="lora_B", streams=[{"objective": {"name": objective}}])
    assert trained == [{"lora_B"}]
    from safetensors.torch import load_file

    values = load_file(run.folder / "model" / "adapter_model.safetensors")
    assert any(value.any() for name, value in values.items() if "lora_B" in name)


def test_an_adapter_on_the_head_counts_although_the_base_had_a_plain_one_before(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = tiny(seed=5)
    train(model, tmp_path / "plain")
    run = train(model, tmp_path / "head", use_peft=True, lora_target_modules=["lm_head", "q_proj"], learning_rate=0.1)
    values = load_file(run.folder / "model" / "adapter_model.safetensors")
    assert {name.split(".")[-3]: bool(value.any()) for name, value in values.items() if "lora_B" in name} == {
        "lm_head": True,
        "q_proj": True,
    }


def starcoder() -> Any:
    """A family whose dropouts have names of their own."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        Starcoder2Config(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            residual_dropout=0.3,
            embedding_dropout=0.3,
            attention_dropout=0.3,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def test_dropout_is_off_under_whatever_name_and_comes_back(tmp_path: Path) -> None:
    model = starcoder().train()
    ids = torch.arange(20)[None]
    with no_dropout(model), torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        assert model.config.residual_dropout == 0
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
    run = train(model, tmp_path / "out", learning_rate=1e-12)
    assert losses(run) == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert AutoModelForCausalLM.from_pretrained(run.folder / "model").config.residual_dropout == 0.3


def test_the_balancing_loss_of_experts_is_said_to_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=len(tokenizer()), **sizes, num_local_experts=2, output_router_logits=True)
    train(AutoModelForCausalLM.from_config(config), tmp_path / "out", max_steps=1)
    assert "output_router_logits" in capsys.readouterr().err
