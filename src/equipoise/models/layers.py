"""RMSNorm, gated MLP and LoRA layers that keep less for the backward pass: the same numbers forward, a third less memory a token.

Autograd keeps every factor of `weight * (x * rstd)` and of `down(silu(gate) * up)`. Ours keep what cannot be had again for
the price of a multiplication: x and one number a row of a norm, gate and up of an MLP. The product that `down_proj` reads
is made again when its backward asks for it, whatever kind of layer that is (plain, LoRA, quantised).

A family's layers are replaced by what they compute, not by their names: the family's own forward, run on small random
weights, must give the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import _disable_current_modes

from equipoise.models._elementwise import EAGER, Kernels, computing_with
from equipoise.models._lora import is_lora, lora, lora_trial
from equipoise.models._readers import rounded_by_readers, watched
from equipoise.models._rotary import lean_rotations, noted_rotations
from equipoise.models.gradients import replaced_forward

Tensor = torch.Tensor
_MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")
_EPSILONS = ("variance_epsilon", "eps")


@contextmanager
def lean_layers(model: Any, kernels: Kernels = EAGER) -> Iterator[None]:
    """Within this block the layers that ours can stand in for are ours. The backward pass belongs into it as well.

    kernels: what they and the head compute with (`_elementwise.compiled`, or one operation after the other).

    Under activation checkpointing layers run again in the backward pass, and there is nothing left that could be kept: the
    product in front of `down_proj` is left to it then.
    """
    modules = list(model.modules())
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in modules)
    with ExitStack() as stack:
        stack.enter_context(computing_with(kernels))
        stack.enter_context(lean_rotations(model, kernels))
        for module in modules:
            forward = _stand_in(module, kernels, keep_product=checkpointed)
            if forward is not None:
                stack.enter_context(replaced_forward(module, forward))
        yield


def rounded_once(model: Any, device: torch.device) -> AbstractContextManager[Any]:
    """Within this block autocast rounds a trained weight to 16 bits once, not in every forward pass. Weights must not change in it.

    Autocast keeps what it has rounded until the outermost of its blocks ends. This is one around them all, itself switched off, so
    that what runs outside a forward pass computes as ever. Not for weights that FSDP2 puts together only while a layer runs.
    """
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    if sharded or not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextmanager
def watching(model: Any) -> Iterator[None]:
    """Within this block a forward pass finds out which norms and rotations may give 16 bits under autocast (`_readers`)."""
    norms = [module for module in model.modules() if _epsilon(module) is not None]
    with watched(norms) as watch, noted_rotations(model, watch):
        yield


class RMSNorm(torch.autograd.Function):
    """weight · (x / √(mean x² + ε)), the mean over the last dimension."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype | None, kernels: Kernels) -> Tensor:
        """hidden [..., H], weight [H] → [..., H], in `dtype` where given."""
        output, scale = kernels.norm(hidden, weight, epsilon, dtype)
        ctx.save_for_backward(hidden, weight, scale)
        ctx.kernels = kernels
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """∂/∂hidden and ∂/∂weight."""
        to_hidden, to_weight = ctx.kernels.norm_backward(gradients[0], *ctx.saved_tensors, ctx.needs_input_grad[1])
        return to_hidden, to_weight, None, None, None


class GatedProduct(torch.autograd.Function):
    """silu(gate) · up."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, up: Tensor, kernels: Kernels) -> Tensor:
        """Both [..., F] → [..., F]."""
        ctx.save_for_backward(gates, up)
        ctx.kernels = kernels
        return kernels.gate(gates, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """∂/∂gate and ∂/∂up."""
        return *ctx.kernels.gate_backward(gradients[0], *ctx.saved_tensors), None


def _stand_in(module: torch.nn.Module, kernels: Kernels, keep_product: bool) -> Callable[..., Tensor] | None:
    """The forward that can take a layer's place; None where there is none, or where somebody else put one there."""
    if "forward" in vars(module):
        return None
    if is_lora(module):
        return partial(lora, module) if _agrees(module, lora_trial, _close) else None
    epsilon = _epsilon(module)
    if epsilon is not None:
        return partial(_norm, module, epsilon, kernels) if _agrees(module, _norm_trial) else None
    if set(module._modules) == set(_MLP) and not module._parameters:
        return partial(_gated, module, kernels, keep_product) if _agrees(module, _gated_trial) else None
    return None


