"""equipoise: align language models to be helpful and harmless, and know whether it worked."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("equipoise")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.0.0"
