"""From what a user names or hands over to an objective: a name with hyper-parameters, a file, a callable."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr, ValidationError

from equipoise.core import catalog
from equipoise.core.errors import UsageError
from equipoise.core.files import fingerprint
from equipoise.core.settings import explain
from equipoise.objectives._base import Losses, Needs, Objective, Scored, objective_class


def methods() -> list[str]:
    """Names of all objectives."""
    return catalog.names("objectives")


def load_class(name: str) -> type[Objective]:
    """The class of a method by name. Raises UsageError naming the nearest one."""
    return objective_class(catalog.module("objectives", name))


def build(spec: Mapping[str, Any]) -> Objective:
    """An objective from `{"name": "dpo", "beta": 0.1}`, or of the user's own: `{"name": "squared", "file": "squared.py", "tau": 0.2}`.

    Raises UsageError for unknown or out-of-range values, and what `load_class` and `class_from_file` raise.
    """
    values = dict(spec)
    name = values.pop("name", None)
    if not name:
        raise UsageError("An objective needs a name, for example objective.name=dpo.")
    file = values.pop("file", None)
    kind = class_from_file(file) if file else load_class(str(name))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UsageError(explain(error, kind, f"objective {name}", values)) from error


def class_from_file(path: str | Path) -> type[Objective]:
    """The one Objective defined in a user's Python file. The file is run: it is the user's own code, named by the user.

    Raises UsageError where there is no such file, it fails (naming the error), or it defines none or several.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} does not exist.")
    # Annotations that are text (`from __future__ import annotations`) and dataclasses look their module up by its name.
    name = f"equipoise_user_{path.stem}_{fingerprint(str(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return objective_class(module)
    except Exception as error:  # it is the user's code, and raises whatever it likes
        del sys.modules[name]
        raise UsageError(f"{path} cannot be used as an objective: {type(error).__name__}: {error}") from error


def code_fingerprint(written: Any) -> str:
    """16 hex digits of the code of a function or of an object's class, and of the plain values that belong to it.

    Code is its source text where Python has it, else what was compiled: an edited loss is another loss under the same name.
    Values are defaults, arguments of a `partial`, what a function closes over, and an object's fields; of one that is not
    plain only its type counts, so that the digits are the same in every process.
    """
    return fingerprint(_told(written))


def _told(value: Any) -> Any:
    """What a callable is, as plain data."""
    if isinstance(value, partial):
        return [_told(value.func), _plain(value.args), _plain(value.keywords)]
    if isinstance(value, MethodType):
        return [_told(value.__func__), _told(value.__self__)]
    if isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        around = {name: cell.cell_contents for name, cell in cells if cell != CellType()}  # a name may not be bound yet
        return [_plain(value), _plain(value.__defaults__), _plain(value.__kwdefaults__), _plain(around)]
    kind = type(value)
    slots = {name: getattr(value, name) for name in getattr(kind, "__slots__", ()) if hasattr(value, name)}
    return [kind.__module__, kind.__qualname__, _code(kind), _plain({**slots, **getattr(value, "__dict__", {})})]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, FunctionType):  # its code and no more: what it closes over may be itself
        return [value.__module__, value.__qualname__, _code(value)]
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _code(written: Any) -> Any:
    """Source text, or names, constants and instructions of what was compiled: of a class, of all its functions."""
    try:
        return inspect.getsource(written)
    except (OSError, TypeError):
        pass
    if isinstance(written, type):
        return {name: _code(item) for name, item in vars(written).items() if isinstance(item, FunctionType)}
    return _compiled(written.__code__)


def _compiled(code: CodeType) -> list[Any]:
    constants = [_compiled(item) if isinstance(item, CodeType) else repr(item) for item in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]


class CallableObjective(Objective):
    """A user's function `(Scored) → losses [U]` as an objective."""

    paper: ClassVar[str] = "given by the user"
    departures: ClassVar[str] = "unknown"
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")
    _function: Callable[[Scored], Losses | torch.Tensor] = PrivateAttr()

    def __call__(self, scored: Scored) -> Losses:
        """Whatever the function says. Raises UsageError unless it returns one loss per unit."""
        result = self._function(scored)
        losses = result if isinstance(result, Losses) else Losses(result)
        if losses.sum.shape != (scored.units,):
            raise UsageError(f"The loss function returned shape {tuple(losses.sum.shape)}; expected one loss per unit, [{scored.units}].")
        return losses


def from_callable(function: Callable[[Scored], Losses | torch.Tensor], needs: Needs | None = None) -> Objective:
    """Wrap a loss function. `needs` defaults to pairs with a stored reference."""
    kind = type("UserObjective", (CallableObjective,), {"needs": needs or CallableObjective.needs, "__module__": __name__})
    objective: CallableObjective = kind()
    objective._function = function
    return objective
