"""Prints: exact and near matches worked by hand, against a brute-force search, and on the real rows."""

from __future__ import annotations

import gzip
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.core.errors import DataError, UsageError
from equipoise.core.prints import SHORT, Overlap, PromptPrints, conversation_text, fold
from equipoise.core.records import Message

LONG = "please tell me in plain words how a heat pump moves warmth from cold air into a house"  # 18 words, 16 3-grams


def shared(left: list[str], right: list[str], near: float = 0.8) -> list[Overlap]:
    return PromptPrints.of(left).shared_with(PromptPrints.of(right), near)


def test_exact_ignores_case_punctuation_space_width_and_role_markers() -> None:
    other = ["nothing", "Human: What's a  GOOD knife?\n\nAssistant: One that cuts.\n\nHuman: Which?"]
    assert shared(["whats nothing", "what's a good knife one that cuts - which!", "Ｗhat's a good knife? One that cuts. Which"], other) == [
        Overlap(1, 1, "exact", 1.0),
        Overlap(2, 1, "exact", 1.0),
    ]


def test_short_texts_compare_word_sets() -> None:
    # 9 common words of 9 + 10: Jaccard 9/10; with one word replaced 8 of 10: 0.8; with two replaced 7 of 11.
    text = "what is the best way to sharpen a knife"
    assert shared([text + " quickly"], [text])[0].similarity == pytest.approx(9 / 10)
    assert shared([text.replace("knife", "saw")], [text])[0].similarity == pytest.approx(8 / 10)
    assert shared([text.replace("knife", "saw").replace("best", "worst")], [text]) == []


def test_long_texts_compare_three_grams_and_find_containment() -> None:
    assert len(LONG.split()) == 18
    # The last word replaced: 15 of 16 3-grams left. A word in the middle: 13 of 16 = 0.8125. Two words apart: 10 of 16.
    assert shared([LONG.replace("house", "flat")], [LONG])[0].similarity == pytest.approx(15 / 16)
    assert shared([LONG.replace("heat", "water")], [LONG])[0].similarity == pytest.approx(13 / 16)
    assert shared([LONG.replace("heat", "water").replace("plain", "few")], [LONG]) == []
    assert shared([LONG + " and why this costs far less than burning gas would in a mild winter"], [LONG])[0].similarity == 1.0


def test_a_short_question_inside_a_long_text_is_not_shared() -> None:
    assert shared(["how are you"], ["hello there friend how are you " + LONG]) == []


def test_the_boundary_between_short_and_long_is_not_a_gap() -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
    assert len(words) == SHORT - 1
    assert shared([" ".join(words)], [" ".join([*words, "twelve"])])[0].similarity == pytest.approx(11 / 12)
    assert shared([" ".join([*words, "twelve"])], [" ".join(words)])[0].similarity == pytest.approx(11 / 12)


def test_order_of_words_matters_in_long_texts() -> None:
    assert shared([" ".join(reversed(LONG.split()))], [LONG]) == []


def test_scripts_without_spaces_are_cut_into_characters() -> None:
    assert fold("猫が好き。OK") == ["猫", "が", "好", "き", "ok"]


@pytest.mark.parametrize("empty", ["", "   \n", "?!…", "Human:"])
def test_prompts_without_a_word_match_nothing(empty: str) -> None:
    assert shared([empty], [empty, "", "!!!"]) == []


def test_empty_sets() -> None:
    nothing = PromptPrints.of([])
    assert nothing.shared_with(PromptPrints.of([LONG])) == []
    assert PromptPrints.of([LONG]).shared_with(nothing) == []
    assert PromptPrints.merge([]).shared_with(nothing) == []


@pytest.mark.parametrize("near", [0.49, 1.01, float("nan")])
def test_near_out_of_range(near: float) -> None:
    with pytest.raises(UsageError, match="near must lie"):
        shared([LONG], [LONG], near)


def test_round_trip_is_equal_deterministic_and_without_pickle(tmp_path: Path) -> None:
    prints = PromptPrints.of([LONG, "", "short one", LONG * 3])
    prints.save(tmp_path / "a.npz")
    prints.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = PromptPrints.load(tmp_path / "a.npz")
    assert len(loaded) == 4
    assert loaded.shared_with(prints) == prints.shared_with(loaded) == prints.shared_with(prints)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as data:
        assert all(data[name].dtype != object for name in data.files)


def test_merge_keeps_order(tmp_path: Path) -> None:
    parts = [PromptPrints.of(["red apples"]), PromptPrints.of([]), PromptPrints.of([LONG, "green pears"])]
    merged = PromptPrints.merge(parts)
    assert [item.other_index for item in PromptPrints.of(["green pears", LONG, "red apples"]).shared_with(merged)] == [2, 1, 0]
    assert np.array_equal(merged.gram_starts, PromptPrints.of(["red apples", LONG, "green pears"]).gram_starts)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04broken"])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.npz"):
        PromptPrints.load(tmp_path / "x.npz")
    with pytest.raises(DataError, match="does not exist"):
        PromptPrints.load(tmp_path / "absent.npz")


