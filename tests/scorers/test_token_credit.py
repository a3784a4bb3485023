"""Token credit: pieces that rejoin to the text, credits against plain forwards, and the file beside the verdicts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from equipoise.core.files import read_jsonl, write_jsonl
from equipoise.core.records import Message
from equipoise.generation._base import Completion
from equipoise.scorers import ScoreSettings, score
from equipoise.scorers._pieces import Piece, pieces
from equipoise.scorers._ratios import LogRatios
from equipoise.scorers.implicit import ImplicitReward
from equipoise.scorers.token_credit import TokenCredit

TEXTS = [
    "plain words, and more.",
    "你好，世界",
    "a 👩‍🚒 and 🙂!",
    "naïve café \u2028 e\u0301",
    '<script>alert(1)</script> & "quotes"',
    "tabs\tand\n\nlines",
    "a real \ufffd in it",
    "مرحبا",
    "",
]


def joined(found: list[Piece]) -> str:
    return "".join(piece.text for piece in found)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_rejoin_to_the_text_and_split_no_character(byte_tokenizer, text):
    """One token a byte: every character beyond ASCII is spread over several tokens."""
    ids = [*byte_tokenizer(f" \n{text} ")["input_ids"], 256]
    found = pieces(ids, byte_tokenizer, text)
    assert joined(found) == text
    assert sum(piece.tokens for piece in found) == len(ids)
    assert all("\ufffd" not in piece.text for piece in found) or "\ufffd" in text
    assert found[0] == Piece("", 1, " ")
    assert found[-1] == Piece("", 1, "</s>")
    assert all(bool(piece.text) != bool(piece.aside) for piece in found)
    if "\ufffd" not in text:
        assert [piece.text for piece in found if piece.text] == list(text)


def test_what_the_reply_leaves_out_stands_aside(byte_tokenizer):
    ids = byte_tokenizer("Yes.\n\nHuman: and")["input_ids"]
    found = pieces(ids, byte_tokenizer, "Yes.")
    assert joined(found) == "Yes."
    assert "".join(piece.aside for piece in found) == "\n\nHuman: and"
    # A reply cut off in the middle of a character keeps what it has; a text changed after it was written gives way to the tokens.
    (*_, last) = pieces(byte_tokenizer("a🙂")["input_ids"][:3], byte_tokenizer, "a\ufffd")
    assert (last.text, last.tokens) == ("\ufffd", 2)
    assert joined(pieces(byte_tokenizer("left")["input_ids"], byte_tokenizer, "right")) == "left"


def test_words_keep_the_space_in_front_that_a_tokenizer_drops_from_single_tokens():
    """Llama 2's decoder takes the first space away, so a word decoded alone has lost its own."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "▁Yes": 1, "▁please": 2, ",": 3}, unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert tokenizer.decode([2]) == "please"
    assert [piece.text for piece in pieces([1, 3, 2], tokenizer, "Yes, please")] == ["Yes", ",", " please"]


def logps(model, tokenizer, completion):
    """Log-probs token by token, from one forward per position."""
    ids, found = tokenizer(f"\n\nHuman: {completion.prompt[0].content}\n\nAssistant:")["input_ids"], []
    for token in completion.token_ids:
        with torch.no_grad():
            found.append(torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)[token].item())
        ids = [*ids, token]
    return found


@pytest.fixture
def written(byte_tokenizer) -> list[Completion]:
    prompt = (Message("user", "bread ?"),)
    texts = ["yes", "好 🙂"]
    return [Completion(f"w{number}", prompt, text, (*byte_tokenizer(f" {text}")["input_ids"], 256)) for number, text in enumerate(texts)]


