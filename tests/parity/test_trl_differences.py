"""Where TRL 1.16 and this package differ on purpose: what TRL gives, what ours gives, and the relation between the two.

`docs/numerics.md` lists the same differences with who is right and why. TRL's numbers come from its own code.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from equipoise.core.errors import UsageError
from equipoise.core.records import REPLY_ROLES
from equipoise.objectives._base import Objective, Scored
from equipoise.objectives._load import build, methods
from tests.parity.trl_losses import PROMPT, UNITS, built, one, ours, theirs, view

pytest.importorskip("trl", reason="TRL is not installed: make parity")
pytestmark = pytest.mark.parity
Tensor = torch.Tensor


def method(name: str, **fields: Any) -> Objective:
    if name not in methods():
        pytest.skip(f"no method {name} here")
    return build({"name": name, **fields})


def equal(left: Tensor | float, right: Tensor | float, tolerance: float = 1e-10) -> None:
    """Equal relative to the largest number."""
    left, right = torch.as_tensor(left), torch.as_tensor(right)
    assert float((left - right).abs().max()) <= tolerance * float(right.abs().max())


def of(scored: Scored, role: str) -> Tensor:
    """[U] rows of a role."""
    return torch.nonzero(scored.role == REPLY_ROLES.index(role)).squeeze(1)


def pair(chosen: float, rejected: float, tokens: int = 1, dtype: torch.dtype = torch.float32) -> Scored:
    """One pair with these log-ratios, from a reference of −10 nats a token."""
    scored = one(view("dpo", "random", dtype, units=1), 0)
    ratios = torch.tensor([[chosen], [rejected]], dtype=dtype) / tokens
    mask = (torch.arange(scored.mask.shape[1]) < tokens).expand_as(scored.mask)
    reference = torch.full(mask.shape, -10.0, dtype=dtype)
    return replace(scored, policy=(reference + ratios).requires_grad_(), reference=reference, mask=mask)


def labelled(pairs: Scored) -> Scored:
    """Both replies of every pair as labelled samples, each its own mismatched reply."""
    assert pairs.policy is not None
    assert pairs.reference is not None
    size = len(pairs.policy)
    order = torch.cat([of(pairs, "chosen"), of(pairs, "rejected")])
    twice = torch.cat([order, order])
    return Scored(
        policy=pairs.policy.detach()[twice].requires_grad_(),
        reference=pairs.reference[twice],
        mask=pairs.mask[twice],
        unit=torch.arange(size).repeat(2),
        role=torch.tensor([REPLY_ROLES.index(role) for role in ("sample", "mismatched")]).repeat_interleave(size),
        stats={name: value[twice] for name, value in pairs.stats.items()},
        score=torch.zeros(2 * size, dtype=pairs.policy.dtype),
        facts={"label": (torch.arange(size) < size // 2).double().repeat(2)},
    )


def some(scored: Scored, units: list[int]) -> Scored:
    """These units of a view, with leaves of their own."""
    part = scored._take(torch.isin(scored.unit, torch.tensor(units)))
    assert part.policy is not None
    assert part.score is not None
    number = {unit: index for index, unit in enumerate(units)}
    unit = torch.tensor([number[int(unit)] for unit in part.unit])
    return replace(part, unit=unit, policy=part.policy.detach().requires_grad_(), score=part.score.detach().requires_grad_())


# Which tokens and units an average runs over.

SFT_TERMS = [
    ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "beta": 0.3}, "rpo", {"sft_weight": 0.2}),
    (
        "dpo",
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.3},
        "mpo",
        {"sft_weight": 1.0},
    ),
    ("cpo", {"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 0.7}, "cpo", {"sft_weight": 0.7}),
    ("cpo", {"loss_type": "simpo", "beta": 0.3, "simpo_gamma": 1.0, "cpo_alpha": 0.7}, "cpo_simpo", {"gamma": 1.0, "sft_weight": 0.7}),
    ("tpo", {"loss_type": "sigmoid", "beta": 0.3, "tpo_alpha": 0.7}, "tpo", {"sft_weight": 0.7}),
    ("tpo", {"loss_type": "tpo-l", "beta": 0.3, "tpo_l_gamma": 0.5, "tpo_alpha": 0.7}, "tpo_l", {"gamma": 0.5, "sft_weight": 0.7}),
]


@pytest.mark.parametrize(("kind", "settings", "name", "fields"), SFT_TERMS, ids=lambda value: value if isinstance(value, str) else "")
def test_an_sft_term_is_a_mean_over_replies_here_and_over_a_micro_batchs_tokens_in_trl(
    kind: str, settings: dict[str, Any], name: str, fields: dict[str, Any]
) -> None:
    scored = view(kind, "random")
    objective = method(name, beta=0.3, **fields)
    mine, my_gradient = ours(objective, scored)
    loss, gradient = theirs(kind, settings, scored)
    rows = of(scored, "gold" if kind == "tpo" else "chosen")
    nll, lengths = -scored.policy_logps()[rows].detach(), scored.lengths()[rows].double()
    weight = fields["sft_weight"]
    difference = weight * (nll.sum() / lengths.sum() - (nll / lengths).mean())
    assert abs(float(difference)) > 1e-3
    equal(loss - mine, difference, 1e-9)
    slope = torch.zeros_like(gradient)
    slope[rows] = (weight * (1 / (UNITS * lengths) - 1 / lengths.sum()))[:, None] * scored.mask[rows]
    equal(gradient - my_gradient, slope, 1e-9)
    halves = [theirs(kind, settings, some(scored, units))[0] for units in ([0, 1], [2, 3])]
    assert abs(float(sum(halves) / 2 - loss)) > 1e-4, "TRL's loss depends on the cut into micro-batches"
    equal(sum(ours(objective, some(scored, units))[0] for units in ([0, 1], [2, 3])) / 2, mine)


def test_sft_of_the_chosen_replies_counts_tokens_on_both_sides() -> None:
    scored = view("dpo", "random")
    loss, gradient = theirs("dpo", {"loss_type": "sft"}, scored)
    rows = of(scored, "chosen")
    gold = replace(some(scored._take(rows), [0, 1, 2, 3]), role=torch.full((UNITS,), REPLY_ROLES.index("gold")))
    mine, my_gradient = ours(method("sft"), gold)
    equal(mine, loss)
    equal(my_gradient, gradient[rows])


@pytest.mark.parametrize("inputs", ["random", "real", "extreme"])
def test_orpos_sft_term_reads_the_prompt_too_in_trl(inputs: str) -> None:
    prompts = -torch.rand(2, PROMPT - 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for unit in range(UNITS):
        scored = one(view("orpo", inputs), unit)
        mine, my_gradient = ours(method("orpo", beta=0.3), scored)
        loss, gradient = theirs("orpo", {"beta": 0.3}, scored, prompts)
        reply, tokens = scored.policy_logps()[0].detach(), scored.lengths()[0]
        whole = tokens + PROMPT - 1
        # TRL takes the odds in float32, whatever it is given.
        equal(loss, mine - (reply + prompts[0].sum()) / whole + reply / tokens, 1e-6)
        slope = torch.zeros_like(gradient)
        slope[0] = (1 / tokens - 1 / whole) * scored.mask[0]
        equal(gradient, my_gradient + slope, 1e-6)


CUTS = ([[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 3], [1, 2]])
COUPLED = [
    ("kto", {"loss_type": "kto"}, "kto"),
    ("dpo", {"loss_type": "aot"}, "aot"),
    ("dpo", {"loss_type": "aot_unpaired"}, "aot_unpaired"),
]


@pytest.mark.parametrize(("kind", "settings", "name"), COUPLED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_statistic_of_the_batch_is_the_micro_batchs_in_trl_and_the_steps_here(kind: str, settings: dict[str, Any], name: str) -> None:
    """KTO's baseline and AOT's order: the same where the micro-batch is the step; cut in two, TRL's loss of the step is another."""
    scored, settings = view(kind, "random", seed=3), settings | {"beta": 0.3}
    whole = theirs(kind, settings, scored)[0]
    cut = [sum(theirs(kind, settings, some(scored, units))[0] for units in halves) / 2 for halves in CUTS]
    assert max(abs(float(loss - whole)) for loss in cut) > 1e-3
    equal(ours(method(name, beta=0.3), scored)[0], whole)


