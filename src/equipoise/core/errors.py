"""The errors people see: what was wrong, where, and what to do.

`EquipoiseError` is the only family the command line catches. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EquipoiseError(Exception):
    """Something went wrong that the user can act on. Exit code 1."""

    exit_code = 1


class UsageError(EquipoiseError):
    """A setting, a name or an option is not valid. Exit code 2."""

    exit_code = 2


class DataError(EquipoiseError):
    """Input data cannot be read. The message names file, line or row id."""


class NumericsError(EquipoiseError):
    """A loss, a log-probability or a gradient is not finite, or a self-check failed."""


class StageError(EquipoiseError):
    """A stage folder does not fit what was asked of it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the closest known name, or the whole list where none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(names)}." if names else ""
