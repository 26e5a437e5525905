"""The benchmark's figures as Markdown and as one plot. Knows no model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from erase_diffusion.metrics import Rate, together
from eraser_benchmark.rows import ROWS

DEFAULT = "cliperase"
Cell = Mapping[str, Any]


def pool(rates: Sequence[Mapping[str, Any] | None]) -> Rate | None:
    """Several recorded rates as one; None when there are none."""
    some = [Rate(r["found"], r["total"]) for r in rates if r and r["total"]]
    return together(some) if some else None


def found(*groups: str) -> Callable[[Cell], Rate | None]:
    return lambda c: pool([c.get("found", {}).get(g) for g in groups])


def kept(*rows: str) -> Callable[[Cell], Rate | None]:
    return lambda c: pool([c.get("kept", {}).get(r) for r in rows])


def clip(name: str) -> Callable[[Cell], Rate | None]:
    return lambda c: pool([(c.get("clip") or {}).get(name)])


def recall(side: str, k: int) -> Callable[[Cell], Rate | None]:
    def get(c: Cell) -> Rate | None:
        table = (c.get("clip") or {}).get("retrieval") or {}
        return pool([table.get(f"{side}, {way}", {}).get(f"R@{k}") for way in ("text to image", "image to text")])

    return get


GONE: dict[str, Callable[[Cell], Rate | None]] = {
    "named": found("named"),
    "synonym": found("synonym"),
    "described": found("described"),
    "ambiguous": found("ambiguous"),
    "two-object": found("two-object"),
    "misspelt": found("misspelt"),
}
KEPT: dict[str, Callable[[Cell], Rate | None]] = {
    "preserved": kept("preserved concepts"),
    "nearest": kept("nearest concepts"),
    "other object": kept("other object of a pair", "object of an erased prompt"),
    "rest of the prompt": kept(*(f"{part} of an erased prompt" for part in ("attribute", "place", "style"))),
    "colours": kept("attribute of a preserved prompt"),
    "places": kept("place of a preserved prompt"),
    "styles": kept("style of a preserved prompt"),
    "the character": kept("the character"),
    "other meaning": kept("other meaning of the word"),
}
CLIP: dict[str, Callable[[Cell], Rate | None]] = {
    "zero-shot forget": clip("zero-shot forget"),
    "zero-shot retain": clip("zero-shot retain"),
    **{f"{side} R@{k}": recall(side, k) for side in ("forget", "retain") for k in (1, 5, 10)},
}


def cells_of(figures: Mapping[str, Any], section: str, row: str) -> list[Cell]:
    """What a row measured, one cell a concept."""
    return [cell for done in figures[section].values() if row in done for cell in done[row]["concepts"].values()]


def rows_of(figures: Mapping[str, Any], section: str) -> list[str]:
    there = {row for done in figures[section].values() for row in done}
    return [row for row in ("original", *ROWS) if row in there]


def median(cells: Sequence[Cell], column: Callable[[Cell], Rate | None]) -> str:
    values = [r.value for r in map(column, cells) if r is not None]
    return f"{statistics.median(values):.1%}" if values else "–"


def pooled(cells: Sequence[Cell], column: Callable[[Cell], Rate | None]) -> str:
    rates = [r for r in map(column, cells) if r is not None]
    if not rates:
        return "–"
    r = together(rates)
    return f"{r.value:.1%} [{r.low:.1%}, {r.high:.1%}] of {r.total}"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)) + "\n"


def cost(done: Mapping[str, Any], row: str, name: str) -> str:
    values = [d[row][name] for d in done.values() if row in d and d[row].get(name) is not None]
    return f"{statistics.median(values):.1f}" if values else "–"


def mean(cells: Sequence[Cell], name: str) -> str:
    values = [c[name] for c in cells if c.get(name) is not None]
    return f"{statistics.mean(values):.1f}" if values else "–"


def summary(figures: Mapping[str, Any]) -> str:
    """The short table: medians over the concepts."""
    columns = {
        "named + synonym": found("named", "synonym"),
        **{k: GONE[k] for k in ("described", "two-object", "misspelt")},
        **{k: KEPT[k] for k in ("preserved", "nearest", "other object", "rest of the prompt")},
        "zero-shot forget": CLIP["zero-shot forget"],
        "zero-shot retain": CLIP["zero-shot retain"],
    }
    lines = []
    for row in rows_of(figures, "one"):
        cells = cells_of(figures, "one", row)
        shown = [median(cells, c) for c in columns.values()]
        name = f"`{row}`" if row in ROWS else row
        lines.append([name, *shown, cost(figures["one"], row, "seconds"), str(len(cells))])
    return markdown(["median over the concepts", *columns, "seconds", "concepts"], lines)


def report(figures: Mapping[str, Any]) -> str:
    """Everything, as Markdown: found, kept, CLIP's own tasks, cost, growth, and each concept's verdict."""
    asked, one = figures["asked"], figures["one"]
    parts = [
        "# Every method side by side\n",
        f"`python scripts/benchmark_erasers.py --model {asked['model']} --images {asked['images']}`: "
        f"{', '.join(one)}, each erased alone, {asked['images']} pictures a group, held-out prompts, the same noise "
        "before and after. Rates over all concepts together with Wilson's 95 % interval and the number of pictures; "
        "what is kept is of what the original showed.\n",
        "## In short\n",
        summary(figures),
        "## The bars\n",
        bars(figures),
    ]
    for title, columns in (("What is still found", GONE), ("What is kept", KEPT), ("On the CLIP itself", CLIP)):
        lines = [
            [row, *(pooled(cells_of(figures, "one", row), c) for c in columns.values())]
            for row in rows_of(figures, "one")
        ]
        parts += [f"## {title}\n", markdown([title.lower(), *columns], lines)]
    lines = []
    for row in rows_of(figures, "one"):
        cells = cells_of(figures, "one", row)
        moved = [mean(cells, n) for n in ("clip_score", "drift")]
        lines.append([row, *moved, *(cost(one, row, n) for n in ("seconds", "peak_mib"))])
    parts += [
        "## Pictures and cost\n",
        "CLIP score of preserved prompts (the judge's, ×100); their mean pixel difference from the original's picture "
        "(of 255); median seconds and peak memory of the erasure alone, above what the process held before.\n",
        markdown(["row", "CLIP score", "drift", "seconds", "peak MiB"], lines),
    ]
    if figures.get("within"):
        parts += ["## A look on one thing alone\n", within(figures)]
    if figures["together"]:
        parts += ["## Several concepts at once\n", growth(figures)]
    if any(figures.get("cells", {}).values()):
        parts += ["## Class by domain\n", cells_tables(figures)]
    names = list(one)
    lines = []
    for row in rows_of(figures, "one"):
        if row != "original" and any("verdict" in c for c in cells_of(figures, "one", row)):
            lines.append([row, *(verdict(one[n], row) for n in names)])
    parts += ["## Verdicts\n", markdown(["row", *names], lines)]
    return "\n".join(parts)


def verdict(done: Mapping[str, Any], row: str) -> str:
    return "; ".join(c.get("verdict", "–") for c in done[row]["concepts"].values()) if row in done else "–"


def bars(figures: Mapping[str, Any]) -> str:
    """Each bar beside its figure: medians over the concepts, pooled where concepts go together."""

    def medians(row: str, column: Callable[[Cell], Rate | None]) -> tuple[float | None, str]:
        # The bars are for six objects, two styles and the character; the word of two meanings has rows of its own.
        two = column in (GONE["ambiguous"], KEPT["other meaning"])
        cells = [c for c in cells_of(figures, "one", row) if two or "ambiguous" not in c.get("found", {})]
        values = [r.value for r in map(column, cells) if r is not None]
        return (statistics.median(values), f"median of {len(values)}") if values else (None, "")

    def at_once(column: Callable[[Cell], Rate | None]) -> tuple[float | None, str]:
        done = figures["together"].get("8", {}).get(DEFAULT)
        rates = [r for c in done["concepts"].values() if (r := column(c)) is not None] if done else []
        return (together(rates).value, str(together(rates))) if rates else (None, "")

    def look(row: str, task: str, column: Callable[[Cell], Rate | None]) -> tuple[float | None, str]:
        done = figures.get("within", {}).get(task, {}).get(row)
        r = column(next(iter(done["concepts"].values()))) if done else None
        return (r.value, str(r)) if r else (None, "")

    def relative(row: str) -> tuple[float | None, str]:
        """Zero-shot retain accuracy, of the original's."""
        column, shares = CLIP["zero-shot retain"], []
        for done in figures["one"].values():
            for name, cell in done.get(row, {"concepts": {}})["concepts"].items():
                after, before = column(cell), column(done["original"]["concepts"][name])
                if after and before:
                    shares.append(after.value / before.value)
        return (statistics.median(shares), f"median of {len(shares)}") if shares else (None, "")

    paper, projection = "cliperase, the paper's form", "nullspace, at the projection"
    red, crayon = "red:attribute:cat", "crayon:style:cat"
    same_thing, same_look = kept("same thing, other looks"), kept("same look, other things")
    asked: list[tuple[str, tuple[float | None, str], str, float]] = [
        (f"{DEFAULT}: named + synonym found", medians(DEFAULT, found("named", "synonym")), "≤", 0.005),
        ("described found", medians(DEFAULT, GONE["described"]), "≤", 0.03),
        ("misspelt found", medians(DEFAULT, GONE["misspelt"]), "≤", 0.01),
        ("ambiguous word: the thing found", medians(DEFAULT, GONE["ambiguous"]), "", math.nan),
        ("ambiguous word: its other meaning kept", medians(DEFAULT, KEPT["other meaning"]), "≥", 0.90),
        ("preserved concepts kept", medians(DEFAULT, KEPT["preserved"]), "≥", 0.98),
        ("nearest concepts kept", medians(DEFAULT, KEPT["nearest"]), "≥", 0.93),
        ("the rest of an erased prompt kept", medians(DEFAULT, KEPT["rest of the prompt"]), "≥", 0.95),
        ("8 concepts at once: found", at_once(found("named", "synonym")), "≤", 0.01),
        ("8 concepts at once: preserved", at_once(KEPT["preserved"]), "≥", 0.93),
        ("subgroup: red cats found", look("subgroup", red, found("named")), "≤", 0.10),
        ("subgroup: other cats kept", look("subgroup", red, same_thing), "≥", 0.85),
        ("subgroup: other red things kept", look("subgroup", red, same_look), "≥", 0.93),
        (f"{DEFAULT}: crayon cats found", look(DEFAULT, crayon, found("named")), "≤", 0.10),
        ("plain cats kept", look(DEFAULT, crayon, same_thing), "≥", 0.85),
        ("crayon others kept", look(DEFAULT, crayon, same_look), "≥", 0.93),
        (f"{paper}: zero-shot forget", medians(paper, CLIP["zero-shot forget"]), "≤", 0.0),
        ("zero-shot retain, of the original's", relative(paper), "≥", 0.90),
        (f"{projection}: zero-shot forget", medians(projection, CLIP["zero-shot forget"]), "≤", 0.01),
        ("zero-shot retain, of the original's", relative(projection), "≥", 0.97),
    ]
    lines = []
    for name, (value, told), sign, bar in asked:
        met = "not measured" if value is None else "met" if (value <= bar if sign == "≤" else value >= bar) else "short"
        if not sign:  # shown beside the next, which has a bar
            lines.append([name, "–" if value is None else f"{value:.1%} ({told})", "–", ""])
            continue
        shown = "–" if value is None else f"{value:.1%}"
        lines.append(
            [name, f"{shown} ({told})" if told and "[" not in told else told or shown, f"{sign} {bar:.1%}", met]
        )
    return markdown(["what", "figure", "bar", ""], lines)