# What a setting means.


def test_label_smoothing_changes_nothing_in_trls_sigmoid() -> None:
    scored = view("dpo", "random")
    plain, smoothed = (theirs("dpo", {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": value}, scored)[0] for value in (0.0, 0.2))
    assert float(plain) == float(smoothed)
    swapped = replace(scored, role=scored.role.flip(0))._take(torch.arange(2 * UNITS).roll(UNITS))
    flipped = theirs("dpo", {"loss_type": "sigmoid", "beta": 0.3}, swapped)[0]
    equal(ours(method("dpo", beta=0.3, label_smoothing=0.2), scored)[0], 0.8 * plain + 0.2 * flipped)


def test_wpos_weight_is_cut_at_one_here_as_its_authors_do() -> None:
    scored = view("dpo", "random")
    objective = method("wpo", beta=0.3)
    above = 0
    for unit in range(UNITS):
        part = one(scored, unit)
        own = (part.token_logps("policy") - part.stat("log_sum_sq")).sum(1) / part.lengths()
        weight = float(own.sum().exp())
        above += weight > 1
        mine, my_gradient = ours(objective, part)
        loss, gradient = theirs("dpo", {"loss_type": "sigmoid", "beta": 0.3, "use_weighting": True}, part)
        equal(max(weight, 1.0) * mine, loss)
        equal(max(weight, 1.0) * my_gradient, gradient)
    assert 0 < above < UNITS


def test_exo_without_smoothing_is_refused_by_both() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        theirs("dpo", {"loss_type": "exo_pair", "label_smoothing": 0.0}, view("dpo", "random"))
    with pytest.raises(UsageError, match="label_smoothing"):
        method("exo", label_smoothing=0.0)


def test_unpaired_apo_zero_is_half_of_the_paired_one() -> None:
    scored = view("dpo", "real")
    loss, gradient = theirs("kto", {"loss_type": "apo_zero_unpaired", "beta": 0.3}, labelled(scored))
    mine, my_gradient = ours(method("apo_zero", beta=0.3), scored)
    equal(2 * loss, mine)
    equal(2 * gradient[: 2 * UNITS], my_gradient)
    samples = labelled(scored)
    alone, its_gradient = ours(method("apo_zero_unpaired", beta=0.3), samples._take(of(samples, "sample")))
    equal(loss, alone)
    equal(gradient[: 2 * UNITS], its_gradient)


def test_bco_on_labels_is_bco_pair_where_the_shift_is_zero() -> None:
    """TRL 1.16 has no trainer for BCO on labelled replies. Rejected replies that mirror the chosen ones have δ = 0."""
    scored = view("dpo", "random")
    assert scored.policy is not None
    assert scored.reference is not None
    policy, reference = (value.detach()[of(scored, "chosen")] for value in (scored.policy, scored.reference))
    mirrored = replace(
        scored,
        policy=torch.cat([policy, reference]).requires_grad_(),
        reference=torch.cat([reference, policy]),
        mask=scored.mask[of(scored, "chosen")].repeat(2, 1),
    )
    loss, gradient = theirs("dpo", {"loss_type": "bco_pair", "beta": 0.3}, mirrored)
    samples = labelled(mirrored)
    mine, my_gradient = ours(method("bco", beta=0.3), samples._take(of(samples, "sample")))
    equal(2 * mine, loss)
    equal(2 * my_gradient[: 2 * UNITS], gradient)


def test_a_pair_without_a_margin_has_margin_zero_here_and_none_in_trl() -> None:
    scored = view("reward", "random")
    scored.facts["margin"][0] = math.nan
    assert math.isnan(float(theirs("reward", {}, scored)[0]))
    zero = replace(scored, facts={"margin": scored.facts["margin"].nan_to_num()})
    assert float(ours(method("bradley_terry"), scored)[0]) == pytest.approx(float(theirs("reward", {}, zero)[0]), rel=1e-10)


# Digits.


SATURATED = [
    ("dpo", "apo_zero", pair(200.0, -200.0), 0, -0.1),
    ("dpo", "apo_down", pair(0.0, -200.0), 1, 0.1),
    ("kto", "kto", labelled(pair(200.0, -200.0)), 0, -0.05),
]


@pytest.mark.parametrize(("kind", "name", "scored", "reply", "slope"), SATURATED, ids=[case[1] for case in SATURATED])
def test_a_reply_far_from_the_reference_keeps_its_gradient_here(kind: str, name: str, scored: Scored, reply: int, slope: float) -> None:
    """1 − σ(u) and its gradient are 0 in float32 from u = 17 on; those of σ(−u) are e^(−u)."""
    _, my_gradient = ours(method(name, beta=0.1), scored)
    _, gradient = theirs(kind, {"loss_type": name, "beta": 0.1}, scored)
    assert float(my_gradient[reply, 0]) == pytest.approx(slope * math.exp(-20.0), rel=1e-5)
    assert float(gradient[reply, 0]) == 0.0


def test_discopop_of_a_pair_far_on_the_wrong_side_is_finite_here() -> None:
    """m·e^(−z) is 0·∞ in TRL once e^(−z) overflows."""
    scored = pair(-60.0, 60.0)
    assert math.isnan(float(theirs("dpo", {"loss_type": "discopop", "beta": 1.0}, scored)[0]))
    mine, gradient = ours(method("discopop", beta=1.0), scored)
    assert float(mine) == pytest.approx(120.0)
    assert torch.isfinite(gradient).all()


def test_forward_kl_of_lost_replies_is_finite_here() -> None:
    scored = pair(-100.0, -100.0)
    settings = {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"}
    assert math.isnan(float(theirs("dpo", settings, scored)[0]))
    mine, gradient = ours(method("f_dpo", divergence="forward_kl"), scored)
    assert float(mine) == pytest.approx(math.log(2))
    assert torch.isfinite(gradient).all()


def test_alpha_divergences_stop_at_the_same_exponent_and_trls_refuses_float64() -> None:
    settings = {"loss_type": "sigmoid", "beta": 0.1, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}
    objective = method("f_dpo", beta=0.1, divergence="alpha", alpha=0.5)
    for unit in range(UNITS):
        scored = one(view("dpo", "extreme", torch.float32), unit)
        equal(ours(objective, scored)[0], theirs("dpo", settings, scored)[0], 1e-5)
    with pytest.raises(KeyError, match="float64"):
        theirs("dpo", settings, view("dpo", "random"))


def test_orpo_of_a_certain_reply_has_a_gradient_here() -> None:
    """At p = 1 the odds are infinite: TRL's gradient is not a number, ours stops one rounding step short."""
    logps = torch.tensor([[0.0], [-1.0]], requires_grad=True)
    losses = built("orpo", '{"beta": 0.1}').odds_ratio_loss(logps[0], logps[1])[0]
    assert torch.isnan(torch.autograd.grad(losses.sum(), logps)[0]).any()
    scored = pair(10.0, 9.0)
    assert scored.policy is not None
    assert scored.policy[:, 0].tolist() == [0.0, -1.0]
    _, gradient = ours(method("orpo"), scored)
    assert torch.isfinite(gradient).all()


def test_long_replies_in_float32_lose_more_digits_in_trl() -> None:
    """TRL sums policy and reference apart and subtracts two large numbers; here every token's difference is summed."""
    stored = view("dpo", "real", torch.float32, units=32)
    assert stored.policy is not None
    assert stored.reference is not None
    exact = replace(stored, policy=stored.policy.detach().double(), reference=stored.reference.double())
    worst = [0.0, 0.0]
    objective, settings = method("dpo", beta=0.1), {"loss_type": "sigmoid", "beta": 0.1}
    for unit in range(32):
        truth, part = ours(objective, one(exact, unit))[0], one(stored, unit)
        for index, value in enumerate((ours(objective, part)[0], theirs("dpo", settings, part)[0])):
            worst[index] = max(worst[index], abs(float(value / truth) - 1))
    assert worst[0] < 1e-6 < worst[1] < 1e-4, worst
