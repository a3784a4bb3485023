"""The update does not depend on how the batch was cut: gradients of a step, to 1e-6 relative."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from equipoise.core.errors import NumericsError
from equipoise.data.plan import Planner
from equipoise.data.rows import TokenRow
from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.batch import Form, pack
from equipoise.models.logps import head_of
from equipoise.objectives._base import Losses, Objective, Scored
from equipoise.objectives._load import build, from_callable, load_class, methods
from equipoise.reference.build import build as build_store
from equipoise.reference.key import Context
from equipoise.reference.live import LiveReference
from equipoise.reference.store import ReferenceStore
from equipoise.training import _step as step_module
from equipoise.training._step import StepRunner
from equipoise.training._streams import Forward, Stream
from equipoise.training.meters import Meters
from tests.tiny import pairs, row, tiny

register()
CPU = torch.device("cpu")
STATISTICS = ["wpo", "tdpo1", "tdpo2"]
COUPLED = [name for name in methods() if load_class(name).needs.coupled]


def labelled(*roles: str, count: int = 8) -> list[TokenRow]:
    generator = np.random.default_rng(1)
    return [
        row(f"k{number}", int(generator.integers(1, 20)), {role: int(generator.integers(1, 9)) for role in roles}, label=number % 2)
        for number in range(count)
    ]


def store_for(rows: list[TokenRow], folder: Path) -> ReferenceStore:
    """References under another random model, so that no log-ratio is zero."""
    reference = tiny(seed=7)
    store = ReferenceStore(folder, Context("seed 7", "none", "float32", "packed/cpu"))
    with attention_of(reference, NAME):
        build_store(reference, rows, store, "packed", 64, CPU)
    return store


def step_gradient(streams: list[Stream], budget: int, form: Form = "packed", model: Any = None) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one step over all rows, cut by the budget."""
    model = model or tiny(seed=3)
    planner = Planner(
        tuple(stream.lengths for stream in streams),
        len(streams[0].rows),
        budget,
        shuffle=False,
        shared=form == "packed",
        padded=form == "padded",
    )
    live = LiveReference(tiny(seed=7))
    if form != "padded":
        live.model.set_attn_implementation(NAME)
    runner = StepRunner(
        streams, Forward(form, CPU, live=live), Meters(), backward=lambda loss: loss.backward(), sync=lambda last: nullcontext()
    )
    with nullcontext() if form == "padded" else attention_of(model, NAME):
        loss = runner.run(model, planner.step(0))
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    return float(loss), gradient


@pytest.mark.parametrize("name", ["dpo", "sft", *STATISTICS, *COUPLED])
def test_any_cut_gives_the_same_step(name: str, tmp_path: Path) -> None:
    objective = build({"name": name})
    roles = objective.needs.roles
    if "sample" in roles:
        rows = labelled(*roles)
    else:
        rows = pairs() if "chosen" in roles else [row(f"s{n}", 3 + n, {"gold": 1 + 3 * n}) for n in range(8)]
    stream = Stream("main", rows, objective)
    if objective.needs.reference == "stored":
        stream.store = store_for(rows, tmp_path)
    whole_loss, whole = step_gradient([stream], 10_000)
    assert whole.norm() > 1e-3
    for budget in (1, 40, 90):
        for form in ("packed", "separate", "padded"):
            loss, gradient = step_gradient([stream], budget, form)
            assert loss == pytest.approx(whole_loss, rel=1e-6)
            assert (gradient - whole).norm() / whole.norm() < 2e-6, (budget, form)


