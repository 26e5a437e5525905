"""`erase-concept`: remove concepts and prove it, one library call."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from erase_diffusion.cli.terminal import SETTINGS, Command, check_device, progress_on_stderr, quiet_libraries
from erase_diffusion.errors import ConfigError

if TYPE_CHECKING:
    from erase_diffusion.erase import ErasedConcept

EXAMPLES = """\b
Examples:
  erase-concept --concept cat --model mini
  erase-concept --concept crayon --kind style --model mini --output no-crayon
  erase-concept --concept cat --alias "tabby" --anchor dog --preserve dog --preserve car --json

\b
Exit codes: 0 removed and the rest preserved (with --no-verify: erased, and nothing claimed);
1 an error; 2 bad usage; 10 partly removed; 11 not removed;
12 collapsed; 13 no effect; 14 inconclusive; 15 removed, but the rest is not proven preserved; 130 interrupted.
"""


@click.command(cls=Command, epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--concept", "concepts", multiple=True, help="What to erase; may be repeated.")
@click.option(
    "--concepts-file",
    type=click.Path(path_type=Path),
    help="A CSV file of what to erase: a column concept, and if wished kind, alias, anchor, within.",
)
@click.option(
    "--model",
    default="mini",
    show_default=True,
    help="mini, sd-1.4, sd-1.5, sd-2.1, a folder in the diffusers layout, or a hub id.",
)
@click.option(
    "--kind",
    help="object, style, character or attribute. [default: object; with --within what the word is known as]",
)
@click.option(
    "--alias",
    "aliases",
    multiple=True,
    help="A synonym to remove with it; may be repeated. Those the model's vocabulary knows are added.",
)
@click.option(
    "--anchor",
    help="What the concept becomes. Default: the neutral style for a style, else the nearest preserved concept.",
)
@click.option(
    "--within",
    help="Erase an attribute or style on this thing alone: --concept red --within cat, --concept crayon --within cat.",
)
@click.option(
    "--preserve",
    multiple=True,
    help="An object or character that must stay; may be repeated. Default: everything else in the model's vocabulary. "
    "Styles and colours are kept in any case.",
)
@click.option(
    "--method",
    default=None,
    help="cliperase (default), nullspace, multimodal-nullspace, subgroup, lipschitz; to measure against: token-swap, "
    "single-layer, gradient-difference, gradient-ascent, retain-finetune.",
)
@click.option("--strength", type=float, help="From 0, the encoder as it is, to 1, the whole way. [default: 1]")
@click.option("--steps", type=int, help="Training steps at most, for methods that train.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the method, for example --set towers=both or --set forgetting_form=raw; may be repeated.",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="What UNet and VAE run in.",
)
@click.option(
    "--forget-images",
    type=click.Path(path_type=Path),
    help="Your own images of the concept (imagefolder layout) instead of drawn ones.",
)
@click.option(
    "--retain-images",
    type=click.Path(path_type=Path),
    help="Your own images of what must stay, captioned in metadata.jsonl.",
)
@click.option(
    "--skip-bad",
    is_flag=True,
    help="Go on without images or lines that cannot be read; they are counted in the record.",
)
@click.option(
    "--from",
    "start",
    type=click.Path(path_type=Path),
    help="Go on from this drop-in folder: what it has forgotten stays forgotten, and is verified again.",
)
@click.option("--output", type=click.Path(path_type=Path), help="The folder to write. [default: erased-CONCEPT]")
@click.option("--overwrite", is_flag=True, help="Replace an erasure that is there.")
@click.option(
    "--images",
    "images_per_group",
    type=click.IntRange(8, 2000),
    default=60,
    show_default=True,
    help="Pictures drawn for each group of the verification, and of the calibration.",
)
@click.option("--no-verify", is_flag=True, help="Only erase: no pictures, no verdict.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@click.option("--quiet", is_flag=True, help="No progress, no table.")
@click.version_option(package_name="erase-diffusion")
def erase_concept(
    concepts: tuple[str, ...],
    concepts_file: Path | None,
    aliases: tuple[str, ...],
    preserve: tuple[str, ...],
    output: Path | None,
    overwrite: bool,
    no_verify: bool,
    as_json: bool,
    quiet: bool,
    dtype: str,
    method: str | None,
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Remove a concept from a Stable Diffusion model by editing its CLIP text encoder, and prove it.

    Writes a drop-in text encoder, a before/after picture, a record and a model card into one folder.
    """
    # Words are checked before torch is imported: a typo answers at once.
    from erase_diffusion.concepts import Concept
    from erase_diffusion.concepts_file import read_concepts

    kind = options["kind"] or ("attribute" if options["within"] else "object")
    for c in concepts:
        Concept(c, kind, aliases, options["anchor"], options["within"])  # type: ignore[arg-type]  # it checks itself
    if aliases and len(concepts) > 1:
        raise ConfigError(
            f"--alias belongs to one concept, got {len(concepts)} concepts; give each its own in a --concepts-file"
        )
    listed = read_concepts(concepts_file, kind=options["kind"]) if concepts_file else ()
    if listed and (aliases or options["anchor"] or options["within"]):
        raise ConfigError("--alias, --anchor and --within belong to a --concept; the file has columns for them")
    if not concepts and not listed:
        raise ConfigError("nothing to erase: name it with --concept, or list it in a --concepts-file")
    names = [*concepts, *(c.name for c in listed)]
    folder = output or Path("erased-" + "-".join(_slug(c) for c in names)[:80])
    with quiet_libraries():
        import torch

        from erase_diffusion.artifact import check_output
        from erase_diffusion.erase import DEFAULT_METHOD
        from erase_diffusion.erase import erase_concept as erase

        check_output(folder, overwrite=overwrite)
        check_device(options["device"])
        with progress_on_stderr(quiet) as progress:
            result = erase(
                [*concepts, *listed],
                aliases=aliases,
                preserve=preserve,
                method=method or DEFAULT_METHOD,
                settings=_settings(settings),
                dtype=getattr(torch, dtype),
                verify=not no_verify,
                progress=progress,
                **options,
            )
        result.save_pretrained(folder, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(result.record | {"output": str(folder)}, ensure_ascii=False, indent=2))
    elif not quiet:
        _print_summary(result, folder)
    sys.exit(result.exit_code)


