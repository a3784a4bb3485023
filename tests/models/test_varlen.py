"""The GPU's variable-length attention checked on the CPU: its segments, and the kernel replaced by what it is said to compute.

What torch's own kernel makes of the segments is checked in tests/gpu.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equipoise.models import _varlen
from equipoise.models._dense import dense
from equipoise.models.attention import NAME, RowMask, attention_of, packed_attention, register
from equipoise.models.batch import Span, pack
from equipoise.models.logps import policy_logps
from tests.models.test_flex import ROWS, SPANS, WINDOWS
from tests.tiny import tiny

register()
CPU = torch.device("cpu")
Tensor = torch.Tensor


def written_out(query: Tensor, key: Tensor, value: Tensor, cut_q: Tensor, cut_k: Tensor, scale: float | None, left: int) -> Tensor:
    """Segment by segment: causal from the last query and the last key backwards, `left` keys back. [S, H, D], twice [K, H_kv, D]."""
    outputs = []
    groups = query.shape[1] // key.shape[1]
    for segment in range(len(cut_q) - 1):
        q = query[cut_q[segment] : cut_q[segment + 1]].transpose(0, 1)
        k, v = (part[cut_k[segment] : cut_k[segment + 1]].transpose(0, 1).repeat_interleave(groups, 0) for part in (key, value))
        index = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        back = index - torch.arange(k.shape[1])[None]
        allowed = (back >= 0) & ((back <= left) | (left < 0))
        scores = q @ k.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
        outputs.append((scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Route packed attention through the segments. Returns how many keys each call then saw."""
    seen: list[int] = []

    def forward(query: Tensor, key: Tensor, value: Tensor, cut_q: Tensor, cut_k: Tensor, *rest: Any, **options: Any) -> Any:
        most_q, most_k, dropout, causal, debug = rest
        assert (most_q, most_k) == (int(cut_q.diff().max()), int(cut_k.diff().max()))
        assert (dropout, causal, debug) == (0.0, True, False)
        assert cut_q.dtype == cut_k.dtype == torch.int32
        seen.append(len(key))
        output = written_out(query, key, value, cut_q, cut_k, options["scale"], options["window_size_left"])
        return output, torch.zeros(1), torch.zeros(2), torch.zeros(()), torch.empty(0)

    def backward(given: Tensor, *inputs: Any, **options: Any) -> Any:
        query, key, value = (part.detach().requires_grad_() for part in inputs[:3])
        with torch.enable_grad():
            output = written_out(query, key, value, *inputs[5:7], options["scale"], options["window_size_left"])
        return torch.autograd.grad(output, (query, key, value), given)

    monkeypatch.setattr(_varlen, "_forward", forward)
    monkeypatch.setattr(_varlen, "_backward", backward)
    monkeypatch.setattr(_varlen, "usable", lambda *_: True)
    return seen


def test_segments_by_hand() -> None:
    #      p p p a a b b b | p c c
    made = _varlen.layout((Span(0, 3, (2, 3)), Span(8, 1, (2,))), CPU)
    assert made.queries.tolist() == [0, 5, 8, 11]
    assert made.keys.tolist() == [0, 5, 11, 14]
    assert (made.most_queries, made.most_keys) == (5, 6)
    assert made.shared is not None
    assert [part.tolist() for part in (made.shared.gathered, made.shared.own, made.shared.copies, made.shared.copied)] == [
        [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10],
        [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13],
        [5, 6, 7],
        [0, 1, 2],
    ]


def test_nothing_is_copied_where_no_prompt_is_shared() -> None:
    made = _varlen.layout((Span(0, 3, (2,)), Span(5, 1, (2,))), CPU)
    assert made.shared is None
    assert made.keys.tolist() == made.queries.tolist() == [0, 5, 8]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_equals_plain_attention(window: int | None, scaling: float | None, on_cpu: list[int]) -> None:
    """Grouped heads (seven to a key head), output and gradients; one to three replies a prompt."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, heads, 275, 16, generator=generator, dtype=torch.float64) for heads in (14, 2, 2)]
    cotangent = torch.randn(1, 275, 14, 16, generator=generator, dtype=torch.float64)
    results = []
    for ours in (True, False):
        inputs = [part.clone().requires_grad_() for part in parts]
        if ours:
            output, _ = packed_attention(torch.nn.Module(), *inputs, RowMask(SPANS, window), scaling)
        else:
            output = dense(*inputs, SPANS, window, scaling)
        results.append([output, *torch.autograd.grad(output, inputs, cotangent)])
    prompts = 7 + 1 + 60 + 3 + 3
    assert on_cpu == [275 + prompts]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt350m", "mistral", "gemma3"])
def test_log_probs_and_gradients_equal_plain_forwards(name: str, on_cpu: list[int]) -> None:
    model = tiny(name)
    weights = torch.randn(10, 46, generator=torch.Generator().manual_seed(0))

    def run(form: Any) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with attention_of(model, "sdpa" if form == "padded" else NAME):
            values = policy_logps(model, pack(ROWS, form))
        (values * weights[: len(values), : values.shape[1]]).sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
        return values.detach(), gradient

    expected, expected_gradient = run("padded")
    assert not on_cpu
    for form in ("packed", "separate"):
        values, gradient = run(form)
        torch.testing.assert_close(values, expected, atol=2e-5, rtol=1e-5)
        assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 1e-5
    assert on_cpu


def test_the_trial_stops_a_kernel_that_looks_elsewhere(
    on_cpu: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _varlen.works.__wrapped__(4, 2, 16, torch.float32, CPU)
    right = _varlen._forward

    def shorter(*inputs: Any, **options: Any) -> Any:
        return right(*inputs, **options | {"window_size_left": options["window_size_left"] - 1 if options["window_size_left"] > 0 else -1})

    monkeypatch.setattr(_varlen, "_forward", shorter)
    assert not _varlen.works.__wrapped__(4, 2, 16, torch.float32, CPU)
    said = capsys.readouterr()
    assert "another way" in said.out + said.err


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_other_devices_take_another_way(kind: str) -> None:
    part = torch.zeros(1, 2, 300, 16, device=kind, dtype=torch.bfloat16)
    assert not _varlen.usable(part, part, part, 0.0)
