"""References in training: read live, following the policy, mixed; and what cannot be had together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from equipoise.core.errors import UsageError
from equipoise.core.files import file_sha256, read_json, read_jsonl, write_json
from equipoise.objectives._base import Needs, Scored
from equipoise.reference.live import FILE, FollowingReference, frozen_copy
from equipoise.training.fit import fit
from tests.tiny import preference_dicts, recipe, tiny, tokenizer

PAIRS = ("chosen", "rejected")


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(folder / "log.jsonl") if "loss" in line]


# ---- moving, by hand


def test_the_reference_moves_by_the_share_that_was_asked_for() -> None:
    policy = nn.Linear(2, 1, bias=False)
    nn.init.constant_(policy.weight, 1.0)
    following = FollowingReference(policy)
    nn.init.constant_(policy.weight, 3.0)
    following.move(0.25)
    assert following.model.weight.tolist() == [[1.5, 1.5]]
    following.move(1.0)
    assert following.model.weight.tolist() == [[3.0, 3.0]]
    assert policy.weight.requires_grad
    assert not following.model.weight.requires_grad


def test_a_copy_shares_what_is_not_trained() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    model[0].weight.requires_grad_(False)
    other = frozen_copy(model)
    assert other[0].weight is model[0].weight
    assert other[2].running_mean is model[2].running_mean
    assert other[0].bias is not model[0].bias
    assert not other.training
    assert model.training
    assert model[0].bias.requires_grad


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    one, two = FollowingReference(nn.Linear(2, 1)), FollowingReference(nn.Linear(2, 1))
    one.save(tmp_path)
    two.load(tmp_path)
    assert torch.equal(one.model.weight, two.model.weight)


# ---- in a run


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_reference_replaced_after_every_step_keeps_dpo_at_ln_2(lora: bool, base: Path, tmp_path: Path) -> None:
    peft = {"use_peft": True, "lora_r": 4} if lora else {}
    wanted = recipe(base, tmp_path / "out", sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=1, **peft)
    run = fit(wanted, train_dataset=preference_dicts())
    assert losses(run.folder) == pytest.approx([math.log(2)] * 6, abs=1e-5)
    assert not (tmp_path / "store").exists(), "a reference that moves is never stored"


def test_a_reference_that_never_comes_to_move_gives_the_stored_one_s_losses(base: Path, tmp_path: Path) -> None:
    still = fit(recipe(base, tmp_path / "still", sync_ref_model=True, ref_model_sync_steps=99), train_dataset=preference_dicts())
    stored = fit(recipe(base, tmp_path / "stored"), train_dataset=preference_dicts())
    assert losses(still.folder) == pytest.approx(losses(stored.folder), abs=1e-5)


class _Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_a_resumed_run_has_the_reference_it_stopped_with(base: Path, tmp_path: Path) -> None:
    moving: dict[str, Any] = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 2, "save_strategy": "epoch"}
    whole = fit(recipe(base, tmp_path / "whole", **moving), train_dataset=preference_dicts())
    with pytest.raises(KeyboardInterrupt):
        fit(recipe(base, tmp_path / "cut", **moving), train_dataset=preference_dicts(), callbacks=[_Stop()])
    (checkpoint,) = (tmp_path / "cut" / "checkpoints").glob("checkpoint-*")
    assert (checkpoint / FILE).is_file()
    resumed = fit(recipe(base, tmp_path / "cut", **moving), train_dataset=preference_dicts())
    assert resumed.results["resumed_from"] == "checkpoint-3"
    one, other = (file_sha256(run.folder / "model" / "model.safetensors") for run in (whole, resumed))
    assert one == other


def divergence(scored: Scored) -> torch.Tensor:
    """A loss that reads the reference's whole vocabulary: its divergence from the policy on the chosen reply, less log-prob."""
    chosen = scored.side("chosen")
    return chosen.stat("kl_ref").sum(1) - chosen.policy_logps()


