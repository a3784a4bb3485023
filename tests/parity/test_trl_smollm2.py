"""A real model on real pairs: TRL's trainers run it their way (padded rows), ours runs it packed; loss and gradient agree."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.core.assets import ready_folder
from equipoise.core.files import read_jsonl
from equipoise.core.records import Message
from equipoise.data import starter
from equipoise.data.rows import Branch, TokenRow
from equipoise.data.settings import TokeniseSettings
from equipoise.data.tokenise import prompt_ids
from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.batch import pack
from equipoise.models.load import load_causal, load_tokenizer
from equipoise.models.logps import policy_logps
from equipoise.objectives._base import Scored
from equipoise.objectives._load import build
from tests.parity.trl_losses import ROLES, batch, built

pytest.importorskip("trl", reason="TRL is not installed: make parity")
pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.smollm2]
ASSET, PAIRS, LONGEST = "smollm2-135m-instruct", 4, 60
Tensor = torch.Tensor


@pytest.fixture(scope="module")
def real() -> dict[str, Any]:
    """Policy, a reference a little away from it, and four short pairs of the starter set as token rows."""
    if not (ready_folder(ASSET) / "source.json").is_file():
        pytest.skip(f"{ASSET} is not in the cache; `equipoise doctor` says how to get it")
    register()
    models = [load_causal(ASSET, device="cpu").float().eval() for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for parameter in models[1].parameters():
        parameter.data *= 1 + 0.02 * torch.randn(parameter.shape, generator=generator)
    for model in models:
        model.requires_grad_(False)
    models[0].model.norm.weight.requires_grad_(True)
    tokenizer = load_tokenizer(ASSET)
    rows: list[TokenRow] = []
    for pair in read_jsonl(next(iter(starter.__path__)) + "/train_helpfulness.jsonl"):
        replies = {role: tokenizer(pair[role], add_special_tokens=False).input_ids for role in ("chosen", "rejected")}
        if max(map(len, replies.values())) <= LONGEST and len(rows) < PAIRS:
            prompt = prompt_ids((Message("user", pair["prompt"]),), tokenizer, TokeniseSettings())
            rows.append(row(pair["id"], prompt, {role: [*ids, tokenizer.eos_token_id] for role, ids in replies.items()}))
    assert len(rows) == PAIRS
    return {"policy": models[0], "reference": models[1], "rows": rows}


def row(name: str, prompt: Any, replies: dict[str, Any], **facts: float) -> TokenRow:
    arrays = {role: np.asarray(ids, dtype=np.int32) for role, ids in replies.items()}
    branches = (Branch(role, ids, {"learn": np.ones(len(ids), dtype=bool)}, facts) for role, ids in arrays.items())
    return TokenRow(name, np.asarray(prompt, dtype=np.int32), tuple(branches))


def with_prompt_in_the_reply(rows: list[TokenRow]) -> list[TokenRow]:
    """TRL's ORPO imitates prompt and reply: rows whose reply is all but the first token."""
    return [row(of.id, of.prompt[:1], {branch.role: np.concatenate([of.prompt[1:], branch.ids]) for branch in of.branches}) for of in rows]


def as_samples(rows: list[TokenRow]) -> list[TokenRow]:
    """KTO's rows: chosen and rejected replies in turn, each with the next row's reply as the mismatched one."""
    result = []
    for number, of in enumerate(rows):
        other = rows[(number + 1) % len(rows)].branches[0].ids
        result.append(row(of.id, of.prompt, {"sample": of.branches[number % 2].ids, "mismatched": other}, label=float(number % 2 == 0)))
    return result


def our_step(spec: dict[str, Any], real: dict[str, Any], rows: list[TokenRow]) -> tuple[Tensor, Tensor]:
    """Loss of one step over packed rows, and the gradient of the policy's last norm."""
    packed = pack(rows)
    with attention_of(real["policy"], NAME), attention_of(real["reference"], NAME):
        policy = policy_logps(real["policy"], packed)
        with torch.no_grad():
            reference = policy_logps(real["reference"], packed)
        loss = build(spec)(Scored(policy, reference, packed.mask, packed.unit, packed.role, facts=packed.facts)).sum.mean()
        return loss.detach(), torch.autograd.grad(loss, real["policy"].model.norm.weight)[0]


def trl_step(kind: str, settings: dict[str, Any], real: dict[str, Any], rows: list[TokenRow]) -> tuple[Tensor, Tensor]:
    """The same by TRL: padded rows, its own head."""
    from trl.trainer.utils import add_fused_lm_head

    sequences = [(of.prompt, branch.ids) for role in ROLES[kind] for of in rows for branch in of.branches if branch.role == role]
    width = max(len(prompt) + len(reply) for prompt, reply in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for number, (prompt, reply) in enumerate(sequences):
        ids[number, : len(prompt) + len(reply)] = torch.from_numpy(np.concatenate([prompt, reply])).long()
        attention[number, : len(prompt) + len(reply)] = 1
        completion[number, len(prompt) : len(prompt) + len(reply)] = 1
    inputs = batch(kind, ids, attention, completion)
    if kind == "kto":
        inputs["label"] = torch.tensor([of.branches[0].facts["label"] > 0.5 for of in rows])
    trainer = built(kind, json.dumps(settings))
    trainer.ref_model = real["reference"]
    forwards = [(model, model.forward) for model in (real["policy"], real["reference"])]
    for model, _ in forwards:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    try:
        loss = trainer.compute_loss(real["policy"], inputs)
        return loss.detach(), torch.autograd.grad(loss, real["policy"].model.norm.weight)[0]
    finally:
        for model, forward in forwards:
            model.forward = forward


CASES = [
    ("dpo", {"loss_type": "sigmoid", "beta": 0.1}, {"name": "dpo", "beta": 0.1}),
    ("dpo", {"loss_type": "ipo", "beta": 0.1}, {"name": "ipo", "beta": 0.1}),
    ("cpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}, {"name": "simpo", "beta": 2.0, "gamma": 1.0}),
    ("orpo", {"beta": 0.1}, {"name": "orpo", "beta": 0.1}),
    ("kto", {"beta": 0.1}, {"name": "kto", "beta": 0.1}),
]


@pytest.mark.parametrize(("kind", "settings", "spec"), CASES, ids=[str(spec["name"]) for _, _, spec in CASES])
def test_a_step_of_smollm2_is_trls(kind: str, settings: dict[str, Any], spec: dict[str, Any], real: dict[str, Any]) -> None:
    rows = {"orpo": with_prompt_in_the_reply, "kto": as_samples}.get(kind, list)(real["rows"])
    mine, my_gradient = our_step(spec, real, rows)
    # ORPO's SFT term is a mean over a micro-batch's tokens in TRL: one pair at a time there.
    steps = [trl_step(kind, settings, real, part) for part in ([[of] for of in rows] if kind == "orpo" else [rows])]
    loss, gradient = (torch.stack(values).mean(0) for values in zip(*steps, strict=True))
    assert abs(float(mine) - {"dpo": math.log(2), "kto": 0.5}.get(spec["name"], 0.0)) > 1e-3, "policy and reference must differ"
    assert float(mine) == pytest.approx(float(loss), rel=1e-5)
    # ORPO's rows ask for the token after the very first, where this model's activations are largest: float32 keeps fewer digits
    # there. In float64 both agree to 1e-6, which is TRL's float32 odds.
    assert float((my_gradient - gradient).norm()) < (1e-3 if kind == "orpo" else 2e-5) * float(gradient.norm())
