"""Settings: strict keys, nearest names, overrides, numbers as people write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import pytest
from pydantic import Field, ValidationError, model_validator

from equipoise.core.errors import UsageError
from equipoise.core.settings import Settings, apply_overrides, number, read_yaml


class Inner(Settings):
    learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate")
    names: tuple[str, ...] = Field(default=(), description="names")


class Outer(Settings):
    seed: int = Field(default=0, description="seed")
    training: Inner = Field(default=Inner(), description="training")
    streams: tuple[Inner, ...] = Field(default=(), description="streams")


def test_defaults_and_resolved():
    assert Outer.make().resolved() == {"seed": 0, "training": {"learning_rate": 1e-3, "names": []}, "streams": []}


@pytest.mark.parametrize(
    ("values", "where", "meant"),
    [
        ({"sed": 1}, "'sed'", "'seed'"),
        ({"training": {"lerning_rate": 1}}, "'training.lerning_rate'", "'learning_rate'"),
        ({"streams": [{}, {"nmaes": []}]}, "'streams.1.nmaes'", "'names'"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(values, where, meant):
    with pytest.raises(UsageError) as caught:
        Outer.make(values, source="mine.yaml")
    assert str(caught.value) == f"mine.yaml: Unknown setting {where}. Did you mean {meant}?"


class Pick(Settings):
    several: Inner | tuple[Inner, ...] | None = Field(default=None, description="one or several")
    named: dict[str, Inner] = Field(default={}, description="by name")
    size: int | Literal["auto"] = Field(default=1, description="size")


class Recipe(Settings):
    HINTS: ClassVar[Mapping[str, str]] = {"beta": "Look there."}

    items: tuple[Pick, ...] = Field(default=(Pick(),), min_length=1, description="items")
    seed: int = Field(default=0, description="seed")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"learning_rate": 1}, "Unknown setting 'learning_rate'. Did you mean 'items.0.several.learning_rate'?"),
        ({"lerning_rate": 1}, "Unknown setting 'lerning_rate'. Did you mean 'items.0.several.learning_rate'?"),
        ({"items": [{"seed": 1}]}, "Unknown setting 'items.0.seed'. Did you mean 'seed'?"),
        ({"beta": 1}, "Unknown setting 'beta'. Look there."),
        ({"items": [{"several": {"nmaes": 1}}]}, "Unknown setting 'items.0.several.nmaes'. Did you mean 'names'?"),
        ({"items": [{"several": [{}, {"nmaes": 1}]}]}, "Unknown setting 'items.0.several.1.nmaes'. Did you mean 'names'?"),
        ({"items": [{"named": {"x": {"nmaes": 1}}}]}, "Unknown setting 'items.0.named.x.nmaes'. Did you mean 'names'?"),
        ({"items": [{"size": "large"}]}, "items.0.size: Input should be a valid integer, .*, or Input should be 'auto' (found 'large')."),
        ({"items": []}, "items: Tuple should have at least 1 item after validation, not 0 (found [])."),
    ],
)
def test_a_problem_is_told_in_keys_and_once(values, says):
    """Where a value may be of several kinds pydantic tells what is wrong with each, and names types among the keys."""
    with pytest.raises(UsageError) as caught:
        Recipe.make(values)
    assert re.fullmatch(re.escape(says).replace(r"\.\*", ".*"), str(caught.value))


def test_a_call_from_python_is_told_the_same():
    with pytest.raises(UsageError, match=r"Unknown setting 'sed'\. Did you mean 'seed'"):
        Outer(sed=1)


def test_a_value_out_of_range_says_where_and_what_was_found():
    with pytest.raises(UsageError, match=r"training\.learning_rate: .*greater than 0.*found -1"):
        Outer.make({"training": {"learning_rate": -1}})


def test_every_problem_is_named_at_once():
    with pytest.raises(UsageError) as caught:
        Outer.make({"seed": "many", "training": {"learning_rate": 0}})
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("2E3", 2000.0),
        ("-3e+2", -300.0),
        (".5", 0.5),
        ("1.5", 1.5),
        ("smollm2-135m", "smollm2-135m"),
        ("e5-small", "e5-small"),
        ("1e-5x", "1e-5x"),
        ("", ""),
    ],
)
def test_scientific_notation_is_a_number_and_names_stay_text(text, value):
    found = number(text)
    assert found == value
    assert type(found) is type(value)


def test_overrides_read_yaml_values_and_index_lists():
    start = {"training": {"learning_rate": 1.0}, "streams": [{"names": ["a"]}, {"names": ["b"]}]}
    result = apply_overrides(
        start, ["training.learning_rate=1e-5", "streams.1.names=[x, y]", "streams.0.names.0=z", "new.key=true", "seed=-3", "none=null"]
    )
    assert result == {
        "training": {"learning_rate": 1e-5},
        "streams": [{"names": ["z"]}, {"names": ["x", "y"]}],
        "new": {"key": True},
        "seed": -3,
        "none": None,
    }
    assert start == {"training": {"learning_rate": 1.0}, "streams": [{"names": ["a"]}, {"names": ["b"]}]}, "the input stays as it was"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed", "key=value"),
        ("=3", "key=value"),
        ("streams.5.names=[]", "streams is a list of 1; no item '5'"),
        ("streams.x=1", "streams is a list of 1; no item 'x'"),
        ("streams.0.names.0.b=1", "is a value and has no 'b'"),
        ("seed=[1", "not valid YAML"),
    ],
)
def test_a_bad_override_says_what_is_wrong(override, says):
    with pytest.raises(UsageError, match=says.replace("[", r"\[")):
        apply_overrides({"streams": [{"names": ["a"]}]}, [override])


def test_yaml_errors_name_file_and_line(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("a: 1\nb: }\nc: 2\n")
    with pytest.raises(UsageError, match=r"study\.yaml, line 2"):
        read_yaml(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(UsageError, match=r"expected settings as `key: value`, found a list"):
        read_yaml(path)
    path.write_text("")
    assert read_yaml(path) == {}
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(UsageError, match="cannot be read"):
        read_yaml(path)
    with pytest.raises(UsageError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")


def test_what_a_validator_of_several_settings_says_names_the_file_too(tmp_path):
    class Checked(Inner):
        @model_validator(mode="after")
        def _together(self) -> Self:
            raise UsageError("beta: does not go with gamma.")

    class Around(Settings):
        inner: Checked | None = None

    path = tmp_path / "s.yaml"
    path.write_text("inner: {}\n")
    with pytest.raises(UsageError, match=r"^beta: does not go with gamma\.$"):
        Around.make({"inner": {}})
    with pytest.raises(UsageError) as caught:
        Around.from_yaml(path)
    assert str(caught.value) == f"{path}: beta: does not go with gamma."


def test_yaml_is_data_only(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        read_yaml(path)


def test_from_yaml_with_an_override_on_top(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("seed: 3\ntraining: {learning_rate: 1.0e-4}\n")
    made = Outer.from_yaml(path, ["training.learning_rate=2e-4"])
    assert (made.seed, made.training.learning_rate) == (3, 2e-4)


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Outer.make().seed = 4


def test_read_yaml_numbers_in_files(tmp_path):
    """`learning_rate: 1e-5` in a file means the number there too."""
    path = tmp_path / "a.yaml"
    path.write_text("training:\n  learning_rate: 1e-5\n")
    assert Outer.from_yaml(path).training.learning_rate == 1e-5
