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

from erase_diffusion.cli.terminal import Command, check_device, progress_on_stderr, quiet_libraries
from erase_diffusion.errors import ConfigError

if TYPE_CHECKING:
    from erase_diffusion.audit.plan import Plan
    from erase_diffusion.audit.run import Audit
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
130 interrupted. Of several concepts and encoders the highest code counts.
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
    limits = _limits(max_found, min_kept)
    _check_threshold(threshold)
    quiet = drawing["quiet"]

    def then(job: Audit, plan: Plan) -> None:
        job.score(plan, checker=checker, name=_name(scores_name))
        if utility and job.ranks.main:
            job.utility(plan, utility)

    with quiet_libraries():
        main, made = _draw(drawing, then)
        if main:
            _report(drawing["output"], _name(scores_name), limits, threshold, shown, as_json, quiet, made)


@click.command(cls=Command)
@_DRAWING
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def generate(as_json: bool, **drawing: Any) -> None:
    """Only draw the images of an audit; `score` and `report` do the rest."""
    with quiet_libraries():
        main, made = _draw(drawing, lambda job, plan: None)
    if main:
        click.echo(json.dumps(made) if as_json else f"{drawing['output']}: " + _counted(made["counts"]))


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
    limits = _limits(max_found, min_kept)
    _check_threshold(threshold)
    with quiet_libraries():
        _report(folder, _name(scores_name), limits, threshold, shown, as_json, quiet, {"command": _command()})


def _draw(drawing: dict[str, Any], then: Callable[[Audit, Plan], None]) -> tuple[bool, dict[str, Any]]:
    """Plan and draw, then what comes after; returns whether this is the main process, and how it was made."""
    if bool(drawing["prompts"]) == drawing["suite"]:
        raise ConfigError("say what to ask: --prompts FILE, or --suite for the built-in prompts")
    if not drawing["erased"]:
        raise ConfigError("nothing to audit: name at least one drop-in folder with --erased")
    margin = drawing["margin"]
    if margin is not None and not 0 < margin < 0.5:
        raise ConfigError(f"--margin must lie between 0 and 0.5, got {margin}")
    import torch

    from erase_diffusion.audit.plan import read_plan
    from erase_diffusion.audit.run import Asked, Audit, default_cache
    from erase_diffusion.audit.work import Ranks, only_one
    from erase_diffusion.image_store import ImageStore
    from erase_diffusion.models import Model

    folder, quiet = drawing["output"], drawing["quiet"]
    asked = Asked(
        drawing["prompts"],
        drawing["per_group"],
        drawing["steps"],
        drawing["guidance"],
        drawing["seed"],
        drawing["batch_size"],
        drawing["attention"],
    )
    check_device(drawing["device"])
    cache = None if drawing["no_cache"] else ImageStore(drawing["cache"] or default_cache())
    ranks = Ranks.here(drawing["device"])
    device = drawing["device"]
    if device == "cuda" and ranks.count > 1:
        device = str(ranks.state.device)
    with only_one(folder, ranks), progress_on_stderr(quiet or not ranks.main) as progress:
        model = Model(drawing["model"], device=device, dtype=getattr(torch, drawing["dtype"]))
        job = Audit(model, folder, ranks, progress, lambda text: click.echo(text, err=True))
        plan = ranks.first_on_main(lambda: job.plan(drawing["erased"], asked, cache), then=lambda: read_plan(folder))
        if ranks.main and not quiet:
            _suggest(plan, margin)
        counts = job.draw(plan, cache)
        if ranks.main and not quiet:
            click.echo(_counted(vars(counts)), err=True)
        then(job, plan)
    return ranks.main, {"command": _command(), "processes": ranks.count, "counts": vars(counts)}


def _suggest(plan: Plan, margin: float | None) -> None:
    """Say what is cut, and what interval the prompts will bear."""
    prompts = plan.settings["prompts"]
    for name, told in (
        ("truncated", "are longer than the text encoder reads and are cut"),
        ("unseeded", "have no seed; theirs come from --seed and the case number"),
    ):
        if prompts.get(name):
            click.echo(f"{prompts[name]} of {prompts['count']} prompts {told}", err=True)
    if margin is not None:
        from erase_diffusion.significance import images_for_margin

        click.echo(
            f"an interval of ±{margin:.1%} needs {images_for_margin(margin, 0.0)} prompts for a concept that is gone, "
            f"{images_for_margin(margin)} whatever the rate; this audit asks {prompts['count']} of all groups",
            err=True,
        )


def _report(
    folder: Path,
    scores_name: str,
    limits: Any,
    threshold: float | None,
    shown: int,
    as_json: bool,
    quiet: bool,
    made: dict[str, Any],
) -> None:
    """Conclude, write report.html, .json and .md, print, and leave with the verdict's exit code."""
    from erase_diffusion.audit.run import report_of, write_report

    result, plan = report_of(folder, scores=scores_name, limits=limits(), threshold=threshold, made=made, shown=shown)
    page = write_report(result, plan)
    if as_json:
        click.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=2))
    elif not quiet:
        _print(result, page)
    sys.exit(result.exit_code)


def _print(result: AuditReport, page: Path) -> None:
    """Verdicts and figures as tables on stdout."""
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
                table.add_row(name, *map(escape, (str(g.before), str(g.after), true)), f"{g.p_adjusted:.2g}", g.verdict)
            console.print(table)
            table = Table("what must stay", "kept, of what the original showed")
            for name, r in c.kept.items():
                table.add_row(escape(name), escape(str(r)))
            console.print(table)
    if result.unscored[0]:
        console.print(escape(f"{result.unscored[0]} images could not be judged ({result.unscored[1]})"))
    console.print(f"[bold]{escape(str(page))}[/]", soft_wrap=True)


def _limits(max_found: float | None, min_kept: float | None) -> Callable[[], Any]:
    """The rule, checked now and made later: metrics is imported with the rest."""
    for name, value in (("--max-found", max_found), ("--min-kept", min_kept)):
        if value is not None and not 0 < value < 1:
            raise ConfigError(f"{name} must lie between 0 and 1, got {value}")

    def make() -> Any:
        from erase_diffusion.metrics import Limits

        rule = Limits()
        return replace(rule, max_found=max_found or rule.max_found, min_kept=min_kept or rule.min_kept)

    return make


def _check_threshold(threshold: float | None) -> None:
    if threshold is not None and not 0 < threshold < 1:
        raise ConfigError(f"--threshold must lie between 0 and 1, got {threshold}")


def _name(name: str) -> str:
    if not name.isascii() or not name.replace("-", "").replace("_", "").isalnum() or len(name) > 60:
        raise ConfigError(f"--scores must be a name of letters, digits, - and _, got {name[:60]!r}")
    return name


def _counted(counts: dict[str, Any]) -> str:
    told = f"{counts['drawn']} images drawn, {counts['reused']} originals reused, {counts['found']} were there"
    if counts["redone"] or counts["bad_lines"]:
        told += f"; {counts['redone']} damaged or lost images redone, {counts['bad_lines']} bad lines in the manifest"
    return told


def _command() -> str:
    """What was typed, however the program was started."""
    return shlex.join(["erase-diffusion", *sys.argv[1:]])
