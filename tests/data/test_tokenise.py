"""Token rows counted by hand: boundaries, ends, truncation, the roles of every method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from equipoise.core.errors import DataError, UsageError
from equipoise.core.records import Message, Record, Reply
from equipoise.data.accounting import Accounting
from equipoise.data.rows import TokenRow, TokenRows
from equipoise.data.settings import TokeniseSettings
from equipoise.data.tokenise import prompt_ids, prompts_ids, tokenise

Make = Callable[..., Any]
PAIR = ("chosen", "rejected")


def words(start: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(start, start + count))


def record(prompt: str | tuple[Message, ...], *replies: Reply, name: str = "r") -> Record:
    return Record(name, (Message("user", prompt),) if isinstance(prompt, str) else prompt, replies)


def pair(prompt: str | tuple[Message, ...], chosen: str, rejected: str, name: str = "r") -> Record:
    return record(prompt, Reply(chosen, "chosen"), Reply(rejected, "rejected"), name=name)


def one(tokenizer: Any, row: Record, roles: tuple[str, ...] = PAIR, **settings: Any) -> tuple[TokenRow, Accounting]:
    rows, accounting = tokenise([row], tokenizer, TokeniseSettings(**settings), roles)
    assert len(rows) == 1, accounting.in_words()
    return rows[0], accounting


def shown(tokenizer: Any, ids: Any) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(np.asarray(ids).tolist()))


def turns(*contents: str) -> tuple[Message, ...]:
    return tuple(Message("user" if at % 2 == 0 else "assistant", content) for at, content in enumerate(contents))


# ---- styles


def test_a_chat_row_is_the_template_cut_where_the_reply_begins(word_tokenizer: Make) -> None:
    tokenizer = word_tokenizer()
    row, accounting = one(tokenizer, pair("w1 w2", "w3", "w4 w5"))
    assert shown(tokenizer, row.prompt) == "<|user|> w1 w2 <|end|> <|assistant|>"
    # The newline after <|end|> is not learned: generation stops before it.
    assert [shown(tokenizer, branch.ids) for branch in row.branches] == ["w3 <|end|>", "w4 w5 <|end|>"]
    assert all(branch.marks["learn"].all() for branch in row.branches)
    assert accounting.eos_lost == 0
    assert accounting.notes == {}
    system, _ = one(tokenizer, pair("w1", "w3", "w4"), system_prompt="sys")
    assert shown(tokenizer, system.prompt) == "<|system|> sys <|end|> <|user|> w1 <|end|> <|assistant|>"
    own, _ = one(tokenizer, pair((Message("system", "w9"), Message("user", "w1")), "w3", "w4"), system_prompt="sys")
    assert shown(tokenizer, own.prompt) == "<|system|> w9 <|end|> <|user|> w1 <|end|> <|assistant|>"


def test_template_arguments_reach_the_template(word_tokenizer: Make) -> None:
    tokenizer = word_tokenizer("{% if flavour %}{{ flavour }} {% endif %}" + word_tokenizer().chat_template)
    row, _ = one(tokenizer, pair("w1", "w3", "w4"), chat_template_kwargs={"flavour": "w50"})
    assert shown(tokenizer, row.prompt) == "w50 <|user|> w1 <|end|> <|assistant|>"


def test_plain_rows_for_models_without_a_template(word_tokenizer: Make) -> None:
    tokenizer = word_tokenizer(template=None, bos=True, eos="</s>")
    conversation = turns("w1", "w2", "w3")
    row, _ = one(tokenizer, pair(conversation, "w4\n\nw5", "w6"))
    assert shown(tokenizer, row.prompt) == "<s> Human: w1 Assistant: w2 Human: w3 Assistant:"
    assert [shown(tokenizer, branch.ids) for branch in row.branches] == ["w4 w5 </s>", "w6 </s>"]
    bare, _ = one(tokenizer, pair(conversation, "w4", "w6"), reply_cue=False)
    assert shown(tokenizer, bare.prompt) == "<s> Human: w1 Assistant: w2 Human: w3"
    assert shown(tokenizer, bare.branches[0].ids) == "Assistant: w4 </s>"
    ended, _ = one(tokenizer, pair("w1", "w4 </s>", "w6"))
    assert shown(tokenizer, ended.branches[0].ids) == "w4 </s>", "an end written in the data is not doubled"
    with pytest.raises(DataError, match="no end-of-sequence token"):
        one(word_tokenizer(template=None, eos=None), pair("w1", "w4", "w6"))


def test_pairs_for_encoders(word_tokenizer: Make) -> None:
    tokenizer = word_tokenizer(encoder=True)
    row, _ = one(tokenizer, pair("w1 w2", "w3", "w4"))
    assert shown(tokenizer, row.prompt) == "[CLS] w1 w2 [SEP]"
    assert shown(tokenizer, row.branches[0].ids) == "w3 [SEP]"
    assert tokenizer("w1 w2", "w3")["input_ids"] == [*row.prompt, *row.branches[0].ids]
    longer, _ = one(tokenizer, pair(turns("w1", "w2", "w3"), "w4", "w5"))
    assert shown(tokenizer, longer.prompt) == "[CLS] Human: w1 Assistant: w2 Human: w3 [SEP]"
    with pytest.raises(DataError, match="no chat template"):
        one(tokenizer, pair("w1", "w3", "w4"), transcript="chat")


def test_no_bos_is_doubled_and_the_template_decides(word_tokenizer: Make) -> None:
    tokenizer = word_tokenizer("<s>" + word_tokenizer().chat_template, bos=True)
    row, _ = one(tokenizer, pair("w1", "w3", "w4"))
    assert shown(tokenizer, row.prompt) == "<s> <|user|> w1 <|end|> <|assistant|>"


# ---- boundaries


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_both_sides_and_generation_share_the_prompt_to_the_last_token(byte_tokenizer: Any, style: str) -> None:
    settings = TokeniseSettings(transcript=style)  # type: ignore[arg-type]
    replies = ["hello you", "\nhello", " how", "naïve 🙂", "\n\n"]
    conversation = turns("hello there\n", "how are you?", "東京?")
    rows = [pair(conversation, f"{reply}x", f"{reply}y", name=str(at)) for at, reply in enumerate(replies)]
    made, _ = tokenise(rows, byte_tokenizer, settings, PAIR)
    expected = prompt_ids(conversation, byte_tokenizer, settings)
    for row, reply in zip(made, replies, strict=True):
        assert row.prompt.tolist() == expected.tolist()
        text = byte_tokenizer.decode(row.branches[0].ids)
        assert text == (f"{reply}x<|end|>" if style == "chat" else f" {(reply + 'x').strip()}<|end|>")
    prompt_text = byte_tokenizer.decode(expected)
    if style == "chat":
        dicts = [turn.as_dict() for turn in conversation]
        assert expected.tolist() == byte_tokenizer.apply_chat_template(dicts, add_generation_prompt=True, return_dict=False)
    else:
        assert prompt_text == "\n\nHuman: hello there\n\nAssistant: how are you?\n\nHuman: 東京?\n\nAssistant:"


def test_no_space_sneaks_in_where_a_reply_begins(metaspace_tokenizer: Any) -> None:
    def first_token(text: str) -> str:
        return metaspace_tokenizer.convert_ids_to_tokens(metaspace_tokenizer(text, add_special_tokens=False)["input_ids"])[0]

    assert first_token("abc") == "▁abc"
    row, _ = one(metaspace_tokenizer, pair("def", "abc", "\nabc"))
    assert shown(metaspace_tokenizer, row.branches[0].ids).replace(" ", "") == "abc</s>"
    assert metaspace_tokenizer.decode([*row.prompt, *row.branches[0].ids]) == "def\nabc</s>"
    plain, _ = one(metaspace_tokenizer, pair("def", "abc", "ghi"), transcript="plain")
    assert metaspace_tokenizer.decode([*plain.prompt, *plain.branches[0].ids]) == "\n\nHuman: def\n\nAssistant: abc</s>"


def test_a_template_that_rewrites_its_prompt_is_noted(word_tokenizer: Make) -> None:
    # Once a reply follows, this template drops the first turn: the whole text does not begin with the prompt's.
    template = word_tokenizer().chat_template.replace(
        "{% for message in messages %}", "{% for message in messages[(messages|length) // 4:] %}"
    )
    tokenizer = word_tokenizer(template)
    row, accounting = one(tokenizer, pair(turns("w1", "w2", "w3"), "w4", "w5"))
    assert shown(tokenizer, row.prompt) == "<|user|> w1 <|end|> <|assistant|> w2 <|end|> <|user|> w3 <|end|> <|assistant|>"
    assert shown(tokenizer, row.branches[0].ids) == "w4 <|end|>"
    assert [count for note, count in accounting.notes.items() if "rewrites the prompt" in note] == [2]


def test_a_template_without_an_end_gets_one_and_one_without_system_turns_too(word_tokenizer: Make) -> None:
    template = word_tokenizer().chat_template.replace(" <|end|>", "")
    row, accounting = one(word_tokenizer(template, eos="</s>"), pair("w1", "w3", "w4"))
    assert shown(word_tokenizer(), row.branches[0].ids) == "w3 </s>"
    assert [count for note, count in accounting.notes.items() if "end-of-sequence token was added" in note] == [2]

    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + word_tokenizer().chat_template
    tokenizer = word_tokenizer(strict)
    rows = [pair("w9", "w3", "w4", name="s"), pair((Message("system", "sys"), Message("user", "w1")), "w3", "w4")]
    made, accounting = tokenise(rows, tokenizer, TokeniseSettings(), PAIR)
    assert shown(tokenizer, made[0].prompt) == "<|user|> w9 <|end|> <|assistant|>"
    assert shown(tokenizer, made[1].prompt) == "<|user|> sys w1 <|end|> <|assistant|>"
    assert [count for note, count in accounting.notes.items() if "takes no system turn" in note] == [1]

    refusing = word_tokenizer("{{ raise_exception('never') }}")
    made, accounting = tokenise(rows, refusing, TokeniseSettings(), PAIR)
    assert (len(made), accounting.dropped["the chat template refuses this conversation"].count) == (0, 2)
    assert accounting.notes == {"the chat template said: never": 2}
    with pytest.raises(DataError, match=r"Prompt 1 .*the chat template refuses"):
        prompt_ids(rows[0].prompt, refusing, TokeniseSettings())


def test_special_tokens_written_in_a_reply_are_noted(word_tokenizer: Make) -> None:
    _, accounting = one(word_tokenizer(), pair("w1", "w3 <|end|> w4", "w5"))
    assert accounting.notes == {"a special token is written out inside a reply": 1}


# ---- truncation. A turn takes its words and two marks; the cue takes one: "w1 w2" as a prompt is 2 + 2 + 1 = 5 tokens.


def test_whole_oldest_turns_go_first_and_the_system_turn_stays(word_tokenizer: Make) -> None:
    tokenizer = word_tokenizer()
    conversation = (Message("system", "sys"), *turns(words(0, 5), words(10, 5), words(20, 5), words(30, 5), words(40, 5)))
    reply = words(50, 4)  # 5 tokens with its end
    # Whole: 3 + 5 × 7 + 1 = 39, and 5 of the reply: 44. Without the first two turns: 25 + 5 = 30. Without four: 11 + 5 = 16.
    for limit, first, length in ((44, 0, 39), (43, 20, 25), (30, 20, 25), (29, 40, 11), (16, 40, 11)):
        row, accounting = one(tokenizer, pair(conversation, reply, "w1"), max_length=limit)
        assert len(row.prompt) == length
        assert shown(tokenizer, row.prompt).startswith(f"<|system|> sys <|end|> <|user|> w{first} ")
        assert accounting.truncated_prompts == (limit < 44)
        assert shown(tokenizer, row.branches[0].ids) == f"{reply} <|end|>"


def test_then_the_last_turn_loses_its_oldest_tokens(word_tokenizer: Make) -> None:
    tokenizer = word_tokenizer()
    conversation = (Message("system", "sys"), *turns(words(0, 5), words(10, 5), words(40, 5)))
    # 15 tokens: system 3, turn marks 2, cue 1, reply 5; 4 are left for the words of the last turn.
    row, _ = one(tokenizer, pair(conversation, words(50, 4), "w1"), max_length=15)
    assert shown(tokenizer, row.prompt) == "<|system|> sys <|end|> <|user|> w41 w42 w43 w44 <|end|> <|assistant|>"
    row, _ = one(tokenizer, pair(conversation, words(50, 4), "w1"), max_length=12)
    assert shown(tokenizer, row.prompt) == "<|system|> sys <|end|> <|user|> w44 <|end|> <|assistant|>"


def test_a_reply_that_leaves_no_room_is_dropped_or_cut(word_tokenizer: Make) -> None:
    tokenizer = word_tokenizer()
    rows = [pair(words(40, 5), words(50, 4), "w1", name="long"), pair("w1", "w2", "w3", name="short")]
    made, accounting = tokenise(rows, tokenizer, TokeniseSettings(max_length=8), PAIR)
    assert made.ids == ["short"]
    assert accounting.dropped["a reply is too long for max_length"].rows == ["long"]
    assert (accounting.rows_in, accounting.kept, accounting.replies_cut) == (2, 1, 0)
    made, accounting = tokenise(rows, tokenizer, TokeniseSettings(max_length=8, overlong_reply="cut"), PAIR)
    # The prompt gets half of 8: <|user|> w44 <|end|> <|assistant|>; the reply the other half, its end lost.
    assert shown(tokenizer, made[0].prompt) == "<|user|> w44 <|end|> <|assistant|>"
    assert shown(tokenizer, made[0].branches[0].ids) == "w50 w51 w52 w53"
    assert shown(tokenizer, made[0].branches[1].ids) == "w1 <|end|>"
    assert (accounting.replies_cut, accounting.eos_lost, accounting.truncated_prompts, accounting.kept) == (1, 1, 1, 2)


def test_replies_made_identical_are_dropped_and_counted(word_tokenizer: Make) -> None:
    # Unknown words become one token, and cutting can take the difference away.
    made, accounting = tokenise([pair("w1", "x9", "y9")], word_tokenizer(), TokeniseSettings(), PAIR)
    assert (len(made), accounting.made_identical, accounting.dropped_total) == (0, 1, 1)
    cut = pair("w1", words(0, 20) + " w30", words(0, 20) + " w31")
    made, accounting = tokenise([cut], word_tokenizer(), TokeniseSettings(max_length=16, overlong_reply="cut"), PAIR)
    assert (len(made), accounting.made_identical, accounting.replies_cut) == (0, 1, 2)


def test_prompts_for_generation_leave_room_and_say_when_they_cannot(word_tokenizer: Make) -> None:
    tokenizer = word_tokenizer()
    settings = TokeniseSettings(max_length=20)
    conversation = turns(words(0, 5), words(10, 5), words(20, 5))
    assert len(prompt_ids(conversation, tokenizer, settings.model_copy(update={"max_length": 22}))) == 22
    assert shown(tokenizer, prompt_ids(conversation, tokenizer, settings, room=12)) == f"<|user|> {words(20, 5)} <|end|> <|assistant|>"
    assert len(prompts_ids([conversation] * 3, tokenizer, settings, room=14)[2]) == 6
    assert prompt_ids(conversation, tokenizer, settings).dtype == np.int32
    with pytest.raises(DataError, match="does not fit into 3 tokens"):
        prompt_ids(conversation, tokenizer, settings, room=17)
    both = [turns("w1"), (Message("system", words(30, 9)), *turns("w2"))]
    with pytest.raises(DataError, match=r"^Prompt 2 \('w2'\) cannot be used: it does not fit into 6 tokens"):
        prompts_ids(both, tokenizer, settings, room=14)
    with pytest.raises(DataError, match=r"^Prompt 'long' "):
        prompts_ids(both, tokenizer, settings, room=14, names=["short", "long"])


def test_a_megabyte_of_prompt_or_reply(word_tokenizer: Make) -> None:
    rows = [pair("w1 " * 350_000, "w2", "w3", name="prompt"), pair("w1", "w2 " * 350_000, "w3", name="reply")]
    made, accounting = tokenise(rows, word_tokenizer(), TokeniseSettings(max_length=100), PAIR)
    assert made.lengths() == [(98, (2, 2))]
    assert accounting.dropped["a reply is too long for max_length"].rows == ["reply"]


# ---- roles


def test_all_token_learning_starts_at_bos_or_eos(word_tokenizer: Make) -> None:
    gold = record("w1 w2", Reply("w3", "gold"))
    tokenizer = word_tokenizer()
    row, _ = one(tokenizer, gold, ("gold",), learn="all")
    assert shown(tokenizer, row.prompt) == "<|end|>"
    assert shown(tokenizer, row.branches[0].ids) == "<|user|> w1 w2 <|end|> <|assistant|> w3 <|end|>"
    assert row.branches[0].marks["learn"].all()
    plain = word_tokenizer(template=None, bos=True, eos="</s>")
    row, _ = one(plain, gold, ("gold",), learn="all")
    assert (shown(plain, row.prompt), shown(plain, row.branches[0].ids)) == ("<s>", "Human: w1 w2 Assistant: w3 </s>")
    # The start token counts: 1 + 5 + 2 = 8 tokens fit into 8, not into 7.
    assert one(tokenizer, gold, ("gold",), learn="all", max_length=8)[1].truncated_prompts == 0
    assert one(tokenizer, gold, ("gold",), learn="all", max_length=7)[1].truncated_prompts == 1


def test_gold_is_the_gold_the_chosen_or_the_good_reply(word_tokenizer: Make) -> None:
    rows = [
        record("w1", Reply("w2", "gold"), Reply("w3", "chosen"), name="gold"),
        pair("w1", "w4", "w5", name="pair"),
        record("w1", Reply("w6", "sample", label=False), Reply("w7", "sample", label=True), name="labelled"),
        record("w1", Reply("w8", "sample", scores={"s": 1}), Reply("w9", "sample", scores={"s": 2}), name="list"),
        record("w1", Reply("w8", "sample", label=False), name="bad"),
    ]
    made, accounting = tokenise(rows, word_tokenizer(), TokeniseSettings(), ("gold",))
    assert {row.id: shown(word_tokenizer(), row.branches[0].ids) for row in made} == {
        "gold": "w2 <|end|>",
        "pair": "w4 <|end|>",
        "labelled": "w7 <|end|>",
        "list": "w9 <|end|>",
    }
    assert accounting.dropped["no 'gold' reply"].rows == ["bad"]
    assert (accounting.rows_in, accounting.kept) == (5, 4)


def test_a_scored_list_gives_a_pair_of_its_best_and_worst_or_the_whole_list(word_tokenizer: Make) -> None:
    scored = record("w1", *(Reply(f"w{number}", "sample", scores={"s": score}) for number, score in ((2, 0.5), (3, 0.9), (4, 0.1))))
    tied = record("w1", *(Reply(f"w{number}", "sample", scores={"s": 1.0}) for number in (2, 3)), name="tied")
    made, accounting = tokenise([scored, tied], word_tokenizer(), TokeniseSettings(), PAIR)
    assert [shown(word_tokenizer(), branch.ids) for branch in made[0].branches] == ["w3 <|end|>", "w4 <|end|>"]
    assert [branch.facts for branch in made[0].branches] == [{"s": 0.9}, {"s": 0.1}]
    assert accounting.dropped["no 'chosen' and 'rejected' reply"].rows == ["tied"]
    whole, _ = one(word_tokenizer(), scored, ("sample",))
    assert [(branch.role, branch.facts["s"]) for branch in whole.branches] == [("sample", 0.5), ("sample", 0.9), ("sample", 0.1)]


def test_kto_makes_two_labelled_rows_of_a_pair_and_answers_of_other_prompts(word_tokenizer: Make) -> None:
    rows = [pair(f"w{at}", f"w{10 + at}", f"w{20 + at}", name=f"p{at}") for at in range(3)]
    rows.append(record("w3", Reply("w13", "sample", label=True), name="l3"))
    made, accounting = tokenise(rows, word_tokenizer(), TokeniseSettings(), ("sample", "mismatched"))
    assert made.ids == ["p0/chosen", "p0/rejected", "p1/chosen", "p1/rejected", "p2/chosen", "p2/rejected", "l3"]
    assert (accounting.rows_in, accounting.kept) == (7, 7)
    replies = {row.id: [shown(word_tokenizer(), branch.ids).split()[0] for branch in row.branches] for row in made}
    # Good replies rotate among the good (w10, w11, w12, w13), bad ones among the bad: each serves once.
    assert replies == {
        "p0/chosen": ["w10", "w11"],
        "p0/rejected": ["w20", "w21"],
        "p1/chosen": ["w11", "w12"],
        "p1/rejected": ["w21", "w22"],
        "p2/chosen": ["w12", "w13"],
        "p2/rejected": ["w22", "w20"],
        "l3": ["w13", "w10"],
    }
    assert [[branch.facts for branch in row.branches] for row in made][:2] == [[{"label": 1.0}] * 2, [{"label": 0.0}] * 2]
    assert [branch.role for branch in made[0].branches] == ["sample", "mismatched"]


def test_bco_s_labelled_rows_are_kto_s_without_the_other_reply(word_tokenizer: Make) -> None:
    rows = [
        pair("w1", "w10", "w20", name="pair"),
        record("w3", Reply("w13", "sample", label=True), Reply("w14", "sample", label=False), Reply("w15", "sample"), name="two"),
        record("w4", Reply("w16", "sample", label=False), name="one"),
        record("w5", Reply("w17", "sample"), Reply("w18", "sample"), name="unlabelled"),
    ]
    made, accounting = tokenise(rows, word_tokenizer(), TokeniseSettings(), ("sample",), facts=("label",))
    found = [(row.id, [(branch.role, shown(word_tokenizer(), branch.ids), branch.facts) for branch in row.branches]) for row in made]
    assert found == [
        ("pair/chosen", [("sample", "w10 <|end|>", {"label": 1.0})]),
        ("pair/rejected", [("sample", "w20 <|end|>", {"label": 0.0})]),
        ("two/0", [("sample", "w13 <|end|>", {"label": 1.0})]),
        ("two/1", [("sample", "w14 <|end|>", {"label": 0.0})]),
        ("one", [("sample", "w16 <|end|>", {"label": 0.0})]),
    ]
    assert accounting.dropped["no 'sample' reply"].rows == ["unlabelled"]


def test_a_reply_alone_is_no_list(word_tokenizer: Make) -> None:
    rows = [record("w1", *(Reply("w2", "sample") for _ in range(size)), name=f"of {size}") for size in (1, 2)]
    made, accounting = tokenise(rows, word_tokenizer(), TokeniseSettings(), ("sample",))
    assert made.ids == ["of 2"]
    assert accounting.dropped["no list of two or more replies"].rows == ["of 1"]


def test_a_mismatched_reply_is_never_of_the_same_prompt_and_costs_nothing(word_tokenizer: Make) -> None:
    long = words(0, 50)
    rows = [
        record("w1", Reply("w2", "sample", label=True), name="a"),
        record(" W1 ", Reply("w3", "sample", label=True), name="b"),
        record("w9", Reply(long, "sample", label=True), name="c"),
        record("w8", Reply("w5", "sample", label=False), name="d"),
    ]
    made, accounting = tokenise(rows, word_tokenizer(), TokeniseSettings(max_length=60), ("sample", "mismatched"))
    partners = {row.id: shown(word_tokenizer(), row.branches[1].ids).split()[0] for row in made}
    assert partners == {"a": "w0", "b": "w0", "c": "w2", "d": "w2"}
    short, accounting = tokenise(rows, word_tokenizer(), TokeniseSettings(max_length=20), ("sample", "mismatched"))
    assert short.ids == ["a", "b", "d"]
    assert [len(row.branches[1].ids) for row in short] == [16, 16, 2]
    assert accounting.notes["mismatched replies cut at max_length"] == 2
    assert (accounting.truncated_prompts, accounting.eos_lost, accounting.replies_cut) == (0, 0, 0)
    with pytest.raises(DataError, match="all rows share one prompt"):
        tokenise(rows[:2], word_tokenizer(), TokeniseSettings(), ("sample", "mismatched"))


def test_facts_are_missing_never_zero_and_can_be_asked_for(word_tokenizer: Make) -> None:
    rows = [
        record("w1", Reply("w2", "chosen", safe=True), Reply("w3", "rejected", safe=False), name="both"),
        record("w1", Reply("w2", "chosen", safe=True), Reply("w3", "rejected"), name="one"),
    ]
    made, _ = tokenise(rows, word_tokenizer(), TokeniseSettings(), PAIR)
    assert [[branch.facts for branch in row.branches] for row in made] == [[{"safe": 1.0}, {"safe": 0.0}], [{"safe": 1.0}, {}]]
    made, accounting = tokenise(rows, word_tokenizer(), TokeniseSettings(), PAIR, facts=("safe",))
    assert made.ids == ["both"]
    assert accounting.dropped["a reply without the fact 'safe'"].rows == ["one"]


def test_roles_that_are_not_there(word_tokenizer: Make) -> None:
    with pytest.raises(UsageError, match=r"no reply role 'choosen'. Did you mean 'chosen'"):
        tokenise([pair("w1", "w2", "w3")], word_tokenizer(), TokeniseSettings(), ("choosen", "rejected"))
    with pytest.raises(DataError, match="No record has the replies chosen, rejected: 1 of 1 rows dropped"):
        tokenise([record("w1", Reply("w2", "gold"))], word_tokenizer(), TokeniseSettings(), PAIR)


def test_batches_give_the_same_rows_as_one_by_one(byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [pair(turns("hello " * (at + 1), "you", "how are you? " * at + "x"), f"the model {at}", "no", name=str(at)) for at in range(40)]
    settings = TokeniseSettings(max_length=60)
    together, accounting = tokenise(rows, byte_tokenizer, settings, PAIR)
    monkeypatch.setattr("equipoise.data.tokenise.BATCH", 1)
    apart, other = tokenise(rows, byte_tokenizer, settings, PAIR)
    assert together.fingerprint() == apart.fingerprint()
    assert accounting == other
    assert 0 < accounting.truncated_prompts < 40
    assert all(prompt + max(replies) <= 60 for prompt, replies in together.lengths())
    assert isinstance(together, TokenRows)
