"""The bars of the main job: erase each concept in turn, and print what is gone and what is kept.

    python scripts/measure_erasure.py --output runs/erasure.json
    python scripts/measure_erasure.py --method nullspace --concept cat --concept crayon:style

Prompts are held-out templates and every picture has its own seed. The last row is the median over the concepts.
Resumable: concepts that --output already holds are not measured again.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from erase_diffusion.concepts import Concept
from erase_diffusion.erase import DEFAULT_METHOD, erase_concept

CONCEPTS = ("cat", "dog", "car", "boat", "flower", "house", "crayon:style", "watercolour:style", "Zibby:character")
COLUMNS = {
    "named + synonym": "≤ 1 %",
    "described": "≤ 5 %",
    "preserved": "≥ 97 %",
    "other object": "≥ 95 %",
    "rest of the prompt": "≥ 90 %",
    "seconds": "≤ 30 s / ≤ 2 s",
}


def pooled(rates: list[Mapping[str, Any]]) -> tuple[int, int]:
    return sum(r["found"] for r in rates), sum(r["total"] for r in rates)


def figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of one concept from its record: (found, total) each, and the seconds."""
    v = record["verification"][0]
    found, kept = v["found"], v["kept"]
    rest = [kept[k] for k in kept if k.endswith("of an erased prompt") and not k.startswith("object")]
    return {
        "before": pooled([found[g]["before"] for g in ("named", "synonym") if g in found]),
        "named + synonym": pooled([found[g]["after"] for g in ("named", "synonym") if g in found]),
        "described": pooled([found["described"]["after"]]) if "described" in found else None,
        "preserved": pooled([kept["preserved concepts"]]),
        "other object": pooled(
            [kept[k] for k in ("other object of a pair", "object of an erased prompt") if k in kept]
        ),
        "rest of the prompt": pooled(rest),
        "seconds": record["seconds"],
        "verdict": v["verdict"] if v["preserved"] else f"{v['verdict']}, rest not proven",
        "anchor": record["concepts"][0]["anchor"],
        "false alarms": pooled([v["checker"]["false_alarms"]]),
    }


def shown(value: Any) -> str:
    if value is None or (isinstance(value, list | tuple) and not value[1]):
        return "–"
    if isinstance(value, list | tuple):
        from erase_diffusion.metrics import Rate

        r = Rate(*value)
        return f"{r.value:.1%} [{r.low:.1%}, {r.high:.1%}]"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


@click.command(help=__doc__)
@click.option("--concept", "concepts", multiple=True, default=CONCEPTS, show_default=True, help="NAME or NAME:KIND.")
@click.option("--method", default=DEFAULT_METHOD, show_default=True)
@click.option("--set", "settings", multiple=True, help="A setting of the method, NAME=VALUE.")
@click.option("--model", default="mini", show_default=True)
@click.option("--images", default=200, show_default=True, help="Pictures for each group and each encoder.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True, help="CPU threads; the bars are for two.")
@click.option("--output", type=click.Path(path_type=Path), help="Where to keep the figures as JSON.")
def main(
    concepts: tuple[str, ...],
    method: str,
    settings: tuple[str, ...],
    model: str,
    images: int,
    seed: int,
    threads: int,
    output: Path | None,
) -> None:
    torch.set_num_threads(threads)
    given = {k: json.loads(v) for k, v in (s.split("=", 1) for s in settings)}
    asked = {"method": method, "settings": given, "model": model, "images": images, "seed": seed}
    kept = json.loads(output.read_text()) if output and output.exists() else {"asked": asked, "rows": {}}
    if kept["asked"] != asked:
        raise click.UsageError(f"{output} holds figures of {kept['asked']}, not of {asked}; choose another --output")
    rows: dict[str, dict[str, Any]] = kept["rows"]
    for text in concepts:
        if text in rows:
            continue
        name, _, kind = text.partition(":")
        started = time.perf_counter()
        result = erase_concept(
            Concept(name, kind or "object"),  # type: ignore[arg-type]
            model=model,
            method=method,
            settings=given,
            seed=seed,
            images_per_group=images,
        )
        rows[text] = figures(result.record)
        click.echo(f"{text}: {rows[text]} ({time.perf_counter() - started:.0f} s in all)", err=True)
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.with_suffix(".tmp").write_text(json.dumps(kept, indent=1, ensure_ascii=False))
            os.replace(output.with_suffix(".tmp"), output)
    names = ["before", *COLUMNS, "false alarms", "anchor", "verdict"]
    click.echo(f"| {method} | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for text in concepts:
        click.echo(f"| {text.replace(':', ', ')} | " + " | ".join(shown(rows[text][c]) for c in names) + " |")

    def median(column: str) -> str:
        values = [rows[t][column] for t in concepts]
        if column == "seconds":
            return f"{statistics.median(values):.1f}"
        shares = [f / n for f, n in (v for v in values if v) if n]
        return f"{statistics.median(shares):.1%}" if shares else "–"

    click.echo("| **median** | " + " | ".join(median(c) for c in ("before", *COLUMNS, "false alarms")) + " | | |")
    click.echo("| bar | ≥ 95 % | " + " | ".join(COLUMNS.values()) + " | ≤ 1 % | | |")


if __name__ == "__main__":
    main()
