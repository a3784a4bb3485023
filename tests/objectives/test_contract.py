"""The contract suite: what every objective of the catalogue must do, written once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from equipoise.core.errors import DataError, NumericsError
from equipoise.objectives._base import Objective, Scored
from equipoise.objectives._load import load_class, methods

from .views import random_view, values_of


@pytest.fixture(params=methods())
def objective(request: pytest.FixtureRequest) -> Objective:
    return load_class(request.param)()


def with_values(view: Scored, values: torch.Tensor) -> Scored:
    return replace(view, policy=values) if view.policy is not None else replace(view, score=values)


def test_says_where_it_comes_from(objective: Objective) -> None:
    assert len(objective.paper) > 10
    assert objective.departures
    assert type(objective).__doc__


def test_one_finite_loss_per_unit(objective: Objective) -> None:
    view = random_view(objective.needs)
    losses = objective(view)
    assert losses.sum.shape == (view.units,)
    assert torch.isfinite(losses.sum).all()


def test_policy_equal_to_reference_is_finite(objective: Objective) -> None:
    view = random_view(objective.needs)
    if view.policy is None or view.reference is None:
        assert objective.needs.reference == "none"
        return
    assert torch.isfinite(objective(replace(view, reference=view.policy.clone())).sum).all()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extremes_stay_finite_with_finite_gradient(objective: Objective, size: float) -> None:
    view = random_view(objective.needs, dtype=torch.float32)
    values = torch.full_like(values_of(view), size)
    values[::2] *= -1
    if view.policy is not None:
        values = values * view.mask
    values.requires_grad_()
    losses = objective(with_values(view, values))
    assert torch.isfinite(losses.sum).all()
    losses.sum.sum().backward()
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()


def test_gradcheck(objective: Objective) -> None:
    view = random_view(objective.needs, units=3)
    detached = torch.zeros(len(view.mask), dtype=torch.bool)
    if objective.needs.coupled:
        # What a coupled objective takes without gradient (KTO's mismatched replies) is held fixed by the check as well.
        from equipoise.core.records import REPLY_ROLES

        detached = view.role == REPLY_ROLES.index("mismatched")
    start = values_of(view).clone()
    free = ~detached[:, None] if start.ndim == 2 else ~detached

    def total(values: torch.Tensor) -> torch.Tensor:
        return objective(with_values(view, torch.where(free, values, start))).sum

    assert torch.autograd.gradcheck(total, start.clone().requires_grad_())


def test_permuting_branches_permutes_nothing_but_order(objective: Objective) -> None:
    view = random_view(objective.needs)
    order = torch.randperm(len(view.mask), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(objective(view._take(order)).sum, objective(view).sum)


def test_permuting_units_permutes_losses(objective: Objective) -> None:
    view = random_view(objective.needs)
    renumber = torch.randperm(view.units, generator=torch.Generator().manual_seed(2))
    losses = objective(view).sum
    torch.testing.assert_close(objective(replace(view, unit=renumber[view.unit])).sum[renumber], losses)


def test_any_split_gives_the_same_sum(objective: Objective) -> None:
    view = random_view(objective.needs)
    if objective.needs.coupled:
        pytest.skip("coupled objectives are split by the engine's two passes: tests/training/test_step.py")
    whole = objective(view).sum
    first = view._take(torch.nonzero(view.unit < 2).flatten())
    rest = view._take(torch.nonzero(view.unit >= 2).flatten())
    parts = torch.cat([objective(first).sum, objective(replace(rest, unit=rest.unit - 2)).sum])
    torch.testing.assert_close(parts, whole)


def test_masked_tokens_change_nothing(objective: Objective) -> None:
    view = random_view(objective.needs)
    if view.policy is None:
        return
    noise = torch.where(view.mask, 0.0, torch.tensor(-123.4, dtype=torch.float64))
    noisy = replace(view, policy=view.policy + noise, reference=None if view.reference is None else view.reference - noise)
    torch.testing.assert_close(objective(noisy).sum, objective(view).sum)


def test_wrong_shapes_raise(objective: Objective) -> None:
    view = random_view(objective.needs)
    with pytest.raises(NumericsError, match="shape"):
        replace(view, mask=view.mask[:, :-1], score=None, policy=torch.zeros(len(view.mask), view.mask.shape[1], dtype=torch.float64))
    with pytest.raises(NumericsError, match="shape"):
        replace(view, unit=view.unit[:-1])


def test_a_missing_side_raises(objective: Objective) -> None:
    view = random_view(objective.needs)
    with pytest.raises(DataError, match="exactly one"):
        objective(view._take(torch.arange(len(view.mask) - 1)))


def test_meters_are_detached(objective: Objective) -> None:
    view = random_view(objective.needs)
    values = values_of(view).clone().requires_grad_()
    losses = objective(with_values(view, values))
    assert losses.meters
    for name, value in losses.meters.items():
        assert not value.requires_grad, name
        assert value.shape == (view.units,), name


def test_values_out_of_range_raise(objective: Objective) -> None:
    kind = type(objective)
    for name, field in kind.model_fields.items():
        bounds = [item for item in field.metadata if hasattr(item, "gt") or hasattr(item, "ge")]
        for bound in bounds:
            least = getattr(bound, "gt", None)
            wrong = least if least is not None else bound.ge - 1
            with pytest.raises(ValidationError):
                kind(**{name: wrong})
    with pytest.raises(ValidationError):
        kind(no_such_setting=1)
