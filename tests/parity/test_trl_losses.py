"""Every loss TRL 1.16 has and this package has too: equal values and gradients, or a difference that is written down.

The gradient compared is the one with respect to the log-probs (the scores, for reward models). `docs/numerics.md` lists
the differences and who is right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from equipoise.objectives._base import Objective, Scored
from equipoise.objectives._load import build, methods
from tests.parity.trl_losses import one, ours, theirs, view

pytest.importorskip("trl", reason="TRL is not installed: make parity")
pytestmark = pytest.mark.parity


@dataclass(frozen=True)
class Case:
    """kind and settings name TRL's loss, spec ours; theirs = factor · ours.

    alone: TRL averages its SFT term over the tokens of a micro-batch, so only batches of one unit are compared.
    zero: our formula with a reference of log-probs 0, for losses TRL applies to the policy alone. margin: pairs have one.
    extreme: whether TRL survives the extreme replies. tolerance64: relative, in float64; None where TRL refuses float64.
    """

    kind: str
    settings: dict[str, Any]
    spec: dict[str, Any]
    factor: float = 1.0
    alone: bool = False
    zero: bool = False
    margin: bool = False
    extreme: bool = True
    tolerance64: float | None = 1e-10

    def __str__(self) -> str:
        values = "-".join(f"{value}" for value in self.settings.values())
        return f"{self.kind}-{values}-{self.spec['name']}".replace(" ", "")

    def objective(self) -> Objective:
        if self.spec["name"] not in methods():
            pytest.skip(f"no method {self.spec['name']} here")
        return build(self.spec)

    def scored(self, view: Scored) -> Scored:
        facts = {name: value for name, value in view.facts.items() if name != "margin" or self.margin}
        reference = torch.zeros_like(view.mask, dtype=leaf_dtype(view)) if self.zero else view.reference
        return replace(view, facts=facts, reference=reference)


def leaf_dtype(scored: Scored) -> torch.dtype:
    assert scored.policy is not None
    return scored.policy.dtype


def dpo(loss: str | list[str], name: str, *, trl: dict[str, Any] | None = None, beta: float = 0.3, **more: Any) -> Case:
    """A loss of TRL's DPO trainer; fields of ours go by keyword, those of `Case` too."""
    flags = {key: more.pop(key) for key in ("alone", "extreme", "tolerance64") if key in more}
    return Case("dpo", {"loss_type": loss, "beta": beta, **(trl or {})}, {"name": name, "beta": beta, **more}, **flags)


