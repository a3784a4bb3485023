"""The folder is the registry: `objectives/dpo.py` is the method `dpo`. Nothing is registered by hand."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from equipoise.core.errors import UsageError, nearest


def names(package: str) -> list[str]:
    """The things in a room: its modules without a leading underscore, sorted. `package` is like 'objectives'."""
    room = importlib.import_module(f"equipoise.{package}")
    return sorted(item.name for item in pkgutil.iter_modules(room.__path__) if not item.name.startswith("_"))


def module(package: str, name: str) -> ModuleType:
    """The module of one thing. Raises UsageError naming the nearest one."""
    known = names(package)
    if name not in known:
        raise UsageError(f"There is no {package.rsplit('.', 1)[-1]} entry named {name!r}.{nearest(name, known)}")
    return importlib.import_module(f"equipoise.{package}.{name}")