def test_credits_are_those_of_plain_forwards(policy, base, byte_tokenizer, written):
    ratios = LogRatios(policy, base, byte_tokenizer)
    found = TokenCredit(ratios, beta=0.25)(written)
    implicit = ImplicitReward(ratios, beta=0.25)(written)
    assert [verdict.value for verdict in found] == pytest.approx([verdict.value for verdict in implicit], abs=1e-6)
    for verdict, item in zip(found, written, strict=True):
        ours, theirs = logps(policy, byte_tokenizer, item), logps(base, byte_tokenizer, item)
        at = 0
        for piece in verdict.detail["pieces"]:
            span = slice(at, at + piece["tokens"])
            assert piece["policy"] == pytest.approx(sum(ours[span]), abs=1e-4)
            assert piece["base"] == pytest.approx(sum(theirs[span]), abs=1e-4)
            assert piece["credit"] == pytest.approx(0.25 * (piece["policy"] - piece["base"]), abs=1e-12)
            at += piece["tokens"]
        assert at == len(item.token_ids) == verdict.detail["tokens"]
        assert sum(piece["credit"] for piece in verdict.detail["pieces"]) == pytest.approx(verdict.value, abs=1e-9)
        assert "".join(piece["text"] for piece in verdict.detail["pieces"]) == item.text
    # A space, the Chinese character's three bytes, a space, the emoji's four, the end.
    assert [piece["tokens"] for piece in found[1].detail["pieces"]] == [1, 3, 1, 4, 1]


def test_rewards_of_the_logits_telescope_over_the_pieces(policy, base, byte_tokenizer, written):
    (verdict, _) = TokenCredit(LogRatios(policy, base, byte_tokenizer), beta=0.25, values=True)(written)
    ids = byte_tokenizer("\n\nHuman: bread ?\n\nAssistant:")["input_ids"]
    with torch.no_grad():
        start = torch.logsumexp(policy(torch.tensor([ids])).logits[0, -1].double(), -1).item()
    rewards = sum(piece["reward"] for piece in verdict.detail["pieces"])
    assert rewards == pytest.approx(0.25 * sum(piece["policy"] for piece in verdict.detail["pieces"]) + 0.25 * start, abs=1e-4)


def test_replies_without_tokens_are_read_as_text_or_say_why_not(policy, base, byte_tokenizer, written):
    bare = replace(written[0], token_ids=())
    (never,) = TokenCredit(LogRatios(policy, base, byte_tokenizer))([bare])
    assert (never.value, never.reason, never.detail) == (None, "no token ids", None)
    (missing,) = TokenCredit(LogRatios(policy, base, byte_tokenizer, text="missing"))([bare])
    assert "".join(piece["text"] for piece in missing.detail["pieces"]) == "yes"


def test_the_stage_keeps_tokens_in_a_file_of_their_own(policy, base, byte_tokenizer, written, tmp_path):
    for name, model in (("policy", policy), ("base", base)):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer.save_pretrained(tmp_path / name)
    write_jsonl(tmp_path / "completions.jsonl", (item.as_json() for item in written))
    pair = {"model_name_or_path": str(tmp_path / "policy"), "base_model_name_or_path": str(tmp_path / "base"), "device": "cpu"}
    scorers = ["length", {"scorer": "token_credit", **pair, "ids": ["w1"]}, {"scorer": "implicit", **pair}]
    values = {"completions": str(tmp_path / "completions.jsonl"), "scorers": scorers, "output_dir": str(tmp_path / "run")}
    run = score(ScoreSettings.make(values))
    rows = read_jsonl(run.folder / "verdicts.jsonl")
    assert [(row["id"], row["by"]) for row in rows] == [
        ("w0", "length"),
        ("w1", "length"),
        ("w1", "token_credit"),
        ("w0", "implicit"),
        ("w1", "implicit"),
    ]
    assert not any("detail" in row for row in rows)
    (line,) = read_jsonl(run.folder / "token_credit.jsonl")
    assert list(line) == ["id", "beta", "credit", "tokens", "pieces"]
    assert line["credit"] == pytest.approx(rows[4]["value"], abs=1e-6)
    assert line["pieces"][-1]["aside"] == "</s>"
