"""Settings: frozen pydantic models, filled from YAML and `--set a.b=c`, strict about every key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from equipoise.core.errors import UsageError, nearest


class Settings(BaseModel):
    """Base of every settings model: immutable, no unknown keys, defaults validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    @classmethod
    def make(cls, values: Mapping[str, Any] | None = None, overrides: Iterable[str] = (), source: str = "") -> Self:
        """Build from a mapping plus `a.b=c` overrides. Raises UsageError naming the key and the nearest known one."""
        merged = apply_overrides(dict(values or {}), overrides)
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise UsageError(explain(error, cls, source)) from error
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


def explain(error: ValidationError, model: type[BaseModel], source: str = "") -> str:
    """One line per problem: where, what was found, what would be right."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _fields_at(model, problem["loc"][:-1])
            lines.append(f"Unknown setting {where!r}.{nearest(str(problem['loc'][-1]), known)}")
        else:
            found = "" if problem["type"] == "missing" else f" (found {problem['input']!r})"
            lines.append(f"{where or 'settings'}: {problem['msg']}{found}.")
    prefix = f"{source}: " if source else ""
    return prefix + "\n".join(lines)


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Field names of the settings model nested at `location`, looking through tuples, lists, dicts and unions."""
    current: Any = model
    for part in location:
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            return []
        field = current.model_fields.get(str(part))
        if field is None:
            continue  # an index or a key inside a container: the model is already the item's
        current = _model_in(field.annotation)
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(item) for item in value]
    return value