def within(figures: Mapping[str, Any]) -> str:
    """Of each look that was erased on one thing alone: found there, and kept on that thing and on others."""
    columns = {
        "found": found("named"),
        "the thing in other looks": kept("same thing, other looks"),
        "the look on other things": kept("same look, other things"),
        "preserved": KEPT["preserved"],
    }
    lines = []
    for row in rows_of(figures, "within"):
        for name, done in figures["within"].items():
            if row in done:
                cells = list(done[row]["concepts"].values())
                look, _, thing = name.split(":")
                lines.append([row, f"{look}, on {thing}", *(pooled(cells, c) for c in columns.values())])
    return markdown(["row", "erased", *columns], lines)


def cells_tables(figures: Mapping[str, Any]) -> str:
    """For each erasure its cells pooled into those that must go and those that must stay; then the cells themselves."""
    parts = [
        "What is erased is a row, a column or one cell of class and domain; *must go* and *must stay* pool the cells. "
        "Zero-shot: the CLIP's own accuracy among all cells on held-out drawings. Pictures: held-out prompts for the "
        "cell whose picture shows that class and that domain. After an edit of the encoder the erased texts mean their "
        "anchor, so that in the zero-shot question the two share their answers.\n"
    ]
    for task, done in figures["cells"].items():
        if not done:
            continue
        look, kind, thing = [*task.split(":"), "", ""][:3]
        told = f"{look}, on {thing} alone" if thing else look
        columns = [(q, r) for q in ("zero-shot", "pictures") for r in ("original", *ROWS) if q in done.get(r, {})]
        names = list(done["original"]["zero-shot"])
        gone = {c for c in names if (thing or look) in c.split(", ") and (not kind or look in c.split(", "))}
        lines = []
        for question, row in columns:
            cells = {c: _rate(rate) for c, rate in done[row][question].items()}
            sides = [together([r for c, r in cells.items() if (c in gone) == wanted]) for wanted in (True, False)]
            lines.append([question, row, *map(str, sides)])
        grid = [
            [f"**{c}**" if c in gone else c, *("{found}/{total}".format(**done[r][q][c]) for q, r in columns)]
            for c in names
        ]
        parts += [
            f"### Erased: {told}\n",
            markdown(["question", "row", "must go", "must stay"], lines),
            markdown(["cell", *(f"{q}: {r}" for q, r in columns)], grid),
        ]
    return "\n".join(parts)


