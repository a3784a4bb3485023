"""A base in 4 bits: what it computes, what its fingerprint sees, and that nothing about it changes under way."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from equipoise.core.errors import UsageError
from equipoise.models import quantised
from equipoise.models.identity import weights_fingerprint
from equipoise.models.load import load_causal, load_sequence_classifier
from equipoise.models.quantised import FourBit, compute_dtypes, in_low_precision, is_quantised, settle
from tests.tiny import tiny, tokenizer

pytest.importorskip("bitsandbytes")
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny(seed=5).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2 has biases on queries, keys and values."""
    folder = tmp_path_factory.mktemp("biased")
    model = tiny("qwen2", seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", [FourBit(), FourBit("fp4"), FourBit(double_quant=True)], ids=str)
def test_it_computes_what_plain_layers_with_the_dequantised_weights_do(base: Path, how: FourBit) -> None:
    from bitsandbytes.functional import dequantize_4bit

    model = load_causal(base, device="cpu", four_bit=how)
    assert is_quantised(model)
    plain = load_causal(base, device="cpu")
    assert not is_quantised(plain)
    changed = 0
    with torch.no_grad():
        for (name, weight), parameter in zip(model.named_parameters(), plain.parameters(), strict=True):
            if getattr(weight, "quant_state", None) is not None:
                assert weight.dtype == torch.uint8, name
                parameter.copy_(dequantize_4bit(weight.data, weight.quant_state))
                changed += 1
        full = load_causal(base, device="cpu")(input_ids=IDS).logits
        ours, expected = model(input_ids=IDS).logits, plain(input_ids=IDS).logits
    assert changed == 14, "seven matrices in each of two layers; embeddings, norms and head stay"
    assert torch.allclose(ours, expected, atol=2e-5)
    assert (ours - full).abs().max() > 0.1, "4 bits lose something"
    assert model.num_parameters() == plain.num_parameters()


def test_each_quantisation_has_its_own_fingerprint_and_keeps_it_under_an_adapter(base: Path) -> None:
    prints = [weights_fingerprint(load_causal(base, device="cpu"))]
    prints += [
        weights_fingerprint(load_causal(base, device="cpu", four_bit=how))
        for how in (FourBit(), FourBit("fp4"), FourBit(double_quant=True))
    ]
    assert len(set(prints)) == 4
    model = load_causal(base, device="cpu", four_bit=FourBit())
    assert weights_fingerprint(model) == prints[1], "loading twice gives the same"
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert weights_fingerprint(wrapped) == prints[1]
    assert weights_fingerprint(wrapped, skip_adapters=False) != prints[1]


def test_a_scale_that_changes_is_seen(base: Path) -> None:
    """The packed bytes stay what they are, the weights they stand for do not."""
    model = load_causal(base, device="cpu", four_bit=FourBit())
    before = weights_fingerprint(model)
    model.model.layers[0].mlp.up_proj.weight.quant_state.absmax[3] *= 1.01
    assert weights_fingerprint(model) != before


def test_a_forward_pass_changes_nothing(biased: Path) -> None:
    model = load_causal(biased, device="cpu", four_bit=FourBit(compute_dtype="bfloat16"))
    before, weights = weights_fingerprint(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model(input_ids=IDS)
    assert weights_fingerprint(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_cpu_that_packs_weights_anew_is_kept_from_it(base: Path) -> None:
    """With AVX512-BF16, bitsandbytes repacks weights in evaluation mode and then runs another kernel than in training."""
    model = load_causal(base, device="cpu", four_bit=FourBit())
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert len(layers) == 14
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    settle(model)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_the_dtype_of_its_products_counts_as_its_precision(base: Path) -> None:
    exact = load_causal(base, device="cpu", four_bit=FourBit())
    rough = load_causal(base, device="cpu", four_bit=FourBit(compute_dtype="bfloat16"))
    assert (compute_dtypes(exact), compute_dtypes(rough), compute_dtypes(tiny())) == (["float32"], ["bfloat16"], [])
    assert not in_low_precision(exact)
    assert in_low_precision(rough)
    assert in_low_precision(tiny().bfloat16())


def test_the_head_of_a_reward_model_stays_in_floating_point(base: Path) -> None:
    model = load_sequence_classifier(base, from_backbone=True, device="cpu", four_bit=FourBit())
    assert is_quantised(model)
    assert model.score.weight.dtype == torch.float32


def test_a_missing_package_is_named_with_what_to_install(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"load_in_4bit needs bitsandbytes.*equipoise\[quant\]"):
        load_causal(base, device="cpu", four_bit=FourBit())