def _settings(given: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is a number, true, false or null where it reads as one, else a word."""
    settings: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set takes NAME=VALUE, got {text!r}")
        try:
            settings[name.strip()] = json.loads(value)
        except ValueError:
            settings[name.strip()] = value.strip()
    return settings


def _slug(word: str) -> str:
    """A word as a safe file name."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in word.lower()).strip("-") or "concept"


def _print_summary(result: ErasedConcept, folder: Path) -> None:
    """The verdict and its figures, as tables on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    for concept, v in zip(result.concepts, result.verifications, strict=False):
        colour = "green" if v.exit_code == 0 else "yellow" if v.verdict in ("inconclusive", "removed") else "red"
        tail = "" if v.preserved else ", but the rest is not proven preserved" if v.verdict == "removed" else ""
        console.print(f"[bold {colour}]{escape(concept.name)}: {v.verdict}{tail}[/]  {escape(v.rule)}")
        table = Table(title_justify="left", title="the concept is found (Wilson 95 %)")
        for heading in ("prompts", "original", "erased"):
            table.add_column(heading)
        for group, (before, after) in v.groups.items():
            table.add_row(group, escape(str(before)), escape(str(after)))
        console.print(table)
        table = Table(title_justify="left", title="kept, of what the original showed")
        table.add_column("what must stay")
        table.add_column("kept")
        for name, r in v.kept.items():
            table.add_row(name, escape(str(r)))
        console.print(table)
        c = v.calibration
        console.print(escape(f"judge: threshold {c.threshold:.3f}, false alarms {c.false_alarms}, misses {c.misses}"))
        console.print("CLIP score of preserved prompts: {:.1f} before, {:.1f} after".format(*v.clip_score))
    if not result.verifications:
        console.print("not verified: nothing is claimed of this erasure")
    console.print(
        escape(
            f"becomes: {', '.join(str(c.anchor) for c in result.concepts)}; "
            f"{result.erasure.stopped}; {result.record['seconds']:.1f} s"
        )
    )
    console.print(f"[bold]{escape(str(folder))}[/]", soft_wrap=True)