def _rate(cell: Mapping[str, Any]) -> Rate:
    return Rate(cell["found"], cell["total"])


def growth(figures: Mapping[str, Any]) -> str:
    """Found and kept over all erased concepts, and the cost, by how many go at once."""
    counts = sorted(figures["together"], key=int)
    columns = {"found": found("named", "synonym"), "preserved": KEPT["preserved"], "other object": KEPT["other object"]}
    lines = []
    for row in rows_of(figures, "together"):
        if row == "original":
            continue
        for count in counts:
            done = figures["together"][count]
            if row in done:
                cells = list(done[row]["concepts"].values())
                shown = [pooled(cells, c) for c in columns.values()]
                lines.append([row, count, *shown, *(cost({count: done}, row, n) for n in ("seconds", "peak_mib"))])
    return markdown(["row", "concepts", *columns, "seconds", "peak MiB"], lines)


def plot(figures: Mapping[str, Any], path: Path) -> None:
    """Forgetting against retention, one point a row; the strengths of one method joined by a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6.5), layout="constrained")
    gone = found("named", "synonym", "described", "two-object", "misspelt", "ambiguous")
    stays = kept("preserved concepts", "nearest concepts", "other object of a pair", "object of an erased prompt")
    points: dict[str, tuple[float, float]] = {}
    for row in rows_of(figures, "one"):
        cells = cells_of(figures, "one", row)
        before, after = [r for r in map(gone, cells) if r], [r for r in map(stays, cells) if r]
        if before and after:
            points[row] = (100 * (1 - together(before).value), 100 * together(after).value)
    curve = [points[r] for r in points if r == "original" or r.startswith("nullspace")]
    axes.plot(*zip(*sorted(curve), strict=True), color="0.7", linewidth=1, zorder=0)
    for i, (row, (x, y)) in enumerate(points.items()):
        colour = f"C{i % 10}"
        axes.scatter([x], [y], s=60 if row in ROWS else 30, color=colour, marker="o" if i < 10 else "s", label=row)
    axes.set_xlabel("gone: prompts for the concept that no longer show it, %")
    axes.set_ylabel("kept: of what else the original showed, %")
    axes.set_xlim(-3, 103)
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    axes.set_title(f"{figures['asked']['model']}, {len(figures['one'])} concepts each erased alone")
    figure.savefig(path, dpi=110)
    plt.close(figure)
