"""Q, V and the reward of every token: by hand in float64, and the telescoping sum on tiny models."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from equipoise.core.errors import NumericsError
from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.batch import pack
from equipoise.models.logps import policy_logps
from equipoise.models.values import reply_rewards, token_values

from .. import tiny


def test_two_replies_worked_by_hand():
    # Three tokens of two replies over a vocabulary of two. logsumexp(0, 0) = ln 2; logsumexp(ln 3, 0) = ln 4; (0, ln 7) = ln 8.
    ln = math.log
    logits = torch.tensor([[0.0, 0.0], [ln(3), 0.0], [0.0, ln(7)]], dtype=torch.float64)
    found = token_values(logits, torch.tensor([1, 0, 1]), torch.tensor([False, True, True]), beta=0.5)
    assert found.q.tolist() == pytest.approx([0.0, 0.5 * ln(3), 0.5 * ln(7)], abs=1e-15)
    assert found.v.tolist() == pytest.approx([0.5 * ln(2), 0.5 * ln(4), 0.5 * ln(8)], abs=1e-15)
    # The second reply's state is no successor of the first reply's end: V after an end is 0.
    assert found.reward.tolist() == pytest.approx([-0.5 * ln(4), 0.5 * ln(3), 0.5 * ln(7)], abs=1e-15)
    # β (log 1/2 + log 3/4) + β ln 2 = β ln(3/4): the first reply's rewards sum to it.
    assert found.reward[:2].sum().item() == pytest.approx(0.5 * ln(3 / 4), abs=1e-15)
    assert (found.q - found.v).tolist() == pytest.approx([0.5 * ln(1 / 2), 0.5 * ln(3 / 4), 0.5 * ln(7 / 8)], abs=1e-15)


def test_rewards_telescope_and_a_constant_per_state_only_moves_them():
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(6, 11, dtype=torch.float64, generator=generator)
    target, ends = torch.arange(6), torch.tensor([False, False, False, True, False, True])
    shifted = logits + torch.randn(6, 1, dtype=torch.float64, generator=generator)
    for some in (logits, shifted):
        found = token_values(some, target, ends, beta=0.3)
        logps = torch.log_softmax(some, -1).gather(1, target[:, None]).squeeze(1)
        for start, stop in ((0, 4), (4, 6)):
            expected = 0.3 * logps[start:stop].sum() + found.v[start]
            assert found.reward[start:stop].sum().item() == pytest.approx(expected.item(), abs=1e-12)
    assert not torch.allclose(token_values(logits, target, ends).reward, token_values(shifted, target, ends).reward, atol=0.1)


@pytest.mark.parametrize("form", ["packed", "separate", "padded"])
def test_rewards_of_a_tiny_model_telescope(form):
    register()
    model, rows = tiny.tiny().double(), tiny.pairs(3)
    batch = pack(rows, form)
    with torch.no_grad(), nullcontext() if form == "padded" else attention_of(model, NAME):
        rewards, logps = reply_rewards(model, batch, 0.1), policy_logps(model, batch, "logits")
    branches = [(row.prompt, branch.ids) for row in rows for branch in row.branches]
    for number, (prompt, ids) in enumerate(branches):
        with torch.no_grad():
            start = model(torch.tensor(prompt[None], dtype=torch.long)).logits[0, -1]
        expected = 0.1 * logps[number].sum() + 0.1 * torch.logsumexp(start, -1)
        # Rotary positions are float32 in a float64 model too.
        assert rewards[number].sum().item() == pytest.approx(expected.item(), abs=1e-7)
        assert rewards[number, len(ids) :].eq(0).all()


def test_what_does_not_fit_is_refused():
    logits = torch.zeros(2, 3)
    with pytest.raises(NumericsError, match="do not fit"):
        token_values(logits, torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool))
    with pytest.raises(NumericsError, match="must end"):
        token_values(logits, torch.zeros(2, dtype=torch.long), torch.tensor([True, False]))
