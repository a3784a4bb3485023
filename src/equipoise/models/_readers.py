"""Which tensors autocast rounds wherever they are read: seen once, while a model runs.

Under autocast a norm over float32 hidden states gives float32 numbers, and every projection that reads them rounds them for
itself: three times the work, and three copies kept. Where such readers are all there are, the norm may as well give 16 bits
to begin with, and every product is the same to the bit. Gemma's norms after a block feed the float32 residual instead; so this is
not decided by names, but by watching who reads what.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

# What asks about a tensor without reading its numbers.
_LOOKS = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,
    torch.Tensor.size,
    torch.Tensor.dim,
}
_verdicts: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def rounded_by_readers(owner: Any) -> bool:
    """Whether everything that read this module's (or function's) outputs would have rounded them. False where nobody watched."""
    return _verdicts.get(owner, False)


class Watch(TorchFunctionMode):
    """Sees every function that reads a noted tensor, inside its `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.verdicts: dict[Any, bool] = {}
        # By identity and weakly: nothing is kept in memory for being watched, and no other tensor inherits a dead one's name.
        self._noted = WeakIdKeyDictionary()

    def note(self, owner: Any, made: Sequence[Any]) -> None:
        """Follow what an owner made."""
        for tensor in made:
            if isinstance(tensor, torch.Tensor):
                self._noted[tensor] = owner
                self.verdicts.setdefault(owner, True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at who reads, then let it."""
        kwargs = kwargs or {}
        if func not in _LOOKS:
            for leaf in tree_leaves((args, kwargs)):
                owner = self._noted.get(leaf) if isinstance(leaf, torch.Tensor) else None  # type: ignore[no-untyped-call]
                if owner is not None and not (
                    func is torch.nn.functional.linear and leaf is args[0] and torch.is_autocast_enabled(leaf.device.type)
                ):
                    self.verdicts[owner] = False
        return func(*args, **kwargs)


@contextmanager
def watched(owners: Sequence[torch.nn.Module]) -> Iterator[Watch]:
    """Within this block it is seen who reads the outputs of these modules, and of what else is noted. Remembered if nothing fails."""
    watch = Watch()
    handles = [owner.register_forward_hook(lambda owner, _, output: watch.note(owner, [output])) for owner in owners]
    try:
        with watch:
            yield watch
    finally:
        for handle in handles:
            handle.remove()
    _verdicts.update(watch.verdicts)


@contextmanager
def unwatched() -> Iterator[None]:
    """What runs in this block is known to round what it reads, and is not looked at."""
    if isinstance(_get_current_function_mode(), Watch):  # type: ignore[no-untyped-call]
        with _pop_mode_temporarily():
            yield
    else:
        yield
