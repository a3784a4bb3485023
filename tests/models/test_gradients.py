"""Gradients added in place are those autograd would have made, and only where nobody else waits for them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.batch import pack
from equipoise.models.gradients import gradients_in_place, grows_in_place
from equipoise.models.logps import policy_logps
from tests.tiny import FAMILIES, pairs, tiny

register()


def model_of(name: str, tied: bool, **changes: Any) -> Any:
    config = FAMILIES[name]()
    config.tie_word_embeddings = tied
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def gradients(model: Any, in_place: bool) -> dict[str, torch.Tensor]:
    """Of two micro-batches, so that there is something to add to."""
    model.zero_grad()
    with attention_of(model, NAME):
        for number in range(2):
            with gradients_in_place() if in_place else nullcontext():
                values = policy_logps(model, pack(pairs(3, seed=number)))
                (values * torch.linspace(-1, 2, values.numel()).view_as(values)).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gemma3"])
def test_the_same_gradients(name: str, tied: bool) -> None:
    model = model_of(name, tied)
    expected, found = gradients(model, False), gradients(model, True)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))


def test_autograd_makes_nothing_of_the_vocabularys_size() -> None:
    """The two weights of an untied model: hooked on their accumulators, autograd has nothing to hand over."""
    model = model_of("llama", tied=False)
    seen: list[str] = []
    handles = []
    for name, weight in model.named_parameters():
        accumulator = weight.view_as(weight).grad_fn.next_functions[0][0]
        handles.append(
            (accumulator, accumulator.register_prehook(lambda given, name=name: seen.append(name) if given[0] is not None else None))
        )
    gradients(model, False)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(seen)
    seen.clear()
    gradients(model, True)
    assert "model.layers.0.mlp.up_proj.weight" in seen
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & set(seen)


def test_the_padding_id_gets_no_gradient() -> None:
    model = model_of("llama", tied=False, pad_token_id=int(pairs(1)[0].prompt[0]))
    ignored = model.get_input_embeddings().padding_idx
    assert ignored is not None
    expected, found = gradients(model, False), gradients(model, True)
    assert expected["model.embed_tokens.weight"][ignored].abs().max() == 0
    assert found["model.embed_tokens.weight"][ignored].abs().max() == 0


def test_only_inside_the_block_and_only_where_nobody_watches() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    assert not grows_in_place(weight)
    with gradients_in_place():
        assert grows_in_place(weight)
        assert not grows_in_place(weight * 1)
        assert not grows_in_place(torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16)))
        assert not grows_in_place(torch.nn.Parameter(torch.zeros(3, 2), requires_grad=False))
        handle = weight.register_post_accumulate_grad_hook(lambda _: None)
        assert not grows_in_place(weight)
        handle.remove()
        weight.register_hook(lambda gradient: gradient)
        assert not grows_in_place(weight)
    assert not grows_in_place(torch.nn.Parameter(torch.zeros(3, 2)))


def test_a_hook_on_the_weight_still_sees_its_gradient() -> None:
    model = tiny().train()
    seen: list[torch.Tensor] = []
    model.get_input_embeddings().weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    found = gradients(model, True)
    torch.testing.assert_close(seen[0] + seen[1], found["model.embed_tokens.weight"])
