"""The GPU's attention kernel, its rule and its mask checked on the CPU: against plain forwards and a rule spelled out pair by pair.

FlexAttention's reference implementation has a backward pass on the CPU, but its front door refuses one there; the tests open
that door. What Triton makes of it is checked in tests/gpu.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex
from transformers import AutoModelForCausalLM

from equipoise.models import _flex, attention
from equipoise.models._dense import dense, key_bounds
from equipoise.models.attention import NAME, RowMask, attention_of, register
from equipoise.models.batch import Span, pack
from equipoise.models.logps import head_of, policy_logps
from tests.tiny import FAMILIES, row, tiny

register()
CPU = torch.device("cpu")
# One to three replies, a prompt and replies of one token, rows past the tiny families' window; three blocks of 128.
ROWS = [
    row("a", 7, {"chosen": 5, "rejected": 9}),
    row("b", 1, {"chosen": 1, "rejected": 3}),
    row("c", 60, {"chosen": 42, "rejected": 4}),
    row("d", 3, {"chosen": 2, "rejected": 2, "gold": 20}),
    row("e", 70, {"gold": 46}),
]
SPANS = pack(ROWS).rows
WINDOWS = [None, 1, 8, 50]


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Route packed attention through the flex path, on torch's reference implementation. Returns the shapes it then served."""
    served: list[tuple[int, ...]] = []

    def kernel(query: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        served.append(tuple(query.shape))
        return torch_flex.flex_attention(query, *arguments, **options)

    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(_flex, "_compiled", lambda: kernel)
    monkeypatch.setattr(_flex, "usable", lambda *_: True)
    return served


def sees(rows: tuple[Span, ...], window: int | None) -> torch.Tensor:
    """[S, S] the rule in words: same row, key not later, key in the prompt or in the same reply, inside the window."""
    tokens = []
    for number, span in enumerate(rows):
        tokens += [(number, None, position) for position in range(span.prompt)]
        for reply, length in enumerate(span.branches):
            tokens += [(number, reply, span.prompt + offset) for offset in range(length)]
    allowed = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for q, (row_q, reply_q, position_q) in enumerate(tokens):
        for k, (row_k, reply_k, position_k) in enumerate(tokens):
            near = 0 <= position_q - position_k < (window or len(tokens))
            allowed[q, k] = row_q == row_k and reply_k in (None, reply_q) and near
    return allowed


@pytest.mark.parametrize("window", WINDOWS)
def test_the_mask_equals_the_rule_pair_by_pair(window: int | None) -> None:
    mask = _flex.block_mask(SPANS, window, CPU)
    size = sum(span.length for span in SPANS)
    assert size == 275
    index = torch.arange(size)
    expected = sees(SPANS, window)
    assert torch.equal(mask.mask_mod(index, index, index[:, None], index[None, :]), expected)
    padded = torch.nn.functional.pad(expected, (0, 3 * 128 - size, 0, 3 * 128 - size)).view(3, 128, 3, 128)
    pairs = padded.sum((1, 3))
    assert torch.equal(mask.to_dense()[0, 0].bool(), pairs > 0)
    assert mask.full_kv_num_blocks is not None
    assert torch.equal(mask.full_kv_num_blocks[0, 0], (pairs == 128 * 128).sum(1))


def test_blocks_seen_in_full_are_marked_so() -> None:
    """A reply far into a long prompt sees whole blocks of it: what makes the kernel skip the mask there."""
    rows = (Span(0, 384, (128, 128)),)
    mask = _flex.block_mask(rows, None, CPU)
    ours = mask.kv_num_blocks.tolist(), mask.full_kv_num_blocks.tolist()
    # Diagonal blocks are partial. Blocks before: 0, 1, 2 in the prompt, 3 for each reply, none between the replies.
    assert ours == ([[[1, 1, 1, 1, 1]]], [[[0, 1, 2, 3, 3]]])
    torchs = torch_flex.create_block_mask(mask.mask_mod, None, None, 640, 640, device="cpu", BLOCK_SIZE=128)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(torchs, name)), name


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "opt", "opt350m", "mistral", "gemma3"])
def test_log_probs_and_gradients_equal_plain_forwards(name: str, flex_on_cpu: list[tuple[int, ...]]) -> None:
    model = tiny(name)
    weights = torch.randn(10, 46, generator=torch.Generator().manual_seed(0))

    def run(flex: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        with attention_of(model, NAME if flex else "sdpa"):
            values = policy_logps(model, pack(ROWS, "packed" if flex else "padded"))
        (values * weights[: len(values), : values.shape[1]]).sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
        return values.detach(), gradient

    expected, expected_gradient = run(False)
    assert not flex_on_cpu
    values, gradient = run(True)
    assert len(flex_on_cpu) == model.config.num_hidden_layers
    torch.testing.assert_close(values, expected, atol=2e-5, rtol=1e-5)
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 1e-5


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_equals_the_row_path(window: int | None, scaling: float | None, flex_on_cpu: list[tuple[int, ...]]) -> None:
    """Grouped heads (seven to a key head, as in Qwen2.5-0.5B), output and gradients."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, heads, 275, 16, generator=generator) for heads in (14, 2, 2)]
    cotangent = torch.randn(1, 275, 14, 16, generator=generator)
    module = torch.nn.Module()
    results = []
    for flex in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_flex, "usable", lambda *_, flex=flex: flex)
            inputs = [part.clone().requires_grad_() for part in parts]
            output, _ = attention.packed_attention(module, *inputs, RowMask(SPANS, window), scaling)
            results.append([output, *torch.autograd.grad(output, inputs, cotangent)])
    assert len(flex_on_cpu) == 1
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_one_mask_serves_all_layers(flex_on_cpu: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once a micro-batch and window, also where the backward pass recomputes the layers."""
    made: list[int | None] = []
    build = _flex.block_mask
    monkeypatch.setattr(_flex, "block_mask", lambda rows, window, device: made.append(window) or build(rows, window, device))
    config = FAMILIES["gemma3"]()
    config.layer_types = ["full_attention", "sliding_attention"]
    model = AutoModelForCausalLM.from_config(config)
    model.train()
    with warnings.catch_warnings():  # transformers is renaming it; the older name works on both
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with attention_of(model, NAME):
        head_of(model, pack(ROWS))  # its probe runs the layers once a model
        flex_on_cpu.clear()
        made.clear()
        policy_logps(model, pack(ROWS)).sum().backward()
    assert len(flex_on_cpu) == 4, "two layers, forward and recomputed"
    assert sorted(made, key=str) == [8, None]


def test_the_trial_lets_a_right_kernel_through_and_stops_a_wrong_one(
    flex_on_cpu: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = _flex.works.__wrapped__
    assert trial(4, 2, 16, torch.float32, CPU)
    assert trial(14, 2, 64, torch.bfloat16, CPU)
    right = _flex.attend

    def future(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: Any) -> torch.Tensor:
        wrong = torch_flex.create_block_mask(torch_flex.noop_mask, None, None, 262, 262, device="cpu")
        return right(query, key, value, wrong, scaling)

    monkeypatch.setattr(_flex, "attend", future)
    assert not trial(4, 2, 16, torch.float32, CPU)

    def refuses(*_: Any) -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(_flex, "attend", refuses)
    assert not trial(4, 2, 128, torch.float32, CPU)
    said = capsys.readouterr()
    assert "out of resource: shared memory" in said.out + said.err
    assert "another way" in said.out + said.err


def test_a_trial_inside_a_recomputed_layer_leaves_it_alone(flex_on_cpu: list[tuple[int, ...]]) -> None:
    """Checkpointing counts the tensors a forward saves; the trial, run in the first forward only, must not add to them."""
    from torch.utils.checkpoint import checkpoint

    calls: list[int] = []

    def layer(value: torch.Tensor) -> torch.Tensor:
        if not calls:
            assert _flex.works.__wrapped__(4, 2, 16, torch.float32, CPU)
        calls.append(1)
        return (value * value).sin()

    value = torch.ones(3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        checkpoint(layer, value, use_reentrant=False).sum().backward()
    torch.testing.assert_close(value.grad, 2 * torch.cos(torch.ones(3)))
    assert len(calls) == 2


def test_autocast_decides_the_dtype(flex_on_cpu: list[tuple[int, ...]]) -> None:
    """Norms on queries and keys leave them in float32 under autocast, beside bfloat16 values."""
    query, key, value = torch.randn(1, 4, 275, 16), torch.randn(1, 2, 275, 16), torch.randn(1, 2, 275, 16).bfloat16()
    mask = _flex.block_mask(SPANS, None, CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = _flex.attend(query, key, value, mask, None)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), dense(query, key, value.float(), SPANS, None, None), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_other_devices_and_cases_keep_the_row_path(kind: str) -> None:
    part = torch.zeros(1, 2, 300, 16, device=kind)
    assert not _flex.usable(part, part, part, 0.0)


def test_bounds_by_hand() -> None:
    #      p p p a a b b | p c c
    rows = (Span(0, 3, (2, 2)), Span(7, 1, (2,)))
    assert key_bounds(rows, None).tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0, 7, 7],
        [0, 0, 0, 3, 3, 3, 3, 0, 8, 8],
        [0, 0, 0, 3, 3, 5, 5, 7, 8, 8],
    ]
    # A window of 2: a token sees itself and the position before. Reply position 4 no longer reaches the prompt.
    bounds = key_bounds(rows, 2)
    assert bounds[0].tolist() == [0, 0, 0, 2, 3, 2, 3, 0, 7, 8]
    assert bounds[2].tolist() == [0, 0, 1, 3, 3, 5, 5, 7, 8, 8]
    assert bounds.dtype == np.int32


@pytest.mark.slow
def test_lengths_do_not_recompile(monkeypatch: pytest.MonkeyPatch) -> None:
    """One trace without and one with gradient, whatever the lengths, rows and windows are."""
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(torch_flex.flex_attention, backend=counter, dynamic=True, fullgraph=True)
    monkeypatch.setattr(_flex, "_compiled", lambda: compiled)
    frames = []
    for number, length in enumerate((250, 261, 700, 1030)):
        rows, window = (Span(0, length, (13, 17 + number)),), (None, 40)[number % 2]
        mask = _flex.block_mask(rows, window, CPU)
        parts = [torch.randn(1, heads, length + 30 + number, 16, requires_grad=True) for heads in (4, 2, 2)]
        output, expected = _flex.attend(*parts, mask, 0.3), dense(*parts, rows, window, 0.3)
        for ours, other in zip(
            torch.autograd.grad(output.square().sum(), parts), torch.autograd.grad(expected.square().sum(), parts), strict=True
        ):
            torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-4)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1, frames


@pytest.mark.slow
def test_compiled_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ kernel torch generates (forward only, fixed length: its dynamic lengths do not compile on torch 2.13)."""
    import shutil

    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    compiled = torch.compile(torch_flex.flex_attention, dynamic=False, fullgraph=True)
    monkeypatch.setattr(_flex, "_compiled", lambda: compiled)
    parts = [torch.randn(1, heads, 275, 16) for heads in (4, 2, 2)]
    mask = _flex.block_mask(SPANS, 50, CPU)
    torch.testing.assert_close(_flex.attend(*parts, mask, None), dense(*parts, SPANS, 50, None), atol=1e-5, rtol=1e-5)
