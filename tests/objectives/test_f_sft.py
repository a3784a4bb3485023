from __future__ import annotations

from dataclasses import replace
from math import exp, log
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.core.records import REPLY_ROLES
from equipoise.objectives._base import Scored
from equipoise.objectives.f_sft import FSFT
from equipoise.objectives.sft import SFT

from .views import random_view

# f(u), u = policy/expert, as in the definitions of the divergences.
GENERATORS = {
    "total_variation": lambda u: abs(u - 1) / 2,
    "pearson": lambda u: (u - 1) ** 2,
    "hellinger": lambda u: (np.sqrt(u) - 1) ** 2,
    "forward_kl": lambda u: -np.log(u) + u - 1,
    "reverse_kl": lambda u: u * np.log(u) - u + 1,
    "jensen_shannon": lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
    "neyman": lambda u: (1 - u) ** 2 / u,
}
LEVELS = ["token", "sequence", "sequence_mean"]
BY_HAND = [
    # divergence, s, φ(s), w(s)
    ("total_variation", 0.7, 0.7, 1.0),
    ("total_variation", -50.0, -50.0, 1.0),
    ("pearson", 1.0, 0.75, 0.5),
    ("pearson", -2.0, -3.0, 2.0),
    ("pearson", 5.0, 1.0, 0.0),
    ("hellinger", 1.0, 0.5, 0.25),
    ("hellinger", -0.5, -1.0, 4.0),
    ("forward_kl", 1.0, log(2), 0.5),
    ("forward_kl", -0.5, -log(2), 2.0),
    ("reverse_kl", log(2), 0.5, 0.5),
    ("reverse_kl", -log(2), -1.0, 2.0),
    ("jensen_shannon", log(2), log(1.5), 1 / 3),
    ("jensen_shannon", log(3 / 4), log(2 / 3), 2.0),
    ("neyman", 3.0, 2.0, 0.5),
    ("neyman", -0.75, -1.0, 2.0),
    # Beyond weight 10 along the tangent: from s₀ with w(s₀) = 10, φ(s) = φ(s₀) + 10 (s − s₀).
    ("pearson", -20.0, -18 - 81 - 20, 10.0),
    ("hellinger", -2.0, (1 - 10**0.5) + 10 * (-1 - 10**-0.5), 10.0),
    ("forward_kl", -2.0, -log(10) - 11, 10.0),
    ("reverse_kl", -log(10) - 1, -9 - 10, 10.0),
    ("jensen_shannon", log(0.55) - 1, log(2 / 11) - 10, 10.0),
    ("neyman", -1.99, -1.8 - 10, 10.0),
]


def gold(policy: list[float], reference: list[float]) -> Scored:
    """One demonstration."""
    tensors = [torch.tensor([value], dtype=torch.float64) for value in (policy, reference)]
    role = torch.tensor([REPLY_ROLES.index("gold")])
    return Scored(tensors[0], tensors[1], torch.ones(1, len(policy), dtype=torch.bool), torch.zeros(1, dtype=torch.long), role)


def gradient(objective: Any, view: Scored) -> torch.Tensor:
    assert view.policy is not None
    policy = view.policy.clone().requires_grad_()
    objective(replace(view, policy=policy)).sum.sum().backward()
    assert policy.grad is not None
    return policy.grad


@pytest.mark.parametrize(("divergence", "s", "phi", "weight"), BY_HAND)
def test_link_and_weight_by_hand(divergence: Any, s: float, phi: float, weight: float) -> None:
    for beta in (1.0, 0.25):
        objective = FSFT(divergence=divergence, beta=beta)
        view = gold([-3 + s / beta], [-3])
        losses = objective(view)
        assert losses.sum.item() == pytest.approx(-phi / beta)
        assert losses.meters["weight"].item() == pytest.approx(weight)
        assert losses.meters["rewards/gold"].item() == pytest.approx(s)
        assert gradient(objective, view).item() == pytest.approx(-weight)


@pytest.mark.parametrize("divergence", GENERATORS)
@pytest.mark.parametrize("s", [-0.3, 0.0, 0.2, 0.45])
def test_link_is_the_conjugate_of_its_generator(divergence: Any, s: float) -> None:
    # φ(s) = min over u of s·u + f(u), searched on a grid of steps 0.00005 (u = 1 among them: total variation has its kink there).
    u = np.linspace(0.01, 10.01, 200_001)
    expected = (s * u + GENERATORS[divergence](u)).min()
    assert -FSFT(divergence=divergence)(gold([-1 + s], [-1])).sum.item() == pytest.approx(expected, abs=1e-7)


