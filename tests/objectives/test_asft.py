from __future__ import annotations

import math

import pytest
import torch

from equipoise.core.records import REPLY_ROLES
from equipoise.objectives._base import Scored
from equipoise.objectives.asft import AlignedSFT


def pairs(chosen: list[float], rejected: list[float], tokens: int = 2) -> Scored:
    """One pair a position; every one of a reply's tokens has the given probability, so that is its geometric mean too."""
    units = len(chosen)
    role = torch.tensor([REPLY_ROLES.index("chosen")] * units + [REPLY_ROLES.index("rejected")] * units)
    policy = torch.log(torch.tensor([*chosen, *rejected], dtype=torch.float64))[:, None].repeat(1, tokens)
    return Scored(policy, None, torch.ones(2 * units, tokens, dtype=torch.bool), torch.arange(units).repeat(2), role)


def gradients(objective: AlignedSFT, chosen: float, rejected: float) -> tuple[float, float]:
    """∂L/∂ℓ of both sides, ℓ the mean log-probability: the sum of the tokens' gradients."""
    view = pairs([chosen], [rejected])
    assert view.policy is not None
    view.policy.requires_grad_()
    objective(view).sum.sum().backward()
    assert view.policy.grad is not None
    first, second = view.policy.grad.sum(1).tolist()
    return first, second


def test_by_hand() -> None:
    # p_w = ½, p_l = ¼: −2 log ½ − log ¾ = 2 log 2 + log 4/3 = log(16/3).
    losses = AlignedSFT()(pairs([0.5], [0.25]))
    assert losses.sum.item() == pytest.approx(math.log(16 / 3), abs=1e-12)
    # Odds are 1 and 1/3.
    assert losses.meters["rewards/chosen"].item() == pytest.approx(0.0, abs=1e-12)
    assert losses.meters["rewards/margins"].item() == pytest.approx(math.log(3))
    assert losses.meters["rewards/accuracies"].item() == 1.0
    assert losses.meters["nll"].item() == pytest.approx(math.log(2))
    assert losses.meters["logps/rejected"].item() == pytest.approx(-4 * math.log(2))


def test_temperature_and_weights_by_hand() -> None:
    # Odds squared by β = 2: chosen ½ has 1, rejected ¼ has 1/9: −log ½ − log(1 − 1/10) = log(20/9); half of it, no SFT term.
    losses = AlignedSFT(beta=2, align_weight=0.5, sft_weight=0)(pairs([0.5], [0.25]))
    assert losses.sum.item() == pytest.approx(0.5 * math.log(20 / 9), abs=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.3, 2.0])
def test_equals_two_binary_cross_entropies(weight: float) -> None:
    p = torch.rand(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.98 + 0.01
    expected = -(1 + weight) * torch.log(p[0]) - weight * torch.log(1 - p[1])
    torch.testing.assert_close(AlignedSFT(align_weight=weight)(pairs(p[0].tolist(), p[1].tolist())).sum, expected)


def test_gradients() -> None:
    # −(1 + λ) and λ p_l/(1 − p_l) = 0.5 · (0.2/0.8).
    assert gradients(AlignedSFT(align_weight=0.5), 0.6, 0.2) == pytest.approx((-1.5, 0.125))
    # β = 2, no SFT term: σ(β o_w) = 0.36/(0.36 + 0.16) = 9/13, so −2 · (4/13)/0.4 = −20/13;
    # σ(β o_l) = 0.04/(0.04 + 0.64) = 1/17, so 2 · (1/17)/0.8 = 5/34.
    assert gradients(AlignedSFT(beta=2, sft_weight=0), 0.6, 0.2) == pytest.approx((-20 / 13, 5 / 34))


def test_chosen_rises_at_least_as_fast_as_rejected_falls() -> None:
    # In probabilities, |∂L/∂p_w| / |∂L/∂p_l| = ((1+λ)/λ)(1 − p_l)/p_w; of the align term alone (1 − p_l)/p_w ≥ 1 where p_w + p_l ≤ 1.
    for chosen, rejected in [(0.1, 0.2), (0.5, 0.5), (0.7, 0.05), (0.01, 0.9)]:
        up, down = gradients(AlignedSFT(align_weight=2), chosen, rejected)
        assert (-up / chosen) / (down / rejected) == pytest.approx(1.5 * (1 - rejected) / chosen)
        up, down = gradients(AlignedSFT(sft_weight=0), chosen, rejected)
        assert (-up / chosen) / (down / rejected) >= 1 - 1e-9


def test_odds_ratio_preference_optimization_is_never_larger() -> None:
    p = torch.rand(2, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.998 + 0.001
    weight = 0.7
    ours = AlignedSFT(align_weight=weight)(pairs(p[0].tolist(), p[1].tolist())).sum
    # ORPO: −log p_w − λ log σ(log of the odds ratio), and σ(log r) = r/(1 + r).
    ratio = p[0] / (1 - p[0]) / (p[1] / (1 - p[1]))
    orpo = -torch.log(p[0]) - weight * torch.log(ratio / (1 + ratio))
    assert (orpo <= ours).all()
    gap = weight * torch.log(p[0] * (1 - p[1]) + p[1] * (1 - p[0]))
    torch.testing.assert_close(orpo - ours, gap)


def test_length_is_divided_out_unless_asked() -> None:
    short, long = pairs([0.5], [0.25], tokens=1), pairs([0.5], [0.25], tokens=4)
    torch.testing.assert_close(AlignedSFT()(short).sum, AlignedSFT()(long).sum)
    # Sums: p_w = 1/16 and p_l = 1/256.
    summed = AlignedSFT(length_normalize=False)(long).sum.item()
    assert summed == pytest.approx(2 * math.log(16) + math.log(256 / 255), abs=1e-12)
