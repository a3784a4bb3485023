"""Packed rows give every family's own log-probs and gradients, or are refused: never silently wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig

from equipoise.core.errors import NumericsError, UsageError
from equipoise.models import _dense, _rows
from equipoise.models._elementwise import EAGER
from equipoise.models.attention import NAME, attention_of, packed_rows, register
from equipoise.models.batch import Form, Span, pack
from equipoise.models.logps import policy_logps, token_logps
from equipoise.training.start_check import choose_form
from tests.tiny import DIFFICULT, FAMILIES, VOCAB, row, tiny

register()
CPU = torch.device("cpu")
# One reply, two, three; a one-token prompt; replies of one token; rows past every window of the tiny families.
ROWS = [
    row("a", 7, {"chosen": 5, "rejected": 9}),
    row("b", 1, {"chosen": 1, "rejected": 3}),
    row("c", 30, {"chosen": 12, "rejected": 4}),
    row("d", 3, {"chosen": 2, "rejected": 2, "gold": 20}),
    row("e", 11, {"gold": 6}),
]


def plain(model: Any) -> torch.Tensor:
    """[N, T] log-probs from one forward a reply, computed with nothing of ours."""
    branches = [(item, branch) for item in ROWS for branch in item.branches]
    result = torch.zeros(len(branches), max(len(branch.ids) for _, branch in branches))
    for number, (item, branch) in enumerate(branches):
        ids = torch.tensor(np.concatenate([item.prompt, branch.ids]))[None].long()
        logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        for offset, token in enumerate(branch.ids):
            result[number, offset] = logps[len(item.prompt) - 1 + offset, int(token)]
    return result


def ours(model: Any, form: Form) -> torch.Tensor:
    with attention_of(model, NAME if form != "padded" else "sdpa"):
        return policy_logps(model, pack(ROWS, form))


@pytest.fixture(params=["whole", "blocks", "public function"])
def every_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece as one block of queries, as several, and as where ours does not serve (dropout, other devices)."""
    if request.param == "public function":
        monkeypatch.setattr(_rows, "usable", lambda *_: False)
    elif request.param == "blocks":
        monkeypatch.setattr(_rows, "BLOCK", 7)


@pytest.mark.usefixtures("every_way")
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_log_probs_equal_plain_forwards(name: str) -> None:
    model = tiny(name)
    with torch.no_grad():
        expected = plain(model)
        assert expected.abs().max() > 3, "the model must be far from uniform for this test to see anything"
        for form in ("packed", "separate", "padded"):
            torch.testing.assert_close(ours(model, form), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("every_way")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt350m", "mistral", "gemma3"])
def test_gradients_equal_plain_forwards(name: str) -> None:
    model = tiny(name)
    weights = torch.randn(10, 20, generator=torch.Generator().manual_seed(0))

    def gradient(values: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        (values * weights).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    expected = gradient(plain(model))
    difference = (gradient(ours(model, "packed")) - expected).norm() / expected.norm()
    assert difference < 1e-5


def test_the_start_check_computes_as_training_will() -> None:
    """Wrong kernels are found before anything is trained with them."""
    wrong = EAGER._replace(norm=lambda *inputs: tuple(1.01 * part for part in EAGER.norm(*inputs)))
    with pytest.raises(NumericsError, match="start check failed"):
        choose_form(tiny("llama"), ROWS, "auto", CPU, kernels=wrong)


def test_the_start_check_refuses_an_encoder() -> None:
    """BERT loads as a causal model and sees the token it is asked about; made a decoder it does not."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "initializer_range": 0.1}
    torch.manual_seed(0)
    for decoder in (True, False):
        model = AutoModelForCausalLM.from_config(BertConfig(vocab_size=VOCAB, is_decoder=decoder, **sizes)).eval()
        if decoder:
            choose_form(model, ROWS, "auto", CPU)
        else:
            with pytest.raises(UsageError, match="bert reads a whole text at once"):
                choose_form(model, ROWS, "auto", CPU)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_start_check_takes_the_fast_form(name: str) -> None:
    form, report = choose_form(tiny(name), ROWS, "auto", CPU)
    assert form == "packed", report
    assert report["tried"]["packed"]["difference"] <= 1e-4


@pytest.mark.parametrize("name", sorted(DIFFICULT))
def test_the_start_check_catches_what_packing_gets_wrong(name: str) -> None:
    """Whatever form comes out must give the model's own log-probs; the packed one only where it really does."""
    model = tiny(name)
    with torch.no_grad():
        expected = plain(model)
        form, report = choose_form(model, ROWS, "auto", CPU)
        if form == "padded":
            values = policy_logps(model, pack(ROWS, "padded"))
        else:
            with attention_of(model, NAME):
                values = policy_logps(model, pack(ROWS, form))
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=1e-4)
    if name in ("gpt_oss", "gemma2", "mamba", "bloom"):
        assert form == "padded", report


def without_a_window(rows: Any, window: int | None, dtype: torch.dtype, cut: Any = _rows.pieces) -> Any:
    """The cut of a mask function that forgets the window."""
    return cut(rows, None, dtype)


def test_a_wrong_window_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask function that forgets the window is silently wrong for windowed models; the check has to see it."""
    monkeypatch.setattr(_rows, "pieces", without_a_window)
    form, report = choose_form(tiny("mistral"), ROWS, "auto", CPU)
    assert report["tried"]["packed"]["difference"] > 1e-4
    assert form == "padded"


def test_bfloat16_is_judged_by_the_models_own_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding is let through, a forgotten window is not."""
    assert choose_form(tiny("mistral").bfloat16(), ROWS, "auto", CPU)[0] == "packed"
    monkeypatch.setattr(_rows, "pieces", without_a_window)
    form, report = choose_form(tiny("mistral").bfloat16(), ROWS, "auto", CPU)
    assert form == "padded", report


def test_a_forced_form_that_is_wrong_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "pieces", without_a_window)
    with pytest.raises(NumericsError, match="start check"):
        choose_form(tiny("mistral"), ROWS, "packed", CPU)


