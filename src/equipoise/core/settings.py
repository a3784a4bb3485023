"""Settings: frozen pydantic models, filled from YAML and `--set a.b=c`, strict about every key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from equipoise.core.errors import UsageError, nearest

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass as _Meta
else:
    _Meta = type(BaseModel)  # which has no public name

CLOSE = 0.85
"""From this likeness a key of another place is taken for the one that was meant."""


class _Made(_Meta):
    """Makes what is wrong in a call from Python as readable as what is wrong in a file."""

    def __call__(self, *given: Any, **values: Any) -> Any:
        try:
            return super().__call__(*given, **values)
        except ValidationError as error:
            raise UsageError(explain(error, cast("type[BaseModel]", self), values=values)) from error


class Settings(BaseModel, metaclass=_Made):
    """Base of every settings model: immutable, no unknown keys, defaults validated.

    HINTS: what to say of keys that people know from elsewhere and no rule can find here.
    """

    HINTS: ClassVar[Mapping[str, str]] = {}
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    @classmethod
    def make(cls, values: Mapping[str, Any] | None = None, overrides: Iterable[str] = (), source: str = "") -> Self:
        """Build from a mapping plus `a.b=c` overrides. Raises UsageError naming the key and the nearest known one."""
        merged = apply_overrides(dict(values or {}), overrides)
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise UsageError(explain(error, cls, source, merged)) from error
        except UsageError as error:  # a validator that looks at several settings names the place itself, but not the file
            raise UsageError(f"{source}: {error}" if source else str(error)) from error

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Build from a YAML file plus overrides."""
        return cls.make(read_yaml(path), overrides, str(path))

    def resolved(self) -> dict[str, Any]:
        """Every setting with its value, as plain JSON data."""
        return self.model_dump(mode="json")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping (data only). Raises UsageError with file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)}).") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected settings as `key: value`, found a {type(value).__name__}.")
    return value


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `a.b=c` overrides to a copy of nested mappings; the value is read as YAML; a number indexes a list."""
    result: dict[str, Any] = _copy(values)
    for item in overrides:
        path, separator, text = item.partition("=")
        if not separator or not path.strip():
            raise UsageError(f"--set {item!r}: write it as key=value, for example --set training.learning_rate=1e-5.")
        keys = path.strip().split(".")
        try:
            value = number(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise UsageError(f"--set {item!r}: the value is not valid YAML.") from error
        node: Any = result
        for depth, key in enumerate(keys):
            last = depth == len(keys) - 1
            if isinstance(node, list):
                try:
                    index = int(key)
                    node[index]
                except (ValueError, IndexError) as error:
                    where = ".".join(keys[:depth])
                    raise UsageError(f"--set {item!r}: {where} is a list of {len(node)}; no item {key!r}.") from error
                if last:
                    node[index] = value
                else:
                    node = node[index]
                continue
            if not isinstance(node, dict):
                raise UsageError(f"--set {item!r}: {'.'.join(keys[:depth])} is a value and has no {key!r}.")
            if last:
                node[key] = value
            else:
                if not isinstance(node.get(key), (dict, list)):
                    node[key] = {}
                node = node[key]
    return result


def number(value: Any) -> Any:
    """YAML reads 1e-5 as text (it wants 1.0e-5); people mean the number."""
    if isinstance(value, str):
        try:
            return float(value) if any(sign in value for sign in "eE.") and value[:1] in "0123456789+-." else value
        except ValueError:
            return value
    return value


def explain(error: ValidationError, model: type[BaseModel], source: str = "", values: Any = None) -> str:
    """One line per problem: where, what was found, what would be right. values: what was validated."""
    problems: dict[tuple[Any, ...], list[Any]] = {}
    for problem in error.errors():
        problems.setdefault(_keys(problem, values), []).append(problem)
    lines = []
    for keys, same in problems.items():
        if any(len(deeper) > len(keys) and deeper[: len(keys)] == keys for deeper in problems):
            continue  # the tuple of which no item was left, or the other kinds of value that could stand here
        where = ".".join(map(str, keys))
        if same[0]["type"] == "extra_forbidden":
            lines.append(f"Unknown setting {where!r}.{_meant(str(keys[-1]), model, keys[:-1])}")
        else:
            # One kind of value that could stand here was right and its content was not: the other kinds are not of interest.
            same = [problem for problem in same if not problem["type"].endswith("_type")] or same
            found = "" if same[0]["type"] == "missing" else f" (found {same[0]['input']!r})"
            said = ", or ".join(dict.fromkeys(problem["msg"].removeprefix("Value error, ") for problem in same))
            lines.append(f"{where or 'settings'}: {said}{found}.")
    prefix = f"{source}: " if source else ""
    return prefix + "\n".join(lines)


def _keys(problem: Any, values: Any) -> tuple[Any, ...]:
    """Where a problem is, in keys: pydantic puts the names of types between them where a value may be of several kinds."""
    keys, node = [], values
    for depth, part in enumerate(problem["loc"], 1):
        if isinstance(part, int) or (isinstance(node, Mapping) and part in node):
            node = node[part] if isinstance(node, (Mapping, list, tuple)) else None
            keys.append(part)
        elif depth == 1 or (problem["type"] == "missing" and depth == len(problem["loc"])):
            keys.append(part)
    return tuple(keys)


def _meant(name: str, model: type[BaseModel], location: tuple[Any, ...]) -> str:
    """What an unknown key probably stands for: what the model says of it, a key of another place, or the nearest of this one."""
    hints: Mapping[str, str] = getattr(model, "HINTS", {})
    if name in hints:
        return f" {hints[name]}"
    known = _fields_at(model, location)
    elsewhere = _paths(model)
    close = [*difflib.get_close_matches(name, known, 1, CLOSE), *difflib.get_close_matches(name, elsewhere, 1, CLOSE)]
    if close and close[0] not in known:
        return f" Did you mean {elsewhere[close[0]]!r}?"
    return nearest(name, known)


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Field names of the settings model nested at `location`, looking through tuples, lists, dicts and unions."""
    current: type[BaseModel] | None = model
    for part in location:
        if current is None:
            return []
        field = current.model_fields.get(str(part))
        if field is None:
            continue  # an index or a key inside a container: the model is already the item's
        current = _model_in(field.annotation)[0]
    return [] if current is None else list(current.model_fields)


def _paths(model: type[BaseModel]) -> dict[str, str]:
    """Every setting's name, of nested models too, and its shortest path: `max_length` → `tokenise.max_length`."""
    found: dict[str, str] = {}
    level, seen = [("", model)], {model}
    while level:
        below = []
        for prefix, kind in level:
            for name, field in kind.model_fields.items():
                found.setdefault(name, prefix + name)
                inner, step = _model_in(field.annotation)
                if inner is not None and inner not in seen:
                    seen.add(inner)
                    below.append((f"{prefix}{name}.{step}", inner))
        level = below
    return found


def _model_in(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The settings model inside an annotation, and the keys that lead to the first one: `0.` in a tuple, `NAME.` in a dict."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    step = {tuple: "0.", list: "0.", dict: "NAME."}.get(get_origin(annotation), "")
    for argument in get_args(annotation):
        found, inner = _model_in(argument)
        if found is not None:
            return found, step + inner
    return None, ""


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(item) for item in value]
    return value
