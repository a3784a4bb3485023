"""An objective from a user's own file."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from equipoise.core.errors import UsageError
from equipoise.objectives import _load
from equipoise.objectives._load import build, class_from_file, code_fingerprint, load_class, methods

MINE = '''
from __future__ import annotations
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal
from pydantic import Field
from equipoise.objectives._base import Losses, Needs, Objective, Scored
Positive = Annotated[float, Field(gt=0)]

@dataclass
class Helper:
    scale: float = 1.0

class Mine(Objective):
    """Mine."""
    paper: ClassVar[str] = "none"
    departures: ClassVar[str] = "none"
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"))
    beta: Positive = 0.1
    kind: Literal["a", "b"] = "a"

    def __call__(self, scored: Scored) -> Losses:
        return Losses(scored.side("chosen").policy.sum(1))
'''


def written(folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(text, encoding="utf-8")
    return str(folder / "mine.py")


def user_modules() -> set[str]:
    return {name for name in sys.modules if name.startswith("equipoise_user_")}


def test_annotations_as_text_and_dataclasses(tmp_path: Path) -> None:
    file = written(tmp_path, MINE)
    made: Any = build({"name": "mine", "file": file, "beta": 0.5, "kind": "b"})
    assert (made.beta, made.kind) == (0.5, "b")
    with pytest.raises(UsageError, match="beta"):
        build({"name": "mine", "file": file, "beta": 0.0})


def test_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    first = class_from_file(written(tmp_path / "a", MINE))
    other = class_from_file(written(tmp_path / "b", MINE.replace("0.1", "0.2")))
    assert first.__module__ != other.__module__
    assert (first.model_validate({}).beta, other.model_validate({}).beta) == (0.1, 0.2)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", methods())
def test_every_method_works_as_a_file_of_ones_own(name: str, tmp_path: Path) -> None:
    text = (Path(_load.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    assert build({"name": name, "file": written(tmp_path, text)}).model_dump() == load_class(name)().model_dump()


@pytest.mark.parametrize(
    ("text", "says", "cause"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'", ModuleNotFoundError),
        ("def broken(:", "SyntaxError: .*line 1", SyntaxError),
        ("1 / 0", "ZeroDivisionError", ZeroDivisionError),
        ("x = 1", "exactly one Objective, found 0", TypeError),
    ],
)
def test_a_file_that_fails_is_named_with_its_error(tmp_path: Path, text: str, says: str, cause: type[Exception]) -> None:
    before = user_modules()
    with pytest.raises(UsageError, match=rf"mine\.py cannot be used as an objective: .*{says}") as raised:
        class_from_file(written(tmp_path, text))
    assert isinstance(raised.value.__cause__, cause)
    assert user_modules() == before


# ---- code of one's own, by its fingerprint


class Scaled:
    """A loss with a field."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def loss(self, scored: Any) -> Any:
        return self.factor

    def __call__(self, scored: Any) -> Any:
        return self.factor


@dataclass(frozen=True, slots=True)
class Slotted:
    factor: float

    def __call__(self, scored: Any) -> Any:
        return self.factor


def without_source(body: str) -> Any:
    """A function and a class that Python has no text of."""
    made: dict[str, Any] = {"__name__": "made"}
    exec(f"def loss(scored):\n    return (lambda x: {body})(scored)\nclass Loss:\n    def __call__(self, x):\n        return {body}", made)
    return made


def test_code_values_and_arguments_make_a_loss_of_ones_own() -> None:
    def around(factor: float) -> Any:
        return lambda scored: factor

    made = [
        Scaled(1.0),
        Scaled(2.0),
        Scaled(1.0).loss,
        Scaled(2.0).loss,
        Slotted(1.0),
        Slotted(2.0),
        around(1.0),
        around(2.0),
        *[lambda scored, factor=factor: factor for factor in (1.0, 2.0)],
        *[partial(around, factor=factor) for factor in (1.0, 2.0)],
        *[without_source(body)["loss"] for body in ("x + 1", "x + 2")],
        *[without_source(body)["Loss"]() for body in ("x + 1", "x + 2")],
    ]
    assert len({code_fingerprint(item) for item in made}) == len(made)
    again = [Scaled(1.0), Scaled(1.0).loss, Slotted(1.0), around(1.0), partial(around, factor=1.0), without_source("x + 1")["loss"]]
    assert len({code_fingerprint(item) for item in [*made, *again]}) == len(made)


def test_what_has_an_address_is_the_same_loss_in_every_process() -> None:
    """Only its type counts: `repr` would tell where in memory it lies."""
    assert len({code_fingerprint(partial(Scaled, object(), key=[object()])) for _ in range(3)}) == 1


def test_a_loss_may_close_over_itself_and_an_object_hold_its_own_method() -> None:
    def made(factor: float) -> Any:
        def loss(scored: Any) -> Any:
            return factor if scored is None else loss(None)

        return loss

    def early(scored: Any) -> Any:
        return later(scored)

    assert code_fingerprint(early), "a name it closes over is not bound yet"

    def later(scored: Any) -> Any:
        return scored

    holder = Scaled(1.0)
    holder.again = holder.loss  # type: ignore[attr-defined]
    assert code_fingerprint(made(1.0)) == code_fingerprint(made(1.0)) != code_fingerprint(made(2.0))
    assert code_fingerprint(holder.loss) != code_fingerprint(Scaled(1.0).loss)