def test_a_step_equals_the_formula_written_out(tmp_path: Path) -> None:
    """DPO over all rows by plain forwards and autograd, nothing of the engine in it."""
    rows = pairs()
    stream = Stream("main", rows, build({"name": "dpo", "beta": 0.3}), store=store_for(rows, tmp_path))
    loss, gradient = step_gradient([stream], 60)

    def summed(model: Any, prompt: np.ndarray, reply: np.ndarray) -> torch.Tensor:
        ids = torch.tensor(np.concatenate([prompt, reply]))[None].long()
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()

    policy, reference = tiny(seed=3), tiny(seed=7)
    losses = []
    for item in rows:
        ratios = []
        for branch in item.branches:
            with torch.no_grad():
                fixed = summed(reference, item.prompt, branch.ids)
            ratios.append(summed(policy, item.prompt, branch.ids) - fixed)
        losses.append(-torch.nn.functional.logsigmoid(0.3 * (ratios[0] - ratios[1])))
    expected = torch.stack(losses).mean()
    expected.backward()
    wanted = torch.cat([parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert (gradient - wanted).norm() / wanted.norm() < 1e-5


def test_a_step_of_tdpo2_equals_the_formula_written_out() -> None:
    """Divergences of whole distributions by plain forwards and autograd, nothing of the engine in it."""
    rows = pairs()
    loss, gradient = step_gradient([Stream("main", rows, build({"name": "tdpo2", "beta": 0.3, "alpha": 0.7}))], 60)

    def read(model: Any, prompt: np.ndarray, reply: np.ndarray) -> torch.Tensor:
        """[T, V] log-probs along the reply."""
        ids = torch.tensor(np.concatenate([prompt, reply]))[None].long()
        return model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)

    policy, reference = tiny(seed=3), tiny(seed=7)
    losses = []
    for item in rows:
        ratios, divergences = [], []
        for branch in item.branches:
            with torch.no_grad():
                theirs = read(reference, item.prompt, branch.ids)
            ours, ids = read(policy, item.prompt, branch.ids), torch.tensor(branch.ids).long()[:, None]
            ratios.append((ours - theirs).gather(1, ids).sum())
            divergences.append((theirs.exp() * (theirs - ours)).sum())
        margin = ratios[0] - ratios[1] - 0.7 * (divergences[1] - divergences[0].detach())
        losses.append(-torch.nn.functional.logsigmoid(0.3 * margin))
    expected = torch.stack(losses).mean()
    expected.backward()
    wanted = torch.cat([parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert (gradient - wanted).norm() / wanted.norm() < 1e-5


def test_streams_are_weighted_sums_of_their_means(tmp_path: Path) -> None:
    safety, buffer = pairs(6, seed=1), pairs(10, seed=2)
    store_one, store_two = store_for(safety, tmp_path / "one"), store_for(buffer, tmp_path / "two")
    objective = build({"name": "dpo"})
    first = Stream("safety", safety, objective, 1.0, store_one)
    # With six units a step, six of the buffer's ten rows are taken.
    second = Stream("buffer", buffer[:6], objective, 0.5, store_two)
    loss, gradient = step_gradient([first, second], 70)
    loss_one, gradient_one = step_gradient([first], 70)
    loss_two, gradient_two = step_gradient([Stream("buffer", buffer[:6], objective, 1.0, store_two)], 70)
    assert loss == pytest.approx(loss_one + 0.5 * loss_two, rel=1e-6)
    wanted = gradient_one + 0.5 * gradient_two
    assert (gradient - wanted).norm() / wanted.norm() < 2e-6


def test_a_loss_that_is_not_finite_names_its_rows(tmp_path: Path) -> None:
    def broken(scored: Scored) -> torch.Tensor:
        values = scored.side("chosen").logratios()
        return torch.where(torch.arange(len(values)) == 1, torch.nan, values)

    rows = pairs(3)
    stream = Stream("main", rows, from_callable(broken), store=store_for(rows, tmp_path))
    with pytest.raises(NumericsError, match="not finite for rows row-"):
        step_gradient([stream], 10_000)


def test_a_users_function_is_an_objective(tmp_path: Path) -> None:
    """IPO's square link written by a user; sharing the engine, its gradient equals autograd's on the same view."""

    def squared(scored: Scored) -> Losses:
        margin = scored.side("chosen").logratios() - scored.side("rejected").logratios()
        return Losses((margin - 5.0) ** 2, {"margin": margin.detach()})

    rows = pairs(4)
    objective = from_callable(squared)
    assert isinstance(objective, Objective)
    stream = Stream("main", rows, objective, store=store_for(rows, tmp_path))
    assert step_gradient([stream], 30)[0] == pytest.approx(step_gradient([stream], 10_000)[0], rel=1e-5)


def test_idle_micro_batches_change_nothing(tmp_path: Path) -> None:
    """A rank without work runs a filler whose loss counts nothing; a two-rank step sums to the one-rank step."""
    rows = pairs(5)
    stream = Stream("main", rows, build({"name": "dpo"}), store=store_for(rows, tmp_path))
    _, whole = step_gradient([stream], 40)
    planner = Planner((stream.lengths,), 5, 40, shuffle=False, world_size=2)
    step = planner.step(0)
    assert len(step.ranks[0]) == len(step.ranks[1])
    gradients = []
    for rank in range(2):
        model = tiny(seed=3)
        runner = StepRunner([stream], Forward("packed", CPU), Meters(), lambda loss: loss.backward(), lambda last: nullcontext(), rank, 2)
        with attention_of(model, NAME):
            runner.run(model, step)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]))
    # DDP averages over ranks.
    mean = (gradients[0] + gradients[1]) / 2
    assert (mean - whole).norm() / whole.norm() < 2e-6


