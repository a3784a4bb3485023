"""TRL's own loss code on log-probs of our choosing: its trainers, built as a user builds them, with a table in the model's place.

Every row of a batch begins with its own number, by which the table finds that row's log-probs, and all other tokens are
token 1 of a vocabulary of two. Trainers that read log-probs get them as they are; those that read logits get
(log(1 − p), log p), whose log-softmax is log p again. The gradient with respect to the log-probs is therefore TRL's.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from equipoise.core.records import REPLY_ROLES
from equipoise.objectives._base import Objective, Scored
from equipoise.objectives._parts import log1mexp
from tests.tiny import FAMILIES, preference_dicts, tiny, tokenizer

Tensor = torch.Tensor
PROMPT = 3
"""Tokens of a prompt, the row's number among them."""
ROLES = {
    "dpo": ("chosen", "rejected"),
    "cpo": ("chosen", "rejected"),
    "orpo": ("chosen", "rejected"),
    "reward": ("chosen", "rejected"),
    "tpo": ("chosen", "rejected", "gold"),
    "kto": ("sample", "mismatched"),
    "sft": ("gold",),
}
UNITS, FEW, MANY = 4, 7, 150


def view(kind: str, inputs: str, dtype: torch.dtype = torch.float64, seed: int = 0, units: int = UNITS) -> Scored:
    """Replies of four units, role after role as TRL's batches have them; log-probs are leaves.

    inputs: `random` (1 to 7 tokens, policy far from reference), `real` (20 to 150 tokens, −12 to 0 nats, policy near the
    reference), `extreme` (1 to 150 tokens; whole replies gained or lost, and one unit with policy = reference).
    """
    roles = ROLES[kind]
    size = units * len(roles)
    generator = torch.Generator().manual_seed(seed)
    unit, side = torch.arange(units).repeat(len(roles)), torch.arange(len(roles)).repeat_interleave(units)
    width = FEW if inputs == "random" else MANY
    lengths = torch.randint(20 if inputs == "real" else 1, width + 1, (size,), generator=generator)
    uniform = torch.rand(2, size, width, generator=generator, dtype=torch.float64)
    if inputs == "random":
        policy, reference = -0.01 - 2.5 * uniform
    elif inputs == "real":
        policy = -1e-3 - 12 * uniform[0] ** 8
        reference = (policy + 0.1 * (uniform[1] - 0.5)).clamp(max=-1e-3)
    else:
        lost = ((unit + side) % 2 == 0)[:, None]
        policy = torch.where(lost, -12.0, -0.01).double().expand(size, width).clone()
        reference = torch.where(lost, -0.01, -12.0).double().expand(size, width).clone()
        reference[unit == 2] = policy[unit == 2]
        lengths[unit == 2] = torch.tensor([1, MANY, 1])[: len(roles)]
    numbers = torch.rand(3, size, generator=generator, dtype=torch.float64)
    score = (numbers[0] - 0.5) * (200 if inputs == "extreme" else 4)
    return Scored(
        policy=policy.to(dtype).requires_grad_(),
        reference=reference.to(dtype),
        mask=torch.arange(width)[None] < lengths[:, None],
        unit=unit,
        role=torch.tensor([REPLY_ROLES.index(roles[index]) for index in side]),
        stats={"log_sum_sq": -2 * torch.rand(size, width, generator=generator, dtype=torch.float64).to(dtype)},
        score=score.to(dtype).requires_grad_(),
        facts={"label": (unit % 2 == 0).double(), "margin": numbers[1][unit].to(dtype)},
    )


def one(scored: Scored, unit: int) -> Scored:
    """One unit of a view, with leaves of its own."""
    part = scored._take(scored.unit == unit)
    assert part.policy is not None
    assert part.score is not None
    return replace(
        part,
        policy=part.policy.detach().requires_grad_(),
        score=part.score.detach().requires_grad_(),
        unit=torch.zeros_like(part.unit),
    )


def ours(objective: Objective, scored: Scored) -> tuple[Tensor, Tensor]:
    """Loss of the step (sum of losses over sum of counts) and its gradient with respect to log-probs or scores."""
    losses = objective(scored).sum
    marks = [
        {REPLY_ROLES[role]: mask.numpy() for role, of, mask in zip(scored.role, scored.unit, scored.mask, strict=True) if of == unit}
        for unit in range(scored.units)
    ]
    loss = losses.sum() / sum(objective.count(mark, {}) for mark in marks)
    return loss.detach(), torch.autograd.grad(loss, leaf(scored, objective.needs.readout))[0]


