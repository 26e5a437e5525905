"""`erase-diffusion models` and `methods`: what there is to choose from."""

from __future__ import annotations

import dataclasses
import json

import click

from erase_diffusion.cli.terminal import Command


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def models(as_json: bool) -> None:
    """The models that are known by name; any folder in the diffusers layout and any hub id can be given too."""
    from erase_diffusion.mini.vocabulary import WEIGHTS
    from erase_diffusion.models import MODELS

    inside = str(WEIGHTS)
    rows = [
        {
            "name": m.name,
            **{
                part: source.replace(inside, "embedded")
                for part, source in (("source", m.source), ("clip", m.clip), ("judge", m.judge))
            },
            "steps": m.steps,
            "guidance": m.guidance,
        }
        for m in MODELS.values()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo("{name}: {source}; CLIP {clip}; judge {judge}; {steps} steps, guidance {guidance}".format(**row))


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def methods(as_json: bool) -> None:
    """The methods of erasing, what each one needs, and its settings with their defaults."""
    from erase_diffusion.erasers import ERASERS

    rows = []
    for name, (eraser, config) in ERASERS.items():
        settings = {f.name: f.default for f in dataclasses.fields(config)}
        about = (eraser.__doc__ or "").strip().splitlines()[0]
        rows.append({"name": name, "about": about, "needs": eraser(config()).needs, "settings": settings})
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        told = ", ".join(f"{k}={v}" for k, v in row["settings"].items())
        click.echo(f"{row['name']}: {row['about']}\n    needs {row['needs']}; {told or 'no settings'}")
