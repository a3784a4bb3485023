"""A reply's tokens as pieces of its text: as few tokens each as decode to whole characters, and nothing lost between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tokens in a row and the text they stand for.

    aside: what they say that the reply's text leaves out (its end token, a stop text, white space around it); empty where
    they have text.
    """

    text: str
    tokens: int
    aside: str = ""


def pieces(ids: Sequence[int], tokenizer: Any, text: str) -> list[Piece]:
    """The tokens of a reply in order, cut into pieces whose texts together are the reply's text.

    Tokens of a byte-level vocabulary may hold parts of a character; they are kept together until it is whole. `text` is
    what became of the decoded tokens: stripped, perhaps cut at a stop text. Where the tokens spell something else, the
    pieces together are what they spell.
    """
    whole = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    shown = text if whole.lstrip().startswith(text) else whole
    first = len(whole) - len(whole.lstrip()) if shown is text else 0
    last = first + len(shown)
    found: list[Piece] = []
    begin, at = 0, 0  # where the piece begins: in the tokens, in the whole text
    for end in range(1, len(ids) + 1):
        so_far = whole if end == len(ids) else str(tokenizer.decode(list(ids[:end]), skip_special_tokens=True))
        # U+FFFD at the end is half a character; where it is meant, its piece is a token longer than it had to be.
        if end == len(ids) or (whole.startswith(so_far) and len(so_far) >= at and not so_far.endswith("\ufffd")):
            seen = whole[max(at, first) : max(min(len(so_far), last), first, at)]
            aside = "" if seen else str(tokenizer.decode(list(ids[begin:end])))
            found.append(Piece(seen, end - begin, aside))
            begin, at = end, len(so_far)
    return found