def test_a_file_of_another_kind_or_format(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", exact=np.zeros(2))
    with pytest.raises(DataError, match="no prompt fingerprints"):
        PromptPrints.load(tmp_path / "x.npz")


def test_conversation_text_leaves_system_prompts_out() -> None:
    turns = [Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Bye")]
    assert conversation_text(turns) == "Hi\n\nHello\n\nBye"


def grams(words: list[str]) -> set[tuple[str, ...]]:
    return set(zip(words, words[1:], words[2:], strict=False))


def by_hand(left: list[str], right: list[str]) -> float:
    """The similarity as the module's text defines it, from sets of words."""
    if not left or not right:
        return 0.0
    if min(len(left), len(right)) < SHORT:
        return len(set(left) & set(right)) / len(set(left) | set(right)) if max(len(left), len(right)) < 2 * SHORT else 0.0
    return len(grams(left) & grams(right)) / min(len(grams(left)), len(grams(right)))


texts = st.lists(st.lists(st.sampled_from("abcdef"), max_size=30).map(" ".join), max_size=8)


@settings(max_examples=60, deadline=None)
@given(texts, texts, st.sampled_from([0.5, 0.8, 1.0]))
def test_agrees_with_brute_force(left: list[str], right: list[str], near: float) -> None:
    found = {item.index: item for item in shared(left, right, near)}
    for index, text in enumerate(left):
        words = text.split()
        similarities = [by_hand(words, other.split()) for other in right if max(len(words), len(other.split())) < 2 * SHORT or True]
        best = max(similarities, default=0.0)
        if words and text in right:
            assert found[index] == Overlap(index, right.index(text), "exact", 1.0)
        elif best >= near:
            assert found[index].kind == "near"
            assert found[index].similarity == pytest.approx(best)
            assert found[index].other_index == next(i for i, value in enumerate(similarities) if value == pytest.approx(best))
        else:
            assert index not in found


def test_ten_thousand_against_one_thousand_takes_seconds() -> None:
    source = random.Random(0)
    words = [f"w{int(source.paretovariate(0.6)) % 20000}" for _ in range(5000)]
    many = [" ".join(source.choices(words, k=source.randint(3, 120))) for _ in range(10_000)]
    few = [text + " indeed" for text in many[::20]] + [" ".join(source.choices(words, k=40)) for _ in range(500)]
    start = time.monotonic()
    found = PromptPrints.of(few).shared_with(PromptPrints.of(many))
    assert time.monotonic() - start < 30  # about 2 s on one free core
    long_enough = [i for i in range(500) if len(many[i * 20].split()) >= SHORT]
    assert {item.index: item.other_index for item in found if item.index in long_enough} == {i: i * 20 for i in long_enough}


def test_forty_of_the_fifty_harmful_prompts_of_the_opt350m_study_stand_in_the_hh_rows(shared_data: Path) -> None:
    with gzip.open(shared_data / "hh-harmless-base/pairs.jsonl.gz", "rt", encoding="utf-8") as stream:
        conversations = [json.loads(line)["chosen"] for line in stream]
    rows = PromptPrints.of(text[: text.rfind("\n\nAssistant:")] for text in conversations)
    harmful = json.loads((shared_data / "opt350m-study/harmful_prompts.json").read_text(encoding="utf-8"))
    helpful = json.loads((shared_data / "opt350m-study/helpful_prompts.json").read_text(encoding="utf-8"))
    # 37 word for word, 2 with part of the reply, 1 that carries on a conversation of the rows.
    found = PromptPrints.of(harmful).shared_with(rows)
    assert len(found) == 40
    assert sum(item.kind == "exact" for item in found) == 37
    assert PromptPrints.of(helpful).shared_with(rows) == []


def test_joining_files_writes_what_merging_in_memory_writes(tmp_path: Path) -> None:
    texts = [["how do I boil eggs", ""], ["one " * 30], ["a b c d e f g h i j k l m n o p", "東京 is big"]]
    paths = []
    for number, part in enumerate(texts):
        paths.append(tmp_path / f"{number}.npz")
        PromptPrints.of(part).save(paths[-1])
    PromptPrints.join(paths, tmp_path / "joined.npz")
    PromptPrints.merge([PromptPrints.of(part) for part in texts]).save(tmp_path / "merged.npz")
    assert (tmp_path / "joined.npz").read_bytes() == (tmp_path / "merged.npz").read_bytes()
