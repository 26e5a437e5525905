"""`erase-diffusion restore`: take an erasure back, or change how strong it is."""

from __future__ import annotations

import json
from pathlib import Path

import click

from erase_diffusion.cli.terminal import Command, quiet_libraries


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--strength",
    type=float,
    default=0.0,
    show_default=True,
    help="0 gives the original back, bit for bit; a closed form can be given any other, up to 1, the whole way.",
)
@click.option("--model", help="Where the original lies, if not where the drop-in's record says.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace an erasure that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def restore(folder: Path, strength: float, model: str | None, output: Path, overwrite: bool, as_json: bool) -> None:
    """Take back the erasure in FOLDER, or change how strong it is, without doing its work again."""
    with quiet_libraries():
        from erase_diffusion.artifact import check_output
        from erase_diffusion.models import source_hash
        from erase_diffusion.restore import restore as take_back

        check_output(output, overwrite=overwrite)
        restored = take_back(folder, strength=strength, model=model)
        restored.save_pretrained(output, overwrite=overwrite)
        digest = source_hash(restored.encoder)
    if as_json:
        click.echo(json.dumps({"output": str(output), "strength": strength, "sha256": digest}))
    else:
        what = "the original text encoder" if strength == 0 else f"the erasure at strength {strength}, not verified"
        click.echo(f"{output}: {what} (sha256 {digest[:12]}…)")