def _norm(module: Any, epsilon: float, kernels: Kernels, hidden: Tensor) -> Tensor:
    if hidden.dtype == torch.float64:  # families compute in float32 whatever they are given; leave that to them
        return type(module).forward(module, hidden)
    kind = hidden.device.type
    narrow = torch.is_autocast_enabled(kind) and rounded_by_readers(module)
    dtype = torch.get_autocast_dtype(kind) if narrow else None
    return RMSNorm.apply(hidden, module.weight, epsilon, dtype, kernels)  # type: ignore[no-untyped-call]


def _gated(module: Any, kernels: Kernels, keep_product: bool, hidden: Tensor) -> Tensor:
    gates, up = module.gate_proj(hidden), module.up_proj(hidden)
    product = GatedProduct.apply(gates, up, kernels)  # type: ignore[no-untyped-call]
    if keep_product:
        return module.down_proj(product)
    gates, up, storage, size = gates.detach(), up.detach(), product.untyped_storage()._cdata, product.numel()

    def pack(saved: Tensor) -> Tensor | torch.Size:
        same = saved.untyped_storage()._cdata == storage and saved.is_contiguous() and saved.numel() == size
        return saved.shape if same else saved

    def unpack(saved: Tensor | torch.Size) -> Tensor:
        return saved if isinstance(saved, Tensor) else kernels.gate(gates, up).view(saved)

    with saved_tensors_hooks(pack, unpack):
        return module.down_proj(product)


def _epsilon(module: Any) -> float | None:
    """The ε of a module that has one, and one weight, and nothing else."""
    if set(module._parameters) != {"weight"} or module._modules or getattr(module.weight, "ndim", 0) != 1:
        return None
    found = [value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)]
    return found[0] if len(found) == 1 else None


_known: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()
Trial = tuple[Any, Tensor, Callable[[Tensor], Tensor]]


def _same(expected: Any, found: Tensor) -> bool:
    return isinstance(expected, Tensor) and expected.dtype == found.dtype and torch.equal(expected, found)


def _close(expected: Any, found: Tensor) -> bool:
    return torch.allclose(expected, found, rtol=1e-5, atol=1e-6)


def _agrees(module: torch.nn.Module, trials: Callable[[torch.nn.Module], list[Trial]], same: Callable[[Any, Tensor], bool] = _same) -> bool:
    """Whether a layer's own forward gives the numbers of ours on small random weights; one that cannot be run does not.

    same: what counts as agreement: the same bits and dtype, or close numbers.
    """
    if module not in _known:
        with _disable_current_modes(), torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
            torch.manual_seed(0)
            try:
                _known[module] = all(same(type(module).forward(small, hidden), ours(hidden)) for small, hidden, ours in trials(module))
            except Exception:  # a family's layer may want anything else; it is left alone then
                _known[module] = False
    return _known[module]


def _norm_trial(module: torch.nn.Module) -> list[Trial]:
    """Weights and hidden states of one dtype, and as under autocast, of two."""
    made: list[Trial] = []
    for weights, hidden in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        small = _with_parts(module, {"weight": torch.nn.Parameter(torch.randn(8).to(weights))}, {})
        made.append((small, torch.randn(3, 8).to(hidden), partial(_norm, small, _epsilon(module) or 0.0, EAGER)))
    return made


def _gated_trial(module: torch.nn.Module) -> list[Trial]:
    parts = {name: torch.nn.Linear(*((6, 4) if name == "down_proj" else (4, 6))) for name in _MLP[:3]}
    small = _with_parts(module, {}, {**parts, "act_fn": module.act_fn})
    return [(small, torch.randn(3, 4), partial(_gated, small, EAGER, True))]


def _with_parts(module: torch.nn.Module, parameters: dict[str, Any], children: dict[str, Any]) -> Any:
    """The same module with other weights: its class and settings without its size."""
    trial = copy.copy(module)
    trial._parameters, trial._modules = parameters, children
    return trial