CASES = [
    dpo("sigmoid", "dpo"),
    dpo("hinge", "hinge"),
    dpo("ipo", "ipo"),
    dpo("exo_pair", "exo", trl={"label_smoothing": 1e-3}, label_smoothing=1e-3, tolerance64=1e-6),
    dpo("nca_pair", "nca"),
    dpo("robust", "robust", trl={"label_smoothing": 0.2}, label_smoothing=0.2),
    dpo("bco_pair", "bco_pair"),
    dpo("sppo_hard", "sppo"),
    dpo("aot", "aot"),
    dpo("aot", "aot", trl={"label_smoothing": 0.2}, label_smoothing=0.2),
    dpo("aot_unpaired", "aot_unpaired"),
    dpo("aot_unpaired", "aot_unpaired", trl={"label_smoothing": 0.2}, label_smoothing=0.2),
    dpo("apo_zero", "apo_zero"),
    dpo("apo_down", "apo_down"),
    dpo("discopop", "discopop", trl={"discopop_tau": 0.2}, temperature=0.2),
    dpo("sigmoid_norm", "dpo_norm", beta=5.0),
    dpo(["sigmoid", "sft"], "rpo", trl={"loss_weights": [1.0, 0.2]}, sft_weight=0.2, alone=True),
    dpo(["sigmoid", "bco_pair", "sft"], "mpo", trl={"loss_weights": [0.8, 0.2, 1.0]}, alone=True),
    dpo("sigmoid", "f_dpo", trl={"f_divergence_type": "forward_kl"}, divergence="forward_kl", extreme=False),
    dpo("sigmoid", "f_dpo", trl={"f_divergence_type": "js_divergence"}, divergence="jensen_shannon"),
    *(
        dpo(
            "sigmoid",
            "f_dpo",
            trl={"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha},
            divergence="alpha",
            alpha=1 - alpha,
            tolerance64=None if alpha < 1 else 1e-10,
        )
        for alpha in (0.0, 0.5, 0.7, 1.0)
    ),
    *(dpo("sigmoid", "ld_dpo", trl={"ld_alpha": alpha}, alpha=alpha) for alpha in (0.0, 0.5, 1.0)),
    dpo("sigmoid", "wpo", trl={"use_weighting": True}, clamp=False),
    *(
        Case(
            "cpo",
            {"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": weight},
            {"name": "cpo", "beta": 0.3, "sft_weight": weight},
            alone=True,
        )
        for weight in (0.0, 0.7)
    ),
    Case(
        "cpo",
        {"loss_type": "hinge", "beta": 0.5, "cpo_alpha": 0.3},
        {"name": "slic", "margin": 2.0, "sft_weight": 0.6, "sft_reduction": "mean"},
        factor=0.5,
        alone=True,
    ),
    Case("cpo", {"loss_type": "ipo", "beta": 0.3, "cpo_alpha": 0.0}, {"name": "ipo", "beta": 0.3}, zero=True),
    Case("cpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}, {"name": "simpo", "beta": 2.0, "gamma": 1.0}),
    Case(
        "cpo",
        {"loss_type": "simpo", "beta": 10.0, "simpo_gamma": 5.4, "cpo_alpha": 0.05},
        {"name": "cpo_simpo", "beta": 10.0, "gamma": 5.4, "sft_weight": 0.05},
        alone=True,
    ),
    *(
        Case(
            "cpo",
            {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 0.1, "cpo_alpha": 0.0, "alpha": alpha},
            {"name": "alpha_po", "beta": 2.5, "gamma": 0.1, "alpha": alpha},
        )
        for alpha in (0.25, -0.5)
    ),
    Case("kto", {"beta": 0.3}, {"name": "kto", "beta": 0.3}),
    Case(
        "kto",
        {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5},
        {"name": "kto", "beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5},
    ),
    *(
        Case(
            "tpo",
            {"loss_type": "sigmoid", "beta": 0.3, "tpo_alpha": weight},
            {"name": "tpo", "beta": 0.3, "sft_weight": weight},
            alone=True,
        )
        for weight in (0.0, 0.7)
    ),
    Case(
        "tpo",
        {"loss_type": "tpo-l", "beta": 2.5, "tpo_l_gamma": 0.5, "tpo_alpha": 0.05},
        {"name": "tpo_l", "beta": 2.5, "gamma": 0.5, "sft_weight": 0.05},
        alone=True,
    ),
    Case("tpo", {"loss_type": "hinge", "beta": 0.3, "tpo_alpha": 0.0}, {"name": "hinge", "beta": 0.3}, zero=True),
    Case("tpo", {"loss_type": "ipo", "beta": 0.3, "tpo_alpha": 0.0}, {"name": "ipo", "beta": 0.3}, zero=True),
    Case("reward", {}, {"name": "bradley_terry"}),
    Case("reward", {}, {"name": "bradley_terry"}, margin=True),
    Case("reward", {"center_rewards_coefficient": 0.01}, {"name": "bradley_terry", "center_rewards_coefficient": 0.01}),
    Case("sft", {"loss_type": "nll"}, {"name": "sft"}),
    Case("sft", {"loss_type": "dft"}, {"name": "dft"}),
]


def agree(case: Case, scored: Scored, tolerance: float) -> None:
    """Loss and gradient of one batch: relative to their size, down to the rounding of numbers near one."""
    least = 8 * torch.finfo(leaf_dtype(scored)).eps
    mine, my_gradient = ours(case.objective(), scored)
    loss, gradient = theirs(case.kind, case.settings, scored)
    assert case.factor * float(mine) == pytest.approx(float(loss), rel=tolerance, abs=least)
    worst = (case.factor * my_gradient - gradient).abs().max()
    assert float(worst) <= tolerance * float(gradient.abs().max()) + least


@pytest.mark.parametrize("inputs", ["random", "real", "extreme"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_trls_in_float64(case: Case, inputs: str) -> None:
    if case.tolerance64 is None:
        pytest.skip("TRL refuses float64 here")
    if inputs == "extreme" and not case.extreme:
        pytest.skip("TRL overflows: see the test of that difference")
    scored = case.scored(view(case.kind, inputs))
    if not case.alone:
        agree(case, scored, case.tolerance64)
    for unit in range(scored.units):
        agree(case, one(scored, unit), case.tolerance64)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_trls_in_float32(case: Case) -> None:
    scored = case.scored(view(case.kind, "random", torch.float32, seed=1))
    if not case.alone:
        agree(case, scored, 1e-6)
    for unit in range(scored.units):
        agree(case, one(scored, unit), 1e-6)
