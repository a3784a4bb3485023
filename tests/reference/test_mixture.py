"""A mixture of references, by hand: what replies sum to, and what every token adds."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from equipoise.core.errors import DataError
from equipoise.data.rows import Branch, TokenRow
from equipoise.reference.key import Context
from equipoise.reference.mixture import Mixture
from equipoise.reference.store import ReferenceStore


def row(learn: list[bool] | None = None) -> TokenRow:
    marks = {"learn": np.array(learn or [True, True])}
    return TokenRow(
        "a",
        np.array([1], dtype=np.int32),
        (
            Branch("chosen", np.array([5, 6], dtype=np.int32), marks),
            Branch("rejected", np.array([7], dtype=np.int32), {"learn": np.array([True])}),
        ),
    )


def stores(root: Path, *values: list[list[float]]) -> list[ReferenceStore]:
    made = []
    for number, replies in enumerate(values):
        store = ReferenceStore(root, Context(f"weights {number}", "none", "float32", "packed/cpu"))
        store.add([row()], [[np.array(reply, dtype=np.float32) for reply in replies]])
        made.append(store)
    return made


def test_one_reference_stays_itself(tmp_path: Path) -> None:
    (store,) = stores(tmp_path, [[-1.0, -2.0], [-3.0]])
    mixed = Mixture([store], [1.0], clip=None).get(row())
    assert [values.tolist() for values in mixed] == [[-1.0, -2.0], [-3.0]]


def test_the_harmonic_mean_of_two_by_hand(tmp_path: Path) -> None:
    # 1/π̃ = ½/π₁ + ½/π₂ with π₁ = ½, ¼ and π₂ = ¼, ¼: first token 1/(½·2 + ½·4) = ⅓, both 1/(½·8 + ½·16) = 1/12.
    two = stores(tmp_path, [[math.log(1 / 2), math.log(1 / 4)], [-1.0]], [[math.log(1 / 4), math.log(1 / 4)], [-1.0]])
    chosen, rejected = Mixture(two, [0.5, 0.5], clip=None).get(row())
    assert chosen.tolist() == pytest.approx([math.log(1 / 3), math.log(1 / 4)], abs=1e-6)
    assert chosen.sum() == pytest.approx(-math.log(12), abs=1e-6)
    assert rejected.tolist() == pytest.approx([-1.0], abs=1e-6)


def test_a_token_that_is_not_learned_adds_nothing(tmp_path: Path) -> None:
    two = stores(tmp_path, [[-9.0, math.log(1 / 2)], [-1.0]], [[-1.0, math.log(1 / 4)], [-1.0]])
    chosen, _ = Mixture(two, [0.5, 0.5], clip=None).get(row([False, True]))
    assert chosen.tolist() == pytest.approx([0.0, math.log(1 / 3)], abs=1e-6)


def test_adaptive_weights_follow_how_far_a_reference_tells_the_pair_apart(tmp_path: Path) -> None:
    # |−3 + 2| = 1 and |−3 + 6| = 3: weights ¼ and ¾. 1/π̃(rejected) = ¼e² + ¾e⁶.
    two = stores(tmp_path, [[-1.0, -2.0], [-2.0]], [[-2.0, -1.0], [-6.0]])
    chosen, rejected = Mixture(two, "adaptive", clip=None).get(row())
    assert chosen.sum() == pytest.approx(-3.0, abs=1e-6)
    assert rejected.sum() == pytest.approx(-math.log(0.25 * math.exp(2) + 0.75 * math.exp(6)), abs=1e-5)


def test_references_that_tell_nothing_apart_weigh_alike(tmp_path: Path) -> None:
    two = stores(tmp_path, [[-1.0, -1.0], [-2.0]], [[-2.0, -2.0], [-4.0]])
    _, rejected = Mixture(two, "adaptive", clip=None).get(row())
    assert rejected.sum() == pytest.approx(-math.log(0.5 * math.exp(2) + 0.5 * math.exp(4)), abs=1e-5)


def test_clipping_keeps_further_references_near_the_base(tmp_path: Path) -> None:
    # Means of the two −6 and −1.5: chosen ε = 0.4 · ⅘ = 0.32, rejected 0.4 · ⅕ = 0.08. Base −3 and −2.8: −9 becomes −3.96, −0.2 −2.576.
    two = stores(tmp_path, [[-1.0, -2.0], [-2.8]], [[-4.0, -5.0], [-0.2]])
    chosen, rejected = Mixture(two, [0.0, 1.0], clip=0.4).get(row())
    assert chosen.sum() == pytest.approx(-3.96, abs=1e-5)
    assert rejected.sum() == pytest.approx(-2.576, abs=1e-5)


def test_a_reference_of_weight_zero_does_not_count_however_far_it_is(tmp_path: Path) -> None:
    two = stores(tmp_path, [[-100.0, -200.0], [-1.0]], [[-500.0, -600.0], [-1.0]])
    chosen, _ = Mixture(two, [1.0, 0.0], clip=None).get(row())
    assert chosen.tolist() == [-100.0, -200.0]


def test_no_pair_to_compare_raises(tmp_path: Path) -> None:
    (store,) = stores(tmp_path, [[-1.0, -2.0], [-3.0]])
    alone = TokenRow("b", row().prompt, row().branches[:1])
    with pytest.raises(DataError, match="chosen and a rejected"):
        Mixture([store]).get(alone)
