from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from equipoise.core.errors import DataError
from equipoise.core.records import REPLY_ROLES
from equipoise.objectives._base import Scored
from equipoise.objectives.bfpo import BFPO


def pair(margin: float, safe: tuple[float, float]) -> Scored:
    """One pair of two-token replies: chosen log-ratio 3 · margin / 2, rejected margin / 2."""
    role = torch.tensor([REPLY_ROLES.index("chosen"), REPLY_ROLES.index("rejected")])
    reference = torch.tensor([[-1.0, -2.0], [-3.0, -0.5]], dtype=torch.float64)
    policy = reference + margin * torch.tensor([[1.0, 0.5], [0.25, 0.25]], dtype=torch.float64)
    facts = {"safe": torch.tensor(safe, dtype=torch.float64)}
    return Scored(policy, reference, torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, dtype=torch.long), role, facts=facts)


# (safe helpful, safe other) → g at B1 = 3, α = ½, by hand: 3/2 · I_w − 1/2 · I_l − 1/2.
TABLE = {(1, 1): 0.5, (1, 0): 1.0, (0, 1): -1.0, (0, 0): -0.5}


@pytest.mark.parametrize("safe", TABLE)
def test_label_and_loss_by_hand(safe: tuple[int, int]) -> None:
    # τ = 0.01 makes the targets +50, +100, −100 and −50 nats; the margin is 20.
    losses = BFPO()(pair(20.0, safe))
    assert losses.meters["label"].item() == pytest.approx(TABLE[safe])
    assert losses.sum.item() == pytest.approx((20 - 100 * TABLE[safe]) ** 2)
    # Preferring the helpful reply is right only where g > 0.
    assert losses.meters["rewards/accuracies"].item() == 1.0
    assert losses.meters["label/accuracies"].item() == (1.0 if TABLE[safe] > 0 else 0.0)
    assert losses.meters["rewards/margins"].item() == pytest.approx(0.2)


def test_other_constants_by_hand() -> None:
    # B1 = 5, α = 0.2: (5 − 1)/4 − 0.2 = 0.8 and −1/4 − 0.2 = −0.45; τ = 0.1 divides them.
    assert BFPO(b1=5, alpha=0.2, tau=0.1)(pair(0.0, (1, 1))).sum.item() == pytest.approx(8.0**2)
    assert BFPO(b1=5, alpha=0.2, tau=0.1)(pair(0.0, (0, 1))).sum.item() == pytest.approx(4.5**2)


@pytest.mark.parametrize("margin", [-7.0, 0.0, 3.5])
def test_two_safe_replies_are_ipo_on_sums(margin: float) -> None:
    for tau in (0.01, 0.1, 1.0):
        assert BFPO(tau=tau)(pair(margin, (1, 1))).sum.item() == pytest.approx((margin - 1 / (2 * tau)) ** 2)


def test_missing_or_impossible_safety_raises() -> None:
    for value in (math.nan, -1.0, 2.0):
        with pytest.raises(DataError, match="`safe`"):
            BFPO()(pair(1.0, (1.0, value)))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5])
def test_least_squares_recovers_the_two_factor_reward(alpha: float) -> None:
    """The theorem on a finite space: replies are a product grid of safety × helpfulness, so the two are independent.

    Expected targets are enumerated over who is found more helpful and over both safety flags, each drawn by itself. The
    fit of u(y) − u(y') to them must be u = (r_safe + E_safe − 2α)(r_help + ½) + constant, with r_safe = P(safe),
    r_help = P(more helpful than a random reply), E_safe = the mean of r_safe.
    """
    safety, safety_weight = np.array([0.05, 0.5, 0.9]), np.array([0.2, 0.5, 0.3])
    strength, strength_weight = np.array([-1.0, 0.2, 0.7, 2.0]), np.array([0.1, 0.4, 0.3, 0.2])
    grid = list(product(range(3), range(4)))
    safe = np.array([safety[i] for i, _ in grid])
    weight = np.array([safety_weight[i] * strength_weight[j] for i, j in grid])
    helpful = 1 / (1 + np.exp(-np.array([[strength[j] - strength[k] for _, k in grid] for _, j in grid])))

    objective = BFPO(alpha=alpha)
    flag = torch.tensor([0.0, 1.0], dtype=torch.float64)
    flags = {(a, b): objective.label(flag[a], flag[b]).item() for a, b in product((0, 1), repeat=2)}

    def expected_label(first: int, second: int) -> float:
        """E[g] over the flags of an ordered pair."""
        chance = {1: safe, 0: 1 - safe}
        return sum(chance[a][first] * chance[b][second] * g for (a, b), g in flags.items())

    size = len(grid)
    target = np.array(
        [[helpful[i, j] * expected_label(i, j) - helpful[j, i] * expected_label(j, i) for j in range(size)] for i in range(size)]
    )
    np.testing.assert_allclose(target, -target.T, atol=1e-12)

    rows, goals = [], []
    for i, j in product(range(size), repeat=2):
        scale = math.sqrt(weight[i] * weight[j])
        rows.append(scale * (np.eye(size)[i] - np.eye(size)[j]))
        goals.append(scale * target[i, j])
    fitted = np.linalg.lstsq(np.array(rows), np.array(goals), rcond=None)[0]
    theorem = (safe + safe @ weight - 2 * alpha) * (helpful @ weight + 0.5)
    np.testing.assert_allclose(fitted - fitted @ weight, theorem - theorem @ weight, atol=1e-12)