# ---- rounding to 16 bits


class Roundings(TorchDispatchMode):
    """How often autocast rounded weights of a model, by name. The head is not autocast's: it rounds its weight itself."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.names = {parameter.data_ptr(): name for name, parameter in model.named_parameters() if parameter.ndim == 2}
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.counts[self.names.get(args[0].data_ptr(), "")] += 1
        return result

    def of_weights(self) -> set[int]:
        """How often each of the layers' fourteen weights was rounded, all of them the same number of times."""
        counts = [count for name, count in self.counts.items() if "layers" in name]
        assert len(counts) == 14
        return set(counts)


def in_bfloat16(model: Any, stream: Stream) -> tuple[torch.Tensor, set[int], int]:
    """Gradient of one step under autocast, how often weights were rounded, and its micro-batches."""
    planner = Planner((stream.lengths,), len(stream.rows), 40, shuffle=False)
    forward = Forward("packed", CPU, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    runner = StepRunner([stream], forward, Meters(), backward=lambda loss: loss.backward(), sync=lambda last: nullcontext())
    step = planner.step(0)
    with attention_of(model, NAME):
        head_of(model, pack(stream.rows[:1]))  # once a model, it tries its own head
        with Roundings(model) as roundings:
            runner.run(model, step)
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    model.zero_grad()
    return gradient, roundings.of_weights(), len(step.ranks[0])


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_step_rounds_each_weight_once_and_the_gradient_is_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KTO's first pass is without gradient: what it rounded must not be what the second learns through."""
    objective = build({"name": name})
    rows = labelled(*objective.needs.roles) if name == "kto" else pairs()
    stream = Stream("main", rows, objective, store=store_for(rows, tmp_path))
    model = tiny(seed=3)
    found, counts, micro_batches = in_bfloat16(model, stream)
    assert micro_batches > 2
    assert counts == {1}
    with monkeypatch.context() as patched:
        patched.setattr(step_module, "rounded_once", lambda *_: nullcontext())
        expected, every_time, _ = in_bfloat16(model, stream)
    assert every_time == {micro_batches * (1 + objective.needs.coupled)}
    assert torch.equal(found, expected)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    moved, _, _ = in_bfloat16(model, stream)
    fresh = tiny(seed=3)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(moved, in_bfloat16(fresh, stream)[0])
    assert not torch.equal(moved, found)


def test_a_reference_pass_rounds_each_weight_once(tmp_path: Path) -> None:
    model, rows = tiny(seed=3), pairs()
    store = ReferenceStore(tmp_path, Context("seed 3", "none", "bfloat16", "packed/cpu"))
    with attention_of(model, NAME):
        head_of(model, pack(rows[:1]))
        with Roundings(model) as roundings:
            build_store(model, rows, store, "packed", 40, CPU, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert roundings.of_weights() == {1}
