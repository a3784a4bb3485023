"""The contract suite: what every objective of the catalogue must do, written once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from equipoise.core.errors import DataError, NumericsError
from equipoise.objectives._base import STATS, Needs, Objective, Scored
from equipoise.objectives._load import load_class, methods

from .views import random_view, values_of

STOPS_GRADIENT = {"BCO", "BMC", "DFT", "KTO", "TDPO2", "WPO"}
"""Objectives whose formula takes something without gradient: finite differences hold it fixed. No other one may detach."""


@pytest.fixture(params=methods())
def objective(request: pytest.FixtureRequest) -> Objective:
    return load_class(request.param)()


def with_values(view: Scored, values: torch.Tensor) -> Scored:
    return replace(view, policy=values) if view.policy is not None else replace(view, score=values)


class Held:
    """An objective in which everything it detaches stays as it was in the first call: what its gradient is the gradient of."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.values: list[torch.Tensor] = []

    def __call__(self, view: Scored) -> Any:
        first, held, plain = not self.values, iter(tuple(self.values)), torch.Tensor.detach

        def detach(tensor: torch.Tensor) -> torch.Tensor:
            if first:
                self.values.append(plain(tensor).clone())
                return plain(tensor)
            return next(held)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "detach", detach)
            return self.objective(view)


def test_says_where_it_comes_from(objective: Objective) -> None:
    assert len(objective.paper) > 10
    assert objective.departures
    assert type(objective).__doc__


def test_one_finite_loss_per_unit(objective: Objective) -> None:
    view = random_view(objective.needs)
    losses = objective(view)
    assert losses.sum.shape == (view.units,)
    assert torch.isfinite(losses.sum).all()


def test_statistics_are_known_and_a_divergence_has_a_live_reference(objective: Objective) -> None:
    assert objective.needs.stats <= STATS.keys()
    assert "kl_ref" not in objective.needs.stats or objective.needs.reference == "live"


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
    # A KL is never negative, a log of probabilities never positive.
    stats = {name: torch.copysign(torch.full_like(stat, size), stat).requires_grad_() for name, stat in view.stats.items()}
    losses = objective(replace(with_values(view, values), stats=stats))
    assert torch.isfinite(losses.sum).all()
    losses.sum.sum().backward()
    assert values.grad is not None
    for gradient in (values.grad, *(stat.grad for stat in stats.values() if stat.grad is not None)):
        assert torch.isfinite(gradient).all()


def test_gradcheck(objective: Objective) -> None:
    """Of log-probs (or scores) and of every statistic of the policy; what the formula detaches is held fixed."""
    view = random_view(objective.needs, units=3)
    called = Held(objective) if type(objective).__name__ in STOPS_GRADIENT else objective

    def total(values: torch.Tensor, *stats: torch.Tensor) -> torch.Tensor:
        return called(replace(with_values(view, values), stats=dict(zip(view.stats, stats, strict=True)))).sum

    inputs = [values.clone().requires_grad_() for values in (values_of(view), *view.stats.values())]
    assert torch.autograd.gradcheck(total, inputs)


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
    """Coupled ones are split by the engine's two passes (tests/training/test_step.py): here a split must change them, or
    the first pass is for nothing."""
    view = random_view(objective.needs)
    whole = objective(view).sum
    first = view._take(torch.nonzero(view.unit < 2).flatten())
    rest = view._take(torch.nonzero(view.unit >= 2).flatten())
    parts = torch.cat([objective(first).sum, objective(replace(rest, unit=rest.unit - 2)).sum])
    if objective.needs.coupled:
        assert not torch.allclose(parts, whole)
    else:
        torch.testing.assert_close(parts, whole)


def test_masked_tokens_change_nothing(objective: Objective) -> None:
    view = random_view(objective.needs)
    if view.policy is None:
        return
    noise = torch.where(view.mask, 0.0, torch.tensor(-123.4, dtype=torch.float64))
    noisy = replace(
        view,
        policy=view.policy + noise,
        reference=None if view.reference is None else view.reference - noise,
        stats={name: torch.where(view.mask, value, torch.nan) for name, value in view.stats.items()},
    )
    torch.testing.assert_close(objective(noisy).sum, objective(view).sum)


def test_wrong_shapes_raise(objective: Objective) -> None:
    view = random_view(objective.needs)
    with pytest.raises(NumericsError, match="shape"):
        replace(view, mask=view.mask[:, :-1], score=None, policy=torch.zeros(len(view.mask), view.mask.shape[1], dtype=torch.float64))
    with pytest.raises(NumericsError, match="shape"):
        replace(view, unit=view.unit[:-1])
    for name, value in view.stats.items():
        with pytest.raises(NumericsError, match=f"{name} has shape"):
            replace(view, stats={**view.stats, name: value[:, :-1]})


def test_a_missing_statistic_raises(objective: Objective) -> None:
    view = random_view(objective.needs)
    for name in view.stats:
        with pytest.raises(NumericsError, match=name):
            objective(replace(view, stats={other: value for other, value in view.stats.items() if other != name}))


def test_a_missing_side_raises(objective: Objective) -> None:
    view = random_view(objective.needs)
    keep = torch.arange(len(view.mask)) < len(view.mask) - 1
    if objective.needs.many:
        alone = torch.nonzero(view.unit == 0).flatten()[1:]
        keep = ~torch.isin(torch.arange(len(view.mask)), alone)
    with pytest.raises(DataError, match=r"exactly one|at least two"):
        objective(view._take(torch.nonzero(keep).flatten()))


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


def test_a_misspelt_side_names_the_nearest_role() -> None:
    view = random_view(Needs(roles=("chosen", "rejected")))
    with pytest.raises(DataError, match=r"role 'choosen'\. Did you mean 'chosen'"):
        view.side("choosen")
