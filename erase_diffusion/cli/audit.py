"""`erase-diffusion audit`, and its parts by themselves: generate, score, report."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from erase_diffusion.cli.terminal import Command, Progress, check_device, progress_on_stderr, quiet_libraries
from erase_diffusion.errors import ConfigError

if TYPE_CHECKING:
    from erase_diffusion.metrics import Limits
    from erase_diffusion.report.audit_report import AuditReport

EXAMPLES = """\b
Examples:
  erase-diffusion audit --model mini --erased erased-cat --suite --output audit-cat
  erase-diffusion audit --model sd-1.5 --erased no-church --prompts church.csv --output audit --device cuda
  accelerate launch --num_processes 4 -m erase_diffusion audit --erased erased-cat --suite --output audit-cat

\b
It may be killed at any time: the same command goes on where it stopped.
Exit codes: 0 every concept removed and the rest preserved; 1 an error; 2 bad usage; 10 partly removed;
11 not removed; 12 collapsed; 13 no effect; 14 inconclusive; 15 removed, but the rest is not proven preserved;
130 interrupted. Of several concepts and encoders the highest code counts. A launcher of several processes
turns every code but 0 into 1: erase-diffusion report FOLDER gives it again.
"""


def _options(*groups: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for option in reversed(groups):
            function = option(function)
        return function

    return decorate


_DRAWING = _options(
    click.option(
        "--model",
        default="mini",
        show_default=True,
        help="mini, sd-1.4, sd-1.5, sd-2.1, a folder in the diffusers layout, or a hub id.",
    ),
    click.option(
        "--erased",
        multiple=True,
        type=click.Path(path_type=Path),
        help="A drop-in folder of that model to audit; may be repeated.",
    ),
    click.option(
        "--prompts",
        type=click.Path(path_type=Path),
        help="CSV (case_number, prompt, evaluation_seed, if wished class, artist, evaluation_guidance), JSONL, text.",
    ),
    click.option("--suite", is_flag=True, help="The built-in prompts for what was erased, instead of a file."),
    click.option("--images", "per_group", default=60, show_default=True, help="Prompts for each group of the suite."),
    click.option("--output", required=True, type=click.Path(path_type=Path), help="The folder of the audit."),
    click.option("--steps", type=int, help="Denoising steps. [default: the model's]"),
    click.option("--guidance", type=float, help="For prompts that bring none. [default: the model's]"),
    click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True),
    click.option("--batch-size", type=int, help="Images drawn at once. [default: what fits]"),
    click.option(
        "--attention",
        type=click.Choice(["default", "sdpa", "xformers"]),
        default="default",
        show_default=True,
        help="How the UNet computes attention.",
    ),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …"),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float16", "bfloat16"]),
        default="float32",
        show_default=True,
        help="What UNet and VAE run in.",
    ),
    click.option(
        "--cache",
        type=click.Path(path_type=Path),
        help="Where originals are kept for later audits. [default: the user's cache folder]",
    ),
    click.option("--no-cache", is_flag=True, help="Keep and take no originals."),
    click.option("--margin", type=float, help="Say how many prompts an interval of ± this needs, before drawing."),
    click.option("--quiet", is_flag=True, help="No progress, no tables."),
)
_JUDGING = _options(
    click.option("--checker", help="Another CLIP as judge: a folder or a hub id. [default: the model's own judge]"),
    click.option("--scores", "scores_name", default="judge", show_default=True, help="The name of these scores."),
    click.option(
        "--utility",
        type=click.Choice(["judge", "inception"]),
        help="Measure the KID of what must stay as well, over these features (needs the extra utility).",
    ),
)
_RULE = _options(
    click.option(
        "--max-found", type=float, help="The found rate's upper end up to which it is removed. [default: 0.05]"
    ),
    click.option("--min-kept", type=float, help="Lower end of the kept rate that is asked for. [default: 0.85]"),
    click.option("--threshold", type=float, help="Probability from which it counts as found. [default: calibrated]"),
    click.option("--pairs", "shown", default=40, show_default=True, help="Pairs of each sort to show in the report."),
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
)


@click.command(cls=Command, epilog=EXAMPLES)
@_DRAWING
@_JUDGING
@_RULE
def audit(
    checker: str | None,
    scores_name: str,
    utility: str | None,
    max_found: float | None,
    min_kept: float | None,
    threshold: float | None,
    shown: int,
    as_json: bool,
    **drawing: Any,
) -> None:
    """Draw prompts with the original and with erased encoders from the same noise, judge them, and report.

    Everything goes into one folder: the images, a manifest, scores, and the report as HTML, JSON and Markdown.
    """
    # Words are checked before torch is imported: a typo answers at once.
    _check_usage(drawing)
    _check_threshold(threshold)
    limits, scores = _limits(max_found, min_kept), _name(scores_name)
    with quiet_libraries():
        from erase_diffusion.audit.run import run_audit

        with progress_on_stderr(drawing["quiet"]) as progress:
            result = run_audit(
                drawing["erased"],
                drawing["output"],
                checker=checker,
                scores=scores,
                features=utility,
                limits=limits,
                threshold=threshold,
                shown=shown,
                **_drawing(drawing, progress),
            )
        if result is not None:
            _print(result, drawing["output"], as_json, drawing["quiet"])


@click.command(cls=Command)
@_DRAWING
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def generate(as_json: bool, **drawing: Any) -> None:
    """Only draw the images of an audit; `score` and `report` do the rest."""
    _check_usage(drawing)
    with quiet_libraries():
        from erase_diffusion.audit.run import drawn

        with (
            progress_on_stderr(drawing["quiet"]) as progress,
            drawn(drawing["erased"], drawing["output"], **_drawing(drawing, progress)) as (job, _, counts),
        ):
            pass
    if job.ranks.main:
        click.echo(json.dumps(vars(counts)) if as_json else f"{drawing['output']}: {counts}")


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@_JUDGING
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--quiet", is_flag=True, help="No progress.")
def score(folder: Path, checker: str | None, scores_name: str, utility: str | None, device: str, quiet: bool) -> None:
    """Judge the images of the audit in FOLDER, with its judge or another; nothing is drawn again."""
    with quiet_libraries():
        from erase_diffusion.audit.plan import read_plan
        from erase_diffusion.audit.run import Audit
        from erase_diffusion.audit.work import Ranks, only_one
        from erase_diffusion.models import Model

        check_device(device)
        plan = read_plan(folder)
        ranks = Ranks.here(device)
        with only_one(folder, ranks), progress_on_stderr(quiet) as progress:
            job = Audit(Model(plan.settings["model"]["name"], device=device), folder, ranks, progress)
            done = job.score(plan, checker=checker, name=_name(scores_name))
            if utility and ranks.main:
                job.utility(plan, utility)
    if ranks.main:
        click.echo(f"{folder}: {done.judged} judged, {done.found} were there, {done.failed} could not be judged")


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--scores", "scores_name", default="judge", show_default=True, help="The scores to report.")
@_RULE
@click.option("--quiet", is_flag=True, help="No tables.")
def report(
    folder: Path,
    scores_name: str,
    max_found: float | None,
    min_kept: float | None,
    threshold: float | None,
    shown: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the report of the scored audit in FOLDER again: another rule or threshold, without drawing or judging."""
    _check_threshold(threshold)
    limits, scores = _limits(max_found, min_kept), _name(scores_name)
    with quiet_libraries():
        from erase_diffusion.audit.run import report_of, write_report

        result, plan = report_of(
            folder,
            scores=scores,
            limits=limits,
            threshold=threshold,
            shown=shown,
        )
        write_report(result, plan)
        _print(result, folder, as_json, quiet)