@pytest.mark.parametrize("how", ["full", "lora", "named"])
def test_the_divergence_to_a_live_reference_starts_at_0_and_grows(how: str, base: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"full": {}, "lora": {"use_peft": True, "lora_r": 4}, "named": {"reference_model": str(base)}}[how]
    seen: list[float] = []

    def loss(scored: Scored) -> torch.Tensor:
        seen.append(float(scored.side("chosen").stat("kl_ref").detach().sum()))
        return divergence(scored)

    fit(
        recipe(base, tmp_path / "out", **values),
        train_dataset=preference_dicts(),
        objective=loss,
        needs=Needs(roles=PAIRS, reference="live", stats=frozenset({"kl_ref"})),
    )
    assert seen[0] == pytest.approx(0, abs=1e-4)
    assert seen[-1] > 0.01


def test_two_equal_references_mixed_are_the_reference(base: Path, tmp_path: Path) -> None:
    mixed = fit(recipe(base, tmp_path / "mixed", reference_mixture={"models": [str(base)]}), train_dataset=preference_dicts())
    plain = fit(recipe(base, tmp_path / "plain"), train_dataset=preference_dicts())
    assert losses(mixed.folder) == pytest.approx(losses(plain.folder), abs=1e-5)


def test_another_model_in_the_mixture_changes_the_loss(base: Path, tmp_path: Path) -> None:
    tiny(seed=9).save_pretrained(tmp_path / "guide")
    tokenizer().save_pretrained(tmp_path / "guide")
    mixture = {"models": [str(tmp_path / "guide")], "weights": [0.5, 0.5], "clip": None}
    run = fit(recipe(base, tmp_path / "out", reference_mixture=mixture), train_dataset=preference_dicts())
    assert losses(run.folder)[0] != pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sync_ref_model": True, "streams": [{"objective": {"name": "sft"}}]}, "no objective of this run reads a reference"),
        ({"sync_ref_model": True, "reference_model": "guide"}, "leave out reference_model"),
        ({"sync_ref_model": True, "fsdp": True}, "not cut over processes"),
    ],
)
def test_what_cannot_be_had_together_is_refused(values: dict[str, Any], words: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        fit(recipe(base, tmp_path / "out", **values), train_dataset=preference_dicts())


def test_a_mixture_has_no_whole_vocabulary(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="log-probs of the replies only"):
        fit(
            recipe(base, tmp_path / "out", reference_mixture={"models": [str(base)]}),
            train_dataset=preference_dicts(),
            objective=divergence,
            needs=Needs(roles=PAIRS, reference="live", stats=frozenset({"kl_ref"})),
        )


@pytest.mark.parametrize("weights", [[0.5], [0.5, 0.6], [-0.5, 1.5]])
def test_weights_of_a_mixture_are_shares(weights: list[float], base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"reference_mixture\.weights"):
        recipe(base, tmp_path / "out", reference_mixture={"models": ["guide"], "weights": weights})


# ---- whose log-probs a store holds


def edited(path: Path, **values: Any) -> None:
    write_json(path, read_json(path) | values)


def test_the_same_weights_under_another_config_are_another_reference(tmp_path: Path) -> None:
    """A window stands in the config alone, and rows shorter than it do not show it."""
    folder = tmp_path / "base"
    tiny("mistral", seed=5).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    fit(recipe(folder, tmp_path / "windowed", max_steps=1), train_dataset=preference_dicts())
    edited(folder / "config.json", sliding_window=None)
    run = fit(recipe(folder, tmp_path / "open", max_steps=1), train_dataset=preference_dicts())
    assert run.results["cost"]["reference_tokens"] > 0
    assert losses(run.folder)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_the_same_adapter_at_another_scale_is_another_reference(base: Path, tmp_path: Path) -> None:
    first = fit(recipe(base, tmp_path / "first", use_peft=True, lora_r=4), train_dataset=preference_dicts())
    adapter = first.folder / "model"
    fit(recipe(adapter, tmp_path / "once", use_peft=True, max_steps=1), train_dataset=preference_dicts())
    edited(adapter / "adapter_config.json", lora_alpha=64)
    run = fit(recipe(adapter, tmp_path / "twice", use_peft=True, max_steps=1), train_dataset=preference_dicts())
    assert run.results["cost"]["reference_tokens"] > 0
    assert losses(run.folder)[0] == pytest.approx(math.log(2), abs=1e-6)
