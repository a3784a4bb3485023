"""The processes of one run: what rank 0 does once for all of them, what they must agree on, and how they wait.

Bookkeeping goes over a gloo group of its own, so that it needs no accelerator and may wait for hours: rank 0 tokenises
ten million rows while the others stand still, and NCCL would give up after ten minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from equipoise.core.errors import EquipoiseError, UsageError
from equipoise.core.progress import console
from equipoise.core.runs import Run, run_stage

T = TypeVar("T")
PATIENCE = timedelta(hours=24)


def on_cpu() -> bool:
    """Whether this machine has no GPU that the engine knows (CUDA or ROCm); on any other it trains on the CPU."""
    return not torch.cuda.is_available()


@dataclass
class Ranks:
    """rank of size processes. Alone (rank 0 of 1), every method is the plain thing and touches no network."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def join(cls) -> Ranks:
        """The processes that `accelerate launch` or `torchrun` started; alone where neither did."""
        # accelerate reads the launcher's variables and opens the default group; not told that there is no GPU, it leaves
        # the processes `torchrun` started alone, each training its own copy.
        PartialState(cpu=on_cpu())
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=PATIENCE))

    def first(self, work: Callable[[], T]) -> T:
        """`work()` on rank 0 alone: its value on every rank, and where it raises, an error of its kind on every rank."""
        if self.size == 1:
            return work()
        if self.rank:
            return self._hear()
        try:
            value = work()
        except Exception as error:
            self._tell(error=error)
            raise
        self._tell(value)
        return value

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.group)
        return everyone

    def agree(self, what: str, value: T) -> T:
        """The value, once every rank has shown the same. Raises UsageError saying which rank has another."""
        everyone = self.gather(value)
        other = [rank for rank, shown in enumerate(everyone) if shown != everyone[0]]
        if other:
            raise UsageError(
                f"The processes do not agree on {what}: rank 0 has {everyone[0]!r}, rank {other[0]} has {everyone[other[0]]!r}. "
                "Start every process with the same settings and versions, on one shared output folder."
            )
        return value

    def wait(self) -> None:
        """Return once every rank has come here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Only rank 0 speaks inside the block: messages and bars of work that all ranks do alike come once."""
        before = console.quiet
        console.quiet = before or self.rank > 0
        try:
            yield
        finally:
            console.quiet = before

    def stage(
        self,
        folder: str | Path,
        kind: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        work: Callable[[Path], Mapping[str, Any]],
        overwrite: bool = False,
        neutral: Collection[str] = (),
    ) -> Run:
        """`run_stage` whose folder rank 0 keeps while every rank does the work. `inputs` are read on rank 0 only.

        An error before the work (the folder holds something else) comes to every rank. One inside the work is its own
        rank's; the launcher then ends the others, as they may be waiting anywhere.
        """
        if self.size == 1:
            return run_stage(folder, kind, settings, inputs, work, overwrite, neutral)
        if self.rank:
            opened = self._hear()
            if isinstance(opened, Run):
                return opened
            work(opened)
            return self._hear()
        working = False

        def together(path: Path) -> Mapping[str, Any]:
            nonlocal working
            working = True
            self._tell(path)
            return work(path)

        try:
            run = run_stage(folder, kind, settings, inputs, together, overwrite, neutral)
        except Exception as error:
            if not working:
                self._tell(error=error)
            raise
        self._tell(run)
        return run

    def _tell(self, value: Any = None, error: Exception | None = None) -> None:
        known = isinstance(error, EquipoiseError)
        message = None if error is None else (type(error) if known else RuntimeError, f"{error}" if known else f"rank 0 failed: {error!r}")
        dist.broadcast_object_list([(value, message)], src=0, group=self.group)

    def _hear(self) -> Any:
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=0, group=self.group)
        value, error = heard[0]
        if error is not None:
            kind, message = error
            raise kind(message)
        return value
