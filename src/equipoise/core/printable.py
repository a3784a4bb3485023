"""Foreign text made harmless to show: what steers a terminal, or cannot be encoded, becomes U+FFFD."""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """The text with control characters (an escape clears the screen or writes to the clipboard) and lone surrogates replaced."""
    return _UNPRINTABLE.sub("\ufffd", text)
