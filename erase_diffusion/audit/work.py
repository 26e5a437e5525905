"""Several processes at one audit: who does what, who waits for whom, and that only one audit is in a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout

from erase_diffusion.errors import ConfigError, EraseDiffusionError, OutputError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that `accelerate launch` started; alone without it."""

    rank: int = 0
    count: int = 1
    state: Any = None

    @classmethod
    def here(cls, device: str) -> Ranks:
        """As the environment says. Raises ConfigError when the processes cannot find each other."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        try:
            # A process waits for the others as long as their work takes; one that died is noticed at once.
            state = PartialState(cpu=device == "cpu", timeout=timedelta(days=30))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"the processes of accelerate launch did not find each other: {error}") from None
        return cls(state.process_index, state.num_processes, state)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def has(self, piece: int) -> bool:
        """Whether a piece of the work is this process's: every so many-th, so that the shares are alike."""
        return piece % self.count == self.rank

    def first_on_main(self, do: Callable[[], T], then: Callable[[], T]) -> T:
        """Let the main process do something, and the others something after it; an error of the main one ends all."""
        failure: list[str | None] = [None]
        result: T | None = None
        error: EraseDiffusionError | None = None
        if self.main:
            try:
                result = do()
            except EraseDiffusionError as caught:
                error, failure = caught, [str(caught)]
        if self.state is not None:
            self._together(lambda: torch.distributed.broadcast_object_list(failure, src=0))
        if error is not None:
            raise error
        if failure[0] is not None:
            raise OutputError(failure[0])
        return then() if result is None else result

    def wait(self) -> None:
        """Until every process is here. Raises OutputError when one has died."""
        if self.state is not None:
            self._together(torch.distributed.barrier)

    def _together(self, do: Callable[[], Any]) -> None:
        try:
            do()
        except RuntimeError as error:
            raise OutputError(
                f"another process of this audit died ({' '.join(str(error).split())[:100]}); start it again: what is "
                "done is kept"
            ) from None


@contextlib.contextmanager
def only_one(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Hold an audit's folder. Raises OutputError when another audit is at work in it, or it can't be written."""
    if not ranks.main:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise OutputError(f"another audit is at work in {folder}; wait for it, or choose another --output") from None
    except OSError as error:
        raise OutputError(f"{folder} cannot be used for --output: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()
