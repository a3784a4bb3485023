"""What a suite is: a module that reads files into a `Source`, and may give the result its own shape."""

from __future__ import annotations

from typing import Any, Protocol, cast

from equipoise.core import catalog
from equipoise.evaluation.analysis import Source
from equipoise.evaluation.settings import EvaluateSettings

ROOM = "evaluation.suites"


class Suite(Protocol):
    """One module of this folder."""

    def inputs(self, settings: EvaluateSettings) -> dict[str, str]:
        """Name → fingerprint of every file read. Raises DataError for one that is absent."""
        ...

    def read(self, settings: EvaluateSettings) -> Source:
        """Read the files. Raises DataError naming file, line or prompt."""
        ...

    def shape(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        """The result as this suite gives it."""
        ...


def load(name: str) -> Suite:
    """A suite by name, written with `-` or `_`. Raises UsageError naming the nearest one."""
    return cast(Suite, catalog.module(ROOM, name.replace("-", "_")))


def known() -> list[str]:
    """The names of all suites, as they are written on the command line."""
    return [name.replace("_", "-") for name in catalog.names(ROOM)]
