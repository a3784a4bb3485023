"""What the text generators share: the tokens that end a reply, stop texts, the fingerprint of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from equipoise.core.files import file_fingerprint
from equipoise.data.settings import TokeniseSettings
from equipoise.data.transcripts import style_of

PLAIN_STOP = ("\n\nHuman:",)
"""What ends a reply of a model without a chat template: it starts to write the next human turn."""


def stop_texts(asked: Sequence[str] | None, tokenizer: Any, settings: TokeniseSettings) -> tuple[str, ...]:
    """The stop texts asked for; where nothing was said, `PLAIN_STOP` for plain transcripts and none with a chat template."""
    if asked is not None:
        return tuple(asked)
    return PLAIN_STOP if style_of(tokenizer, settings) == "plain" else ()


def end_ids(model: Any, tokenizer: Any, settings: TokeniseSettings) -> frozenset[int]:
    """Every id that ends a reply: end of sequence of generation config, config and tokenizer (one or several), end of a chat turn."""
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(owner, "eos_token_id", None)
        found.update(value if isinstance(value, (list, tuple)) else () if value is None else (value,))
    if style_of(tokenizer, settings) == "chat":
        found.update(turn_end(tokenizer))
    return frozenset(int(item) for item in found)


def turn_end(tokenizer: Any) -> tuple[int, ...]:
    """The special token that the chat template puts after an assistant turn (`<|im_end|>`, `<|eot_id|>`, …), if one can be told."""
    mark = "equipoise"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    try:
        after = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(mark)[2].lstrip()
    except Exception:  # a template raises whatever it likes, such as for a conversation without a system turn
        return ()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    return (ids[0],) if ids and ids[0] in set(tokenizer.added_tokens_decoder) else ()


def cut_at_stop(text: str, stops: Iterable[str]) -> str:
    """The text up to the first stop text."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def model_inputs(label: str, name: str) -> dict[str, str]:
    """Fingerprint of a model's files (an adapter's base too), or its name where it comes from the hub."""
    from equipoise.models.load import base_of, is_adapter, resolve_model

    resolved = resolve_model(name)
    if not Path(resolved).is_dir():
        return {label: f"hub {resolved}"}
    base = model_inputs(f"{label} base", base_of(resolved)) if is_adapter(resolved) else {}
    return {label: file_fingerprint(resolved), **base}
