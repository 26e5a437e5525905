"""What every command shares: errors of one line, progress on stderr, quiet libraries."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from erase_diffusion.errors import ConfigError, EraseDiffusionError

Progress = Callable[[str, int, int], Any]
SETTINGS = {"max_content_width": 110, "help_option_names": ["-h", "--help"]}


class Command(click.Command):
    """Turns the library's errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise click.UsageError(one_line(error)) from None
        except EraseDiffusionError as error:
            raise click.ClickException(one_line(error)) from None
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted; nothing half-written was left", err=True)
            ctx.exit(130)
        except (MemoryError, RuntimeError) as error:
            # torch.OutOfMemoryError, by name: torch is not imported before the usage is checked.
            if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
                raise
            raise click.ClickException("out of memory; nothing was written") from None


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())


def check_device(device: str) -> None:
    """Raise ConfigError for a device that is not supported, or not there."""
    import torch

    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise ConfigError(f"device {device!r} is not supported: give cpu, cuda, or cuda:1 and so on")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {device!r} cannot be used here: {one_line(error).split('. ')[0]}") from None


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' own bars and advice out of the user's terminal; errors still reach it as ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    yield


@contextlib.contextmanager
def progress_on_stderr(quiet: bool) -> Iterator[Progress]:
    """One bar a stage on stderr; elsewhere a plain line at its start, every ten seconds, and at its end."""
    if quiet:
        yield lambda stage, done, total: None
    elif sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield _Lines()


@contextlib.contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Speed(ProgressColumn):
        """Pieces a second."""

        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "")

    columns = (
        TextColumn("{task.description:>22}"),
        BarColumn(),
        MofNCompleteColumn(),
        Speed(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)
            if done >= total:
                bars.stop_task(tasks[stage])

        yield show


class _Lines:
    """Progress as plain lines: how much is done, how fast, and how long it will still take."""

    def __init__(self) -> None:
        self._stage, self._shown, self._began, self._first = "", 0.0, 0.0, 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._first = stage, now, done
        elif done < total and now - self._shown <= 10:
            return
        self._shown = now
        more, seconds = done - self._first, now - self._began
        speed = f", {more / seconds:.1f} a second, {_clock((total - done) * seconds / more)} left" if more else ""
        click.echo(f"{stage}: {done}/{total}{speed}", err=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