def test_levels_by_hand() -> None:
    # Token log-ratios 1 and 2, Pearson at β = ½: s = ½ and 1, φ = 7/16 and 3/4.
    view = gold([-1, -1], [-2, -3])
    token = FSFT(beta=0.5)(view)
    assert token.sum.item() == pytest.approx(-2 * (7 / 16 + 3 / 4))
    # w = 3/4 and 1/2.
    assert token.meters["weight"].item() == pytest.approx(0.625)
    # Sum 3: s = 3/2, φ = 15/16. As −Δ + β/4 Δ² = −3 + 9/8. Mean 3/2: −3/2 + 9/32.
    assert FSFT(beta=0.5, level="sequence")(view).sum.item() == pytest.approx(-3 + 9 / 8)
    assert FSFT(beta=0.5, level="sequence_mean")(view).sum.item() == pytest.approx(-3 / 2 + 9 / 32)


@pytest.mark.parametrize("divergence", GENERATORS)
def test_a_large_bound_costs_no_digits_in_float32(divergence: Any) -> None:
    objective, view = FSFT(divergence=divergence, max_weight=1000.0), gold([-1.1, -0.9, -9.0], [-1.0, -1.0, -9.3])
    assert view.policy is not None
    assert view.reference is not None
    single = replace(view, policy=view.policy.float(), reference=view.reference.float())
    torch.testing.assert_close(gradient(objective, single).double(), gradient(objective, view), rtol=2e-6, atol=0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("divergence", GENERATORS)
def test_gradient_at_the_reference_is_that_of_sft(divergence: Any, level: Any) -> None:
    view = random_view(FSFT.needs)
    assert view.policy is not None
    at_reference = replace(view, reference=view.policy.clone())
    per_unit = view.mask.sum(1, keepdim=True) if level == "sequence_mean" else 1
    ours = gradient(FSFT(divergence=divergence, level=level, beta=0.7), at_reference)
    torch.testing.assert_close(ours * per_unit, gradient(SFT(), view))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("divergence", GENERATORS)
def test_small_beta_is_sft(divergence: Any, level: Any) -> None:
    view = random_view(FSFT.needs, seed=3)
    objective = FSFT(divergence=divergence, level=level, beta=1e-9)
    torch.testing.assert_close(gradient(objective, view), gradient(SFT(), view))
    constant = view.side("gold").reference_logps()
    torch.testing.assert_close(objective(view).sum, SFT()(view).sum + constant, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_total_variation_is_sft_everywhere(level: Any) -> None:
    objective = FSFT(divergence="total_variation", level=level, beta=3.0)
    for scale in (1.0, 1000.0):
        view = random_view(FSFT.needs, seed=4, scale=scale)
        torch.testing.assert_close(gradient(objective, view), gradient(SFT(), view))
        torch.testing.assert_close(objective(view).sum, SFT()(view).sum + view.side("gold").reference_logps())


def test_counts_tokens_unless_the_mean_is_taken() -> None:
    marks = {"gold": np.array([True, False, True])}
    assert [FSFT(level=level).count(marks, {}) for level in ("token", "sequence", "sequence_mean")] == [2.0, 2.0, 1.0]


@pytest.mark.parametrize("divergence", GENERATORS)
def test_extremes_have_finite_loss_and_bounded_gradient(divergence: Any) -> None:
    view = random_view(FSFT.needs, dtype=torch.float32)
    for level in LEVELS:
        for size in (1e4, -1e4):
            far = replace(view, policy=torch.full_like(view.mask, 1, dtype=torch.float32) * size)
            objective = FSFT(divergence=divergence, level=level)  # type: ignore[arg-type]
            assert torch.isfinite(objective(far).sum).all()
            slopes = gradient(objective, far)
            assert ((slopes <= 0) & (slopes >= -10)).all()


def test_weight_falls_as_the_reward_grows() -> None:
    # By hand at s = 1, from the most to the least remaining weight: 1/√2, ½, ½, 1/e, ¼, 1/(2e − 1).
    order = ["neyman", "forward_kl", "pearson", "reverse_kl", "hellinger", "jensen_shannon"]
    weights = [FSFT(divergence=name)(gold([-1], [-2])).meters["weight"].item() for name in order]  # type: ignore[arg-type]
    assert weights == pytest.approx([0.5**0.5, 0.5, 0.5, exp(-1), 0.25, 1 / (2 * exp(1) - 1)])
