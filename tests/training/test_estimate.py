"""Memory and time before anything is trained: parts by hand, activations against what a real run keeps, and what is picked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.core.errors import UsageError
from equipoise.models.attention import NAME, register
from equipoise.models.batch import pack
from equipoise.models.layers import lean_layers
from equipoise.models.logps import policy_logps
from equipoise.training._model import no_dropout
from equipoise.training._simulate import Simulation
from equipoise.training.estimate import BUDGET_CAP, LIBRARY_BYTES, Estimator, optimizer_bytes
from equipoise.training.fit import fit
from equipoise.training.machine import Machine, _cgroup_free, readable
from equipoise.training.settings import TrainSettings
from tests.tiny import FAMILIES, preference_dicts, row, tiny, tokenizer

SLOW = Machine("cpu", float32=1e9, bfloat16=2e9)
ROWS = [(8, (6, 4)), (12, (5, 9)), (3, (2, 2))]


def settings(**values: Any) -> TrainSettings:
    return TrainSettings(model_name_or_path="in memory", **values)


def estimator(family: str = "llama", rows: Any = ROWS, machine: Machine = SLOW, **values: Any) -> Estimator:
    return Estimator(settings(**values), [rows], machine, config=FAMILIES[family]())


# ---- parts, by hand


def test_all_weights_take_their_gradient_and_two_numbers_of_adam():
    """Llama: two embeddings 96 × 32; a layer: q, o 32 × 32, k, v 16 × 32, three of 64 × 32, two norms; one norm at the end."""
    weights = 2 * 96 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32) + 32
    memory = estimator().estimate().memory
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * weights, 4 * weights, 8 * weights)
    half = estimator(dtype="bfloat16").estimate().memory
    assert (half.weights, half.gradients, half.optimizer) == (2 * weights, 2 * weights, 4 * weights)


def test_lora_takes_gradients_and_state_of_the_adapters_only():
    """Rank 2 on q_proj (32 to 32) of two layers: 2 × 2 × (32 + 32) numbers."""
    full = estimator().estimate().memory
    memory = estimator(use_peft=True, lora_r=2, lora_target_modules=("q_proj",)).estimate().memory
    adapters = 2 * 2 * (32 + 32)
    assert memory.weights == full.weights + 4 * adapters
    assert (memory.gradients, memory.optimizer) == (4 * adapters, 8 * adapters)


@pytest.mark.parametrize(
    ("optim", "size"),
    [
        ("adamw_torch", 2 * 4 * 10_100),
        ("sgd", 0),
        # One byte for each of two moments; the small tensor's stay in float32.
        ("adamw_bnb_8bit", 2 * 10_000 + 2 * 4 * 100),
        ("paged_adamw_8bit", 2 * 10_000 + 2 * 4 * 100),
        ("lion_32bit", 4 * 10_100),
        ("somebody_elses", 2 * 4 * 10_100),
    ],
)
def test_state_of_optimizers(optim, size):
    assert optimizer_bytes(optim, [torch.zeros(100, 100), torch.zeros(100)]) == size


# ---- activations, against a real run


def kept_in_earnest(model: Any, rows: Any) -> int:
    """Bytes of all storages that autograd saves in a real forward pass on the CPU, weights left out."""
    register()
    model.set_attn_implementation(NAME)
    model.train()
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights:
            saved[pointer] = tensor
        return tensor

    batch = pack(
        [row(str(number), prompt, dict(zip(("chosen", "rejected"), sizes, strict=True))) for number, (prompt, sizes) in enumerate(rows)]
    )
    given = {getattr(batch, name).untyped_storage().data_ptr() for name in ("ids", "positions", "source", "target", "branch", "offset")}
    with no_dropout(model), lean_layers(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        values = policy_logps(model, batch)
    assert values.requires_grad
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in saved.items() if pointer not in given)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
def test_activations_are_what_a_real_forward_pass_keeps(family):
    """Beyond what autograd saves, only the log-probs and a few index tensors live: less than 2 %."""
    small, large = ROWS, ROWS * 4
    simulation = Simulation(settings(), "logps", config=FAMILIES[family]())
    model = tiny(family)
    for rows in (small, large):
        real = kept_in_earnest(model, rows)
        assert real <= simulation.run(rows, "packed").kept <= 1.02 * real


def test_recomputing_keeps_less_and_computes_more():
    rows = ROWS * 4
    plain = Simulation(settings(), "logps", config=FAMILIES["llama"]()).run(rows, "packed")
    recomputed = Simulation(settings(gradient_checkpointing=True), "logps", config=FAMILIES["llama"]()).run(rows, "packed")
    assert recomputed.kept < 0.7 * plain.kept
    assert recomputed.forward_flops == plain.forward_flops
    assert recomputed.flops > 1.2 * plain.flops


def test_flops_of_linear_layers_are_two_a_weight_and_token():
    """One row, one reply of one token: the head runs once, the layers on five positions, causal attention on top."""
    config = FAMILIES["llama"]()
    footprint = Simulation(settings(), "logps", config=config).run([(4, (1,))], "separate")
    layers = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    assert footprint.forward_flops >= 2 * (5 * layers + 96 * 32)
    # Scores and values: 2 · 5 · 5 · 32 each in both layers, where the counter knows the kernel.
    # Angles of rotary positions, a product of 4 frequencies and 5 positions in some versions of transformers: 2 · 4 · 5.
    assert footprint.forward_flops <= 2 * (5 * layers + 96 * 32) + 2 * 2 * (2 * 5 * 5 * 32) + 2 * 4 * 5


def test_families_whose_attention_cannot_be_replaced_count_padded_rows():
    from tests.tiny import DIFFICULT

    found = Estimator(settings(), [ROWS], SLOW, config=DIFFICULT["bloom"]())
    assert found.form == "padded"
    assert found.estimate().memory.activations > 0


# ---- picks


def budget_with(memory: int, **values: Any) -> int:
    rows = [(40, (20, 20))] * 64
    return estimator(rows=rows, machine=Machine("cpu", 1e9, 1e9, memory=memory), token_budget="auto", **values).budget()


def test_auto_takes_what_fits_up_to_where_more_brings_nothing():
    assert budget_with(memory=10**12) == BUDGET_CAP["cpu"]
    sizes = [budget_with(LIBRARY_BYTES["cpu"] + extra) for extra in (1_500_000, 2_000_000, 3_000_000)]
    assert sizes == sorted(sizes)
    assert 80 <= sizes[0] < sizes[-1] < BUDGET_CAP["cpu"]
    # What was picked fits, and two steps more would not (rows fill a budget only roughly).
    rows = [(40, (20, 20))] * 64
    limit = LIBRARY_BYTES["cpu"] + 3_000_000
    for extra, fits in ((0, True), (256, False)):
        found = estimator(rows=rows, token_budget=sizes[-1] + extra, per_device_train_batch_size=64).estimate()
        assert (found.memory.peak <= limit * (1.01 if fits else 1.0)) == fits


def test_a_row_that_does_not_fit_is_said_before_the_start_with_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = tmp_path / "base"
    tiny().save_pretrained(base)
    tokenizer().save_pretrained(base)
    run = TrainSettings(model_name_or_path=str(base), output_dir=str(tmp_path / "run"), token_budget="auto", max_steps=1)
    monkeypatch.setattr("equipoise.training.estimate.memory_at_hand", lambda device: LIBRARY_BYTES["cpu"])
    with pytest.raises(UsageError, match=r"at hand.*gradient_checkpointing=true.*use_peft=true.*dtype=bfloat16.*8bit.*max_length"):
        fit(run, train_dataset=preference_dicts(4))
    assert not (tmp_path / "run" / "model").exists()


def test_auto_trains_and_says_what_it_picked(tmp_path: Path):
    base = tmp_path / "base"
    tiny().save_pretrained(base)
    tokenizer().save_pretrained(base)
    run = TrainSettings(
        model_name_or_path=str(base), output_dir=str(tmp_path / "run"), reference_store=str(tmp_path), token_budget="auto", max_steps=1
    )
    assert fit(run, train_dataset=preference_dicts(4)).results["token_budget"] == BUDGET_CAP["cpu"]


def test_limits_of_a_container_count(tmp_path: Path):
    assert _cgroup_free(tmp_path) == []
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("300\n")
    assert _cgroup_free(tmp_path) == [700]
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup_free(tmp_path) == []


@pytest.mark.parametrize(("seconds", "words"), [(None, "unknown"), (45, "45 s"), (420, "7 min"), (9000, "2.5 h")])
def test_times_for_people(seconds, words):
    assert readable(seconds) == words
