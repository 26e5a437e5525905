"""The command line: every command is one library call, every error one line. Results on stdout, progress on stderr."""

from __future__ import annotations

import click

from erase_diffusion.cli.audit import audit, generate, report, score
from erase_diffusion.cli.erase import erase_concept
from erase_diffusion.cli.registry import methods, models
from erase_diffusion.cli.restore import restore
from erase_diffusion.cli.terminal import SETTINGS

__all__ = ["erase_concept", "erase_diffusion"]


@click.group(context_settings=SETTINGS)
@click.version_option(package_name="erase-diffusion")
def erase_diffusion() -> None:
    """What to do with an erasure once it is made; erase-concept makes one."""


for command in (audit, generate, score, report, restore, models, methods):
    erase_diffusion.add_command(command)