def theirs(kind: str, settings: dict[str, Any], scored: Scored, prompt_logps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """TRL's loss of the same replies as one batch, and its gradient. prompt_logps: [N, PROMPT − 1], where TRL reads them."""
    policy, reference, score = scored.policy, scored.reference, scored.score
    assert policy is not None
    assert reference is not None
    assert score is not None
    prompts = torch.full((len(policy), PROMPT - 1), -1.0, dtype=policy.dtype) if prompt_logps is None else prompt_logps
    rows = torch.arange(len(policy))[:, None]
    ids = torch.cat([rows, torch.ones(len(policy), PROMPT - 1 + policy.shape[1], dtype=torch.long)], 1)
    completion = torch.cat([torch.zeros(len(policy), PROMPT, dtype=torch.long), scored.mask.long()], 1)
    attention = completion.clone()
    attention[:, :PROMPT] = 1
    inputs = batch(kind, ids, attention, completion)
    if settings.get("tpo_alpha") == 0:
        # Without its SFT term TRL's collator leaves the gold replies out.
        inputs = {name: value[: 2 * scored.units] for name, value in inputs.items()}
    if kind == "kto":
        inputs["label"] = scored.side("sample").facts["label"] > 0.5
    if kind == "reward" and "margin" in scored.facts:
        inputs["margin"] = scored.side("chosen").facts["margin"]
    trainer = built(kind, json.dumps(settings))
    trainer.ref_model = Table(torch.cat([prompts, reference], 1))
    model = Table(torch.cat([prompts, policy], 1), torch.cat([prompts, scored.stats["log_sum_sq"]], 1))
    loss = trainer.compute_loss(Scores(score) if kind == "reward" else model, inputs)
    return loss.detach(), torch.autograd.grad(loss, leaf(scored, "score" if kind == "reward" else "logps"))[0]


def leaf(scored: Scored, readout: str) -> Tensor:
    """The tensor gradients flow to."""
    value = scored.score if readout == "score" else scored.policy
    assert value is not None
    return value


def batch(kind: str, ids: Tensor, attention: Tensor, completion: Tensor) -> dict[str, Tensor]:
    """What TRL's collator of this trainer gives, from rows [N, L] in the order of ROLES."""
    whole = {"input_ids": ids, "attention_mask": attention}
    labels = ids.masked_fill(completion == 0, -100)
    if kind in ("dpo", "tpo"):
        return whole | {"completion_mask": completion}
    if kind == "sft":
        return whole | {"labels": labels}
    if kind == "reward":
        return whole
    halves = {name: value.chunk(2) for name, value in (whole | {"labels": labels, "completion_mask": completion}).items()}
    if kind == "kto":
        names = ("input_ids", "attention_mask", "completion_mask")
        return {prefix + name: halves[name][side] for name in names for side, prefix in enumerate(("", "KL_"))}
    return {f"{role}_{name}": halves[name][side] for name in (*whole, "labels") for side, role in enumerate(ROLES[kind])}


class Table:
    """Stands where TRL has a model. logps: [N, L − 1], of every token after the first."""

    def __init__(self, logps: Tensor, log_sum_sq: Tensor | None = None):
        self.logps, self.log_sum_sq = logps, log_sum_sq

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False, labels: Tensor | None = None, fused_lm_head: bool = False
    ) -> SimpleNamespace:
        """What the trainer asked for: log-probs (zero where the label is −100) and their company, or logits."""
        rows = input_ids[:, 0]
        logps = self.logps[rows]
        if fused_lm_head:
            assert labels is not None
            learned = labels[:, 1:] != -100
            zero = torch.zeros_like(logps)
            return SimpleNamespace(
                log_probs=torch.where(learned, logps, zero),
                log_sum_sq_probs=zero if self.log_sum_sq is None else torch.where(learned, self.log_sum_sq[rows], zero),
                entropy=zero,
                mean_logits=zero,
                is_top1=learned,
                label_mask=learned,
            )
        logits = torch.stack([log1mexp(logps), logps], -1)
        return SimpleNamespace(logits=torch.cat([logits, torch.zeros_like(logits[:, :1])], 1))


class Scores:
    """Stands where TRL has a reward model. scores: [N]."""

    def __init__(self, scores: Tensor):
        self.scores = scores

    def __call__(self, input_ids: Tensor, **rest: Any) -> SimpleNamespace:
        """Scores of the rows, as logits [N, 1]. TRL hands the model the margins too."""
        return SimpleNamespace(logits=self.scores[input_ids[:, 0], None])


@lru_cache(maxsize=1)
def built(kind: str, settings: str) -> Any:
    """TRL's trainer with these settings (JSON) around a tiny model; its own checks of the settings have passed.

    Only the last one is kept: building another resets state of accelerate that all of them share.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import trl
    from datasets import Dataset
    from trl.experimental import cpo, orpo, tpo

    home = {"cpo": cpo, "orpo": orpo, "tpo": tpo}.get(kind, trl)
    name = "Reward" if kind == "reward" else kind.upper()
    pairs: list[dict[str, Any]] = [row | {"reference": row["chosen"]} for row in preference_dicts(2)]
    if kind in ("kto", "sft"):
        pairs = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in pairs]
    columns = {
        "kto": ("prompt", "completion", "label"),
        "sft": ("prompt", "completion"),
        "tpo": ("prompt", "chosen", "rejected", "reference"),
    }
    arguments = getattr(home, f"{name}Config")(
        output_dir=str(Path(tempfile.gettempdir()) / "trl_losses"),
        bf16=False,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        gradient_checkpointing=False,
        **json.loads(settings),
    )
    config = FAMILIES["llama"]()
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config) if kind == "reward" else tiny()
    return getattr(home, f"{name}Trainer")(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(pairs).select_columns(list(columns.get(kind, ("prompt", "chosen", "rejected")))),
        processing_class=tokenizer(),
        **({"ref_model": tiny(seed=1)} if kind in ("dpo", "kto") else {}),
    )
