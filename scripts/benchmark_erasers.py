"""Every method on every concept: what is gone, what leaks, what is kept, and what it costs.

    python scripts/benchmark_erasers.py --quick
    python scripts/benchmark_erasers.py --output runs/erasers.json --report docs/benchmark.md
    python scripts/benchmark_erasers.py --method nullspace --concept cat --concept crayon:style

Prompts are of held-out templates, original and erased are drawn from the same noise, and the judge is a CLIP that has
seen nothing of the erasers'. Resumable: what --output holds already is not measured again. Two halves of the work
can run side by side with an --output each; --merge joins them for the report.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from eraser_benchmark.rows import CELL_ROWS, ROWS
from eraser_benchmark.table import plot, report

from erase_diffusion.concepts import Concept
from erase_diffusion.models import Model

CONCEPTS = (
    *("cat", "dog", "car", "boat", "flower", "house"),
    *("crayon:style", "watercolour:style", "Zibby:character", "orange"),
    *("red:attribute:cat", "crayon:style:cat"),
)
TOGETHER = ("cat", "car", "flower", "house", "dog", "boat", "umbrella", "apple")
CELLS = ("cat", "crayon:style", "crayon:style:cat")  # a class, a domain, a class in one domain
SECTIONS = ("one", "within", "together", "cells")
COUNTS = (1, 2, 4, 8)
QUICK_ROWS = ("cliperase", "nullspace", "token-swap", "gradient-difference")


def concept(text: str) -> Concept:
    """“crayon:style”, “red:attribute:cat” (within cat)."""
    name, kind, within = [*text.split(":"), "", ""][:3]
    return Concept(name, kind or "object", within=within or None)  # type: ignore[arg-type]


def save(figures: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


@click.command(help=__doc__)
@click.option("--model", default="mini", show_default=True)
@click.option("--method", "rows", multiple=True, type=click.Choice(list(ROWS)), help="Rows; all if none is named.")
@click.option("--concept", "concepts", multiple=True, default=CONCEPTS, show_default=True, help="NAME[:KIND[:WITHIN]].")
@click.option(
    "--count",
    "counts",
    multiple=True,
    type=int,
    default=COUNTS,
    show_default=True,
    help="Concepts at once; 0 for none.",
)
@click.option("--images", default=60, show_default=True, help="Pictures for each group and each encoder.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--quick", is_flag=True, help="One concept, four methods, few pictures: under five minutes.")
@click.option("--output", type=click.Path(path_type=Path), help="The figures as JSON, kept as they come in.")
@click.option("--merge", multiple=True, type=click.Path(path_type=Path, exists=True), help="Further figures to show.")
@click.option("--report", "report_path", type=click.Path(path_type=Path), help="The table as Markdown, a plot beside.")
def main(
    model: str,
    rows: tuple[str, ...],
    concepts: tuple[str, ...],
    counts: tuple[int, ...],
    images: int,
    seed: int,
    threads: int,
    quick: bool,
    output: Path | None,
    merge: tuple[Path, ...],
    report_path: Path | None,
) -> None:
    torch.set_num_threads(threads)
    if quick:
        rows, concepts, counts, images = (
            rows or QUICK_ROWS,
            concepts if concepts != CONCEPTS else ("cat",),
            (2,),
            min(images, 12),
        )
    asked = {"model": model, "images": images, "seed": seed}
    figures: dict[str, Any] = json.loads(output.read_text()) if output and output.exists() else {}
    figures = {"asked": asked, **{section: {} for section in SECTIONS}} | figures
    if figures["asked"] != asked:
        raise click.UsageError(f"{output} holds figures of {figures['asked']}, not of {asked}; choose another --output")
    for path in merge:
        other = json.loads(path.read_text())
        if other["asked"] != asked:
            raise click.UsageError(f"{path} holds figures of {other['asked']}, not of {asked}")
        for section in SECTIONS:
            for name, cells in other.get(section, {}).items():
                figures[section].setdefault(name, {}).update(cells)
    chosen = rows or tuple(ROWS)
    tasks = [("within" if concept(text).within else "one", text, [concept(text)]) for text in concepts]
    tasks += [("cells", text, [concept(text)]) for text in concepts if text in CELLS and model == "mini" and not quick]
    tasks += [("together", str(n), [Concept(c) for c in TOGETHER[:n]]) for n in counts if n > 0]
    bench = None
    for section, name, erased in tasks:
        done: dict[str, Any] = figures[section].setdefault(name, {})
        left = [r for r in chosen if r not in done]
        if section == "cells":
            left = [r for r in left if r in CELL_ROWS]
        elif section != "one":
            # Variants of a method are told apart on single concepts; a swapped word knows no “within”.
            left = [r for r in left if ROWS[r].pictures and not ROWS[r].settings]
            left = [r for r in left if section == "together" or ROWS[r].method != "token-swap"]
        if model != "mini":
            left = [r for r in left if not ROWS[r].drawings]
        if not left:
            continue
        if bench is None:
            from eraser_benchmark.measure import Bench

            bench = Bench(Model(model), images, seed)
        started = time.perf_counter()
        work = bench.start(erased, asked=section != "cells", leaks=section != "together")
        if section != "cells":
            done["original"] = work.original()
        elif "original" not in done:
            done["original"] = work.measure_cells(None)
        for row in left:
            done[row] = work.measure_cells(ROWS[row]) if section == "cells" else work.measure(ROWS[row])
            click.echo(f"{section} {name}, {row}: {time.perf_counter() - started:.0f} s", err=True)
            if output:
                save(figures, output)
    text = report(figures)
    if report_path:
        report_path.write_text(text, encoding="utf-8")
        plot(figures, report_path.with_suffix(".png"))
    else:
        click.echo(text)


if __name__ == "__main__":
    main()
