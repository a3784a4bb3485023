"""Models by name: folders, adapters, heads, assets, and a fingerprint that knows weights from adapters."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
)

from equipoise.core import assets
from equipoise.core.errors import EquipoiseError, UsageError
from equipoise.models import load
from equipoise.models.identity import weights_fingerprint

WORDS = ["<unk>", "<eos>", "good", "bad", "day", "night"]


def tokenizer(pad: str | None = None) -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", pad_token=pad)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=64, bos_token_id=None, eos_token_id=1, **sizes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny causal model with its tokenizer."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    llama().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """A LoRA adapter of the tiny model whose weights do something."""
    path = tmp_path_factory.mktemp("adapter") / "lora"
    model = get_peft_model(load.load_causal(folder), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    model.save_pretrained(path)
    return path


IDS = torch.tensor([[2, 4, 3, 5]])


# ---- names


def test_a_model_folder_and_a_hub_name_pass(folder):
    assert load.resolve_model(folder) == str(folder)
    assert load.resolve_model("facebook/opt-350m") == "facebook/opt-350m"
    assert load.resolve_model("gpt2") == "gpt2"


def test_a_folder_without_config_says_what_a_model_folder_needs(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match=r"config\.json is missing.*holds config\.json and model\.safetensors.*Found: notes\.txt"):
        load.resolve_model(tmp_path)


def test_a_folder_without_weights_says_so(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(UsageError, match=r"model\.safetensors is missing"):
        load.resolve_model(tmp_path)


def test_the_folder_above_a_model_names_the_model(folder):
    with pytest.raises(UsageError, match=f"Did you mean {folder}"):
        load.resolve_model(folder.parent)


def test_an_unfinished_adapter_is_told_from_a_finished_one(adapter, tmp_path):
    assert load.resolve_model(adapter) == str(adapter)
    shutil.copy(adapter / "adapter_config.json", tmp_path)
    with pytest.raises(UsageError, match=r"unfinished adapter.*no adapter_model\.safetensors"):
        load.resolve_model(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "runs/a/model", "~/nowhere"])
def test_a_path_that_does_not_exist_is_no_hub_name(name):
    with pytest.raises(UsageError, match="is not a folder"):
        load.resolve_model(name)


def test_a_mistyped_asset_names_the_right_one():
    with pytest.raises(UsageError, match="Did you mean 'smollm2-135m-instruct'"):
        load.resolve_model("smollm2-135m")


def test_an_asset_is_found_under_the_path_it_had_on_another_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "asset_path", lambda name: tmp_path / name)
    assert load.resolve_model("/somebody/else/.cache/equipoise/models/minilm-l6") == str(tmp_path / "minilm-l6")


def test_a_hub_model_that_cannot_be_had_is_one_clear_error(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError("We couldn't connect.\nlong story")

    monkeypatch.setattr(load, "_hub_answers", lambda: True)
    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(UsageError, match=r"owner/model could not be loaded: We couldn't connect\.\nGive a model folder"):
        load.load_tokenizer("owner/model")


def test_without_the_hub_its_cache_serves_and_nothing_is_asked_for(monkeypatch, folder):
    monkeypatch.setattr(load, "_hub_answers", lambda: False)
    monkeypatch.setattr(load, "snapshot_download", lambda name, local_files_only: str(folder))
    assert load.load_causal("owner/tiny", device="cpu").num_parameters() == llama().num_parameters()

    def absent(name, local_files_only):
        raise FileNotFoundError(name)

    monkeypatch.setattr(load, "snapshot_download", absent)
    with pytest.raises(UsageError, match="owner/tiny could not be loaded: the hub cannot be reached, and its cache"):
        load.load_causal("owner/tiny", device="cpu")


# ---- loading


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_load_causal_gives_the_dtype_asked_for_in_eval_mode(folder, dtype, expected):
    model = load.load_causal(folder, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert not model.training
    assert model.config._attn_implementation == "sdpa"


def test_an_unknown_dtype_names_the_nearest(folder):
    with pytest.raises(UsageError, match="Did you mean 'float32'"):
        load.load_causal(folder, dtype="float23")


def test_a_family_without_sdpa_falls_back_to_eager_and_says_so(tmp_path, capsys):
    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    model = load.load_causal(tmp_path, device="cpu")
    assert model.config._attn_implementation == "eager"
    assert "using eager" in capsys.readouterr().err


def test_a_family_of_another_kind_is_one_clear_error(tmp_path):
    T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=len(WORDS)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError, match=r"could not be loaded: .*T5Config.*AutoModelForCausalLM"):
        load.load_causal(tmp_path)


def test_an_adapter_folder_loads_its_base_and_changes_the_logits_as_lora_says(folder, adapter):
    """LoRA (arXiv 2106.09685, equation 3): W + (alpha / r) B A, here written into the base's weights by hand."""
    expected = load.load_causal(folder, device="cpu")
    wrapped = load.load_causal(adapter, device="cpu")
    weights = dict(wrapped.named_parameters())
    with torch.no_grad():
        for layer in range(2):
            for module in ("q_proj", "v_proj"):
                name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
                delta = weights[f"{name}.lora_B.default.weight"] @ weights[f"{name}.lora_A.default.weight"]
                expected.get_submodule(f"model.layers.{layer}.self_attn.{module}").weight += 8 / 2 * delta
        torch.testing.assert_close(wrapped(IDS).logits, expected(IDS).logits, rtol=1e-5, atol=1e-6)
        plain = load.load_causal(folder, device="cpu")(IDS).logits
    assert (wrapped(IDS).logits - plain).abs().max() > 1e-3
    assert not any(parameter.requires_grad for parameter in wrapped.parameters())