def _check_usage(given: dict[str, Any]) -> None:
    """Raise ConfigError for options of drawing that contradict each other or lie outside their range."""
    if bool(given["prompts"]) == given["suite"]:
        raise ConfigError("say what to ask: --prompts FILE, or --suite for the built-in prompts")
    if not given["erased"]:
        raise ConfigError("nothing to audit: name at least one drop-in folder with --erased")
    if given["margin"] is not None and not 0 < given["margin"] < 0.5:
        raise ConfigError(f"--margin must lie between 0 and 0.5, got {given['margin']}")


def _drawing(given: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The options of drawing as the library takes them."""
    import torch

    from erase_diffusion.audit.run import Asked, default_cache
    from erase_diffusion.image_store import ImageStore

    check_device(given["device"])
    names = ("prompts", "per_group", "steps", "guidance", "seed", "batch_size", "attention")
    return {
        **{name: given[name] for name in ("model", "device", "margin")},
        "asked": Asked(**{name: given[name] for name in names}),
        "dtype": getattr(torch, given["dtype"]),
        "cache": None if given["no_cache"] else ImageStore(given["cache"] or default_cache()),
        "command": _command(),
        "progress": progress,
        "tell": (lambda text: None) if given["quiet"] else (lambda text: click.echo(text, err=True)),
    }


def _print(result: AuditReport, folder: Path, as_json: bool, quiet: bool) -> None:
    """Verdicts and figures on stdout, and the exit code."""
    if as_json:
        click.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=2))
    elif not quiet:
        _tables(result, folder / "report.html")
    sys.exit(result.exit_code)


def _tables(result: AuditReport, page: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    for encoder in result.encoders:
        for c in encoder.concepts:
            colour = "green" if c.exit_code == 0 else "yellow" if c.verdict in ("inconclusive", "removed") else "red"
            tail = ", but the rest is not proven preserved" if c.verdict == "removed" and c.damaged else ""
            console.print(
                f"[bold {colour}]{escape(encoder.name)}, {escape(c.concept)}: {c.verdict}{tail}[/]  {escape(c.rule)}"
            )
            table = Table()
            for heading in ("prompts", "original shows it", "erased shows it", "corrected", "p (Holm)", "alone"):
                table.add_column(heading)
            for name, g in c.groups.items():
                true = str(g.corrected) if g.corrected else "–"
                table.add_row(
                    name, *map(escape, (str(g.before), str(g.after), true)), f"{g.p_adjusted or 0:.2g}", g.verdict
                )
            if c.groups:
                console.print(table)
            table = Table("what must stay", "kept, of what the original showed")
            for name, r in c.kept.items():
                table.add_row(escape(name), escape(str(r)))
            console.print(table)
    if result.unscored[0]:
        console.print(escape(f"{result.unscored[0]} images could not be judged ({result.unscored[1]})"))
    console.print(f"[bold]{escape(str(page))}[/]", soft_wrap=True)


def _limits(max_found: float | None, min_kept: float | None) -> Limits:
    from erase_diffusion.metrics import Limits

    for name, value in (("--max-found", max_found), ("--min-kept", min_kept)):
        if value is not None and not 0 < value < 1:
            raise ConfigError(f"{name} must lie between 0 and 1, got {value}")
    rule = Limits()
    return replace(rule, max_found=max_found or rule.max_found, min_kept=min_kept or rule.min_kept)


def _check_threshold(threshold: float | None) -> None:
    if threshold is not None and not 0 < threshold < 1:
        raise ConfigError(f"--threshold must lie between 0 and 1, got {threshold}")


def _name(name: str) -> str:
    if not name.isascii() or not name.replace("-", "").replace("_", "").isalnum() or len(name) > 60:
        raise ConfigError(f"--scores must be a name of letters, digits, - and _, got {name[:60]!r}")
    return name


def _command() -> str:
    """What was typed, however the program was started."""
    return shlex.join(["erase-diffusion", *sys.argv[1:]])
