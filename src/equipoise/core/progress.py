"""Progress bars with a running estimate of the time left; silent when stderr is not a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from equipoise.core.printable import printable

console = Console(stderr=True)


class Bar:
    """One line of progress. `advance` is cheap and does nothing on a pipe."""

    def __init__(self, progress: Progress | None, task: int) -> None:
        self._progress, self._task = progress, task

    def advance(self, count: float = 1) -> None:
        """Count `count` more items as done."""
        if self._progress is not None:
            self._progress.advance(self._task, count)  # type: ignore[arg-type]


@contextmanager
def bar(title: str, total: float | None) -> Iterator[Bar]:
    """A progress bar on stderr for `total` items."""
    if not console.is_terminal:
        yield Bar(None, 0)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress, int(progress.add_task(title, total=total)))


def say(message: str) -> None:
    """One log line on stderr."""
    console.print(printable(message), markup=False, highlight=False, soft_wrap=True)
