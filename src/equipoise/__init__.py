"""equipoise: align language models to be helpful and harmless, and know whether it worked."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("equipoise")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["Losses", "Needs", "Objective", "Scored", "TrainSettings", "__version__", "fit"]

if TYPE_CHECKING:
    from equipoise.objectives._base import Losses, Needs, Objective, Scored
    from equipoise.training.fit import fit
    from equipoise.training.settings import TrainSettings
else:
    _HOMES = dict.fromkeys(("Losses", "Needs", "Objective", "Scored"), "equipoise.objectives._base") | {
        "TrainSettings": "equipoise.training.settings",
        "fit": "equipoise.training.fit",
    }

    def __getattr__(name: str) -> Any:
        # Imported when asked for: torch takes seconds to load, and `equipoise --help` needs none of it.
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
