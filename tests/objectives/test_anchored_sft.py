from __future__ import annotations

from math import log

import numpy as np
import pytest
import torch

from equipoise.core.records import REPLY_ROLES
from equipoise.objectives._base import Scored
from equipoise.objectives.anchored_sft import AnchoredSFT


def gold(policy: list[float], reference: list[float]) -> Scored:
    """One demonstration whose tokens have these probabilities."""
    tensors = [torch.tensor([value], dtype=torch.float64).log() for value in (policy, reference)]
    role = torch.tensor([REPLY_ROLES.index("gold")])
    return Scored(tensors[0], tensors[1], torch.ones(1, len(policy), dtype=torch.bool), torch.zeros(1, dtype=torch.long), role)


def gradient(objective: AnchoredSFT, view: Scored) -> list[float]:
    assert view.policy is not None
    view.policy.requires_grad_()
    objective(view).sum.sum().backward()
    assert view.policy.grad is not None
    slopes: list[float] = view.policy.grad[0].tolist()
    return slopes


def test_by_hand() -> None:
    # p = ½ against q = ¼: 1 − p = ½, k = ¼ log ½ + ¾ log 3/2. p = q = 0.2: 0.8 and 0.
    divergence = 0.75 * log(1.5) - 0.25 * log(2)
    losses = AnchoredSFT(alpha=2)(gold([0.5, 0.2], [0.25, 0.2]))
    assert losses.sum.item() == pytest.approx(1.3 + 2 * divergence)
    assert losses.meters["kl"].item() == pytest.approx(divergence / 2)
    assert losses.meters["weight"].item() == pytest.approx(0.35)
    assert losses.meters["nll"].item() == pytest.approx(log(10) / 2)


def test_gradient_by_hand() -> None:
    # −p of the weighted cross-entropy, and α (−q + (1 − q) p/(1 − p)) = 2 (−¼ + ¾); nothing pulls where p = q.
    assert gradient(AnchoredSFT(alpha=2), gold([0.5, 0.2], [0.25, 0.2])) == pytest.approx([-0.5 + 1.0, -0.2])


def test_without_the_anchor_the_gradient_is_that_of_weighted_cross_entropy() -> None:
    logps = torch.tensor([[0.9, 0.01, 0.3]], dtype=torch.float64).log().requires_grad_()
    (-logps.exp().detach() * logps).sum().backward()
    assert logps.grad is not None
    assert gradient(AnchoredSFT(alpha=0), gold([0.9, 0.01, 0.3], [0.1, 0.2, 0.3])) == pytest.approx(logps.grad[0].tolist())


def test_anchor_is_a_lower_bound_of_the_divergence_over_the_vocabulary() -> None:
    rng = np.random.default_rng(0)
    reference, policy = rng.dirichlet(np.ones(5), size=40), rng.dirichlet(np.ones(5), size=40)
    full = (reference * np.log(reference / policy)).sum(1)
    bound = [AnchoredSFT()(gold([p], [q])).meters["kl"].item() for p, q in zip(policy[:, 0], reference[:, 0], strict=True)]
    assert (np.array(bound) >= 0).all()
    assert (np.array(bound) <= full + 1e-12).all()
    # The other tokens in the reference's proportions: equal.
    others = reference[:, 1:] * ((1 - policy[:, :1]) / (1 - reference[:, :1]))
    proportional = np.concatenate([policy[:, :1], others], axis=1)
    np.testing.assert_allclose(bound, (reference * np.log(reference / proportional)).sum(1), atol=1e-12)


def test_counts_learned_tokens() -> None:
    assert AnchoredSFT().count({"gold": np.array([True, False, True])}, {}) == 2.0


@pytest.mark.parametrize(("policy", "reference"), [(0.0, -30.0), (-200.0, 0.0), (0.0, 0.0), (-1e4, -1e4)])
def test_certain_and_impossible_tokens_stay_finite(policy: float, reference: float) -> None:
    role = torch.tensor([REPLY_ROLES.index("gold")])
    values = torch.tensor([[policy]], requires_grad=True)
    view = Scored(values, torch.tensor([[reference]]), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, dtype=torch.long), role)
    loss = AnchoredSFT()(view).sum
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()