def test_an_adapter_can_be_put_on_and_trained_on(folder, adapter):
    model = load.load_causal(folder, device="cpu", adapter=adapter, trainable=True)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning
    assert all("lora_" in name for name in learning)
    assert not model.training


def test_an_adapter_on_an_adapter_and_a_model_as_adapter_are_errors(folder, adapter):
    with pytest.raises(UsageError, match="itself an adapter"):
        load.load_causal(adapter, adapter=adapter)
    with pytest.raises(UsageError, match="not an adapter folder"):
        load.load_causal(folder, adapter=folder)


def test_an_adapter_that_does_not_name_its_base_says_what_to_do(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(UsageError, match=r"base_model_name_or_path.*adapter="):
        load.load_causal(tmp_path / "lora")


def test_the_tokenizer_gets_a_pad_token_and_an_adapter_uses_its_bases(folder, adapter):
    assert load.load_tokenizer(folder).pad_token == "<eos>"
    assert load.load_tokenizer(adapter)("good night")["input_ids"] == [2, 5]


# ---- heads


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A plain encoder, with no head."""
    path = tmp_path_factory.mktemp("encoder") / "bert"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    BertModel(BertConfig(vocab_size=len(WORDS), pad_token_id=0, **sizes)).save_pretrained(path)
    tokenizer(pad="<unk>").save_pretrained(path)
    return path


def test_scoring_with_a_model_that_has_no_head_is_an_error(encoder, folder):
    for path in (encoder, folder):
        with pytest.raises(UsageError, match="no classification head"):
            load.load_sequence_classifier(path)


def test_a_fresh_head_follows_its_seed_and_nothing_else(encoder):
    torch.manual_seed(1)
    first = load.load_sequence_classifier(encoder, from_backbone=True, device="cpu", seed=3).classifier
    torch.manual_seed(2)
    second = load.load_sequence_classifier(encoder, from_backbone=True, device="cpu", seed=3).classifier
    other = load.load_sequence_classifier(encoder, from_backbone=True, device="cpu", seed=4).classifier
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)
    assert first.weight.shape == (1, 16)
    assert 0.005 < first.weight.std() < 0.04, "drawn with standard deviation 0.02"
    assert torch.equal(first.bias, torch.zeros(1))


def test_drawing_a_head_leaves_the_global_stream_alone():
    model = torch.nn.Linear(3, 2)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load._draw(model, ["weight", "bias"], seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(model.bias, torch.zeros(2))


def test_a_saved_reward_model_loads_with_the_same_scores(encoder, tmp_path):
    model = load.load_sequence_classifier(encoder, from_backbone=True, device="cpu")
    model.save_pretrained(tmp_path)
    tokenizer(pad="<unk>").save_pretrained(tmp_path)
    again = load.load_sequence_classifier(tmp_path, device="cpu")
    with torch.no_grad():
        # Where weights lie in memory may move the last bit: kernels take another way for unaligned rows.
        torch.testing.assert_close(model(IDS).logits, again(IDS).logits, rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match="gives 1 scores a text, asked for 2"):
        load.load_sequence_classifier(tmp_path, num_labels=2)
    assert load.load_sequence_classifier(tmp_path, num_labels=2, from_backbone=True, device="cpu").classifier.weight.shape == (2, 16)


def test_a_causal_backbone_scores_at_the_last_token_that_is_not_padding(folder):
    """Padding on the right changes no score, which needs `pad_token_id` to be set."""
    model = load.load_sequence_classifier(folder, from_backbone=True, device="cpu")
    assert model.config.pad_token_id == 1
    with torch.no_grad():
        alone = model(torch.tensor([[2, 4]])).logits
        padded = model(torch.tensor([[2, 4, 1, 1]]), attention_mask=torch.tensor([[1, 1, 0, 0]])).logits
    torch.testing.assert_close(alone, padded, rtol=0, atol=1e-6)
    assert alone.abs().max() > 0


# ---- identity


def test_the_fingerprint_is_sha256_over_name_dtype_shape_and_bytes():
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
        model.bias.fill_(0.5)
    expected = hashlib.sha256(b"bias|torch.float32|(1,)|" + struct.pack("<f", 0.5))
    expected.update(b"weight|torch.float32|(1, 2)|" + struct.pack("<2f", 1.0, -2.0))
    assert weights_fingerprint(model) == expected.hexdigest()[:16]


def test_one_changed_weight_one_buffer_or_the_dtype_change_the_fingerprint():
    model = llama()
    seen = {weights_fingerprint(model)}
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-7
    seen.add(weights_fingerprint(model))
    model.model.rotary_emb.inv_freq[0] *= 2
    seen.add(weights_fingerprint(model))
    seen.add(weights_fingerprint(model.to(torch.bfloat16)))
    assert len(seen) == 4


def test_an_adapter_changes_the_whole_fingerprint_but_not_the_bases(folder, adapter):
    base = weights_fingerprint(load.load_causal(folder, device="cpu"))
    wrapped = load.load_causal(adapter, device="cpu")
    assert weights_fingerprint(wrapped) == base
    assert weights_fingerprint(wrapped, skip_adapters=False) != base


def test_modules_saved_whole_with_an_adapter_are_the_adapters(folder):
    model = load.load_causal(folder, device="cpu")
    base = weights_fingerprint(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert weights_fingerprint(wrapped) == base


# ---- assets


def test_a_conversion_that_fails_leaves_nothing_that_looks_ready(monkeypatch, tmp_path):
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path))
    monkeypatch.setattr(load.assets, "fetch", lambda name: assets.Raw(tmp_path, "tiny.gguf", "wheel"))
    monkeypatch.setattr(load, "_load", lambda kind, *_, **__: tokenizer() if kind is load.AutoTokenizer else llama())

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    good = load.write_json
    monkeypatch.setattr(load, "write_json", full)
    with pytest.raises(EquipoiseError, match="No space left"):
        load.asset_path("smollm2-135m-instruct")
    assert list((tmp_path / "models").iterdir()) == []
    monkeypatch.setattr(load, "write_json", good)
    ready = load.asset_path("smollm2-135m-instruct")
    assert (ready / "source.json").is_file()
    assert load.load_causal(ready, device="cpu").num_parameters() == llama().num_parameters()


@pytest.mark.smollm2
def test_smollm2_is_plain_float32_with_its_chat_template_and_knows_paris():
    path = load.asset_path("smollm2-135m-instruct")
    config = json.loads((path / "config.json").read_text())
    assert "quantization_config" not in config
    model = load.load_causal("smollm2-135m-instruct", device="cpu")
    assert model.num_parameters() == 134_515_008  # the model card's 135M, counted with tied embeddings
    chat = load.load_tokenizer("smollm2-135m-instruct")
    ids = chat.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    reply = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in chat.decode(reply)
    assert reply[-1] == chat.eos_token_id


@pytest.mark.smollm2
def test_minilm_puts_sentences_that_mean_the_same_closer():
    """Mean pooling, as its card says; the pairs are ours."""
    from transformers import AutoModel

    words = load.load_tokenizer("minilm-l6")
    model = AutoModel.from_pretrained(load.resolve_model("minilm-l6")).eval()
    batch = words(
        ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The central bank raised rates."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.5
    assert far < 0.2