def test_packed_attention_refuses_to_run_without_rows() -> None:
    model = tiny("llama")
    with attention_of(model, NAME), pytest.raises(NumericsError, match="without packed rows"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)
    with attention_of(model, NAME), packed_rows(pack(ROWS).rows), pytest.raises(NumericsError, match="positions"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)


def test_layout_by_hand() -> None:
    batch = pack([row("a", 4, {"chosen": 3, "rejected": 2}), row("b", 2, {"chosen": 1, "rejected": 2})])
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2, 2, 3]]
    # The prompt's last token predicts the first token of both replies.
    assert batch.source.tolist() == [3, 4, 5, 3, 7, 10, 10, 12]
    assert batch.branch.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert batch.offset.tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert batch.unit.tolist() == [0, 0, 1, 1]
    assert batch.mask.tolist() == [[True] * 3, [True, True, False], [True, False, False], [True, True, False]]
    assert batch.tokens == 14
    assert pack([row("a", 4, {"chosen": 3, "rejected": 2})], "separate").tokens == 13
    assert pack([row("a", 4, {"chosen": 3, "rejected": 2})], "padded").ids.shape == (2, 7)


def test_token_logps_gradient() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: token_logps(values, torch.arange(5)), logits)
    huge = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    values = token_logps(huge, torch.tensor([1]))
    assert values.item() == -2e4
    values.sum().backward()
    assert huge.grad is not None
    assert torch.isfinite(huge.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [128, 24])
def test_row_attention_beside_plain_attention_in_float64(block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients, grouped heads, with a window and without."""
    monkeypatch.setattr(_rows, "BLOCK", block)

    def attend(query: Any, key: Any, value: Any, rows: Any, window: int | None) -> torch.Tensor:
        return _rows.attend(query, key, value, _rows.pieces(rows, window, torch.float32), None)

    assert _dense.trusted("row attention", attend, 6, 2, 16, dtype, CPU)
    assert not _dense.trusted("one that forgets the window", lambda *parts: attend(*parts[:4], None), 6, 2, 16, dtype, CPU)


def test_row_attention_computes_in_what_autocast_asks_for() -> None:
    """Rotations leave queries and keys in float32 there."""
    query, key, value = (torch.randn(1, heads, 9, 8) for heads in (4, 2, 2))
    cut = _rows.pieces((Span(0, 4, (3, 2)),), None, torch.float32)
    expected = _rows.attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), cut, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _rows.attend(query, key, value.bfloat16(), cut, None)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_what_values_have_in_common_costs_no_precision() -> None:
    """A large shared part of all value vectors (a bias, say): queries' gradients do not depend on it, and keep their digits in 16 bits."""
    generator = torch.Generator().manual_seed(0)
    query, key, cotangent = (torch.randn(1, heads, 40, 16, generator=generator) for heads in (4, 2, 4))
    value = torch.randint(-1, 2, (1, 2, 40, 16), generator=generator) / 2  # with 64 more still exact in bfloat16
    cut = _rows.pieces((Span(0, 10, (17, 13)),), None, torch.float32)

    def gradient(dtype: torch.dtype, shift: float) -> torch.Tensor:
        parts = [part.to(dtype).requires_grad_() for part in (query, key, value + shift)]
        output = _rows.attend(*parts, cut, None)
        return torch.autograd.grad(output, parts[0], cotangent.transpose(1, 2).to(dtype))[0].float()

    exact = gradient(torch.float32, 0.0)
    for shift in (0.0, 64.0):
        assert (gradient(torch.bfloat16, shift) - exact).norm() / exact.norm() < 0.02
