"""What a chat template makes of a reply."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from equipoise.core.records import Message, Record, Reply
from equipoise.data.settings import TokeniseSettings
from equipoise.data.tokenise import tokenise


@pytest.mark.parametrize("reply", ["e", "end", "|", "hello", "<|end|>\n e"])
def test_a_reply_whose_text_occurs_in_the_template_s_ending(byte_tokenizer: Any, reply: str) -> None:
    # The generation prompt is not there once a reply follows, as with templates that open the model's thinking.
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>\n{% endif", "<|assistant|>\n<think>\n{% endif")
    record = Record("r", (Message("user", "hello there"),), (Reply(reply, "chosen"), Reply("the answer", "rejected")))
    rows, accounting = tokenise([record], tokenizer, TokeniseSettings(), ("chosen", "rejected"))
    assert [tokenizer.decode(branch.ids) for branch in rows[0].branches] == [f"{reply}<|end|>", "the answer<|end|>"]
    assert [count for note, count in accounting.notes.items() if "rewrites the prompt" in note] == [2]
