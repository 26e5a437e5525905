"""The charts of an audit report, as SVG that takes its ink from the page: dark on light and light on dark."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from erase_diffusion.metrics import Rate
from erase_diffusion.report.audit_report import ConceptResult, EncoderResult

INK = "#010203"  # stands for the page's own text colour
BEFORE, AFTER, BAD = "#7a8ca8", "#c2571a", "#b3261e"


def forgetting_retention(encoders: Sequence[EncoderResult]) -> Markup:
    """Every encoder and concept as a point: what is gone against what is kept, each with its 95 % interval."""
    figure, axes = _figure(6.4, 4.2)
    for i, encoder in enumerate(encoders):
        for j, concept in enumerate(encoder.concepts):
            main = concept.kept.get("preserved concepts", Rate(0, 0))
            if concept.asked is None or not main.total:
                continue
            gone = _gone(concept.asked.after)
            stays = (main.value, main.low, main.high)
            axes.errorbar(
                [100 * gone[0]],
                [100 * stays[0]],
                xerr=[[100 * (gone[0] - gone[1])], [100 * (gone[2] - gone[0])]],
                yerr=[[100 * (stays[0] - stays[1])], [100 * (stays[2] - stays[0])]],
                fmt="os^Dv"[j % 5],
                color=f"C{i % 10}",
                capsize=3,
                label=_plain(f"{encoder.name}: {concept.concept}"),
            )
    axes.set_xlabel("gone: prompts for the concept that don't show it, %")
    axes.set_ylabel("kept: of what else the original showed, %")
    axes.set_xlim(-3, 103)
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, loc="lower left", framealpha=0, labelcolor=INK)
    return _svg(figure, "Forgetting against retention of every encoder, with 95 % intervals")


def _gone(found: Rate) -> tuple[float, float, float]:
    return 1 - found.value, 1 - found.high, 1 - found.low


def histogram(concept: ConceptResult) -> Markup:
    """The checker's probability over the concept's own prompts, before and after, with the threshold."""
    figure, axes = _figure(6.4, 2.6)
    before, after = concept.histogram
    width = 1 / len(before)
    left = [i * width for i in range(len(before))]
    axes.bar(left, before, width * 0.48, align="edge", color=BEFORE, label="original")
    axes.bar([x + width / 2 for x in left], after, width * 0.48, align="edge", color=AFTER, label="erased")
    axes.axvline(concept.checked.threshold, color=INK, linewidth=1.2, linestyle="--", label="threshold")
    axes.set_xlabel(f"the checker's probability of “{_plain(concept.concept)}”")
    axes.set_ylabel("pictures")
    axes.set_xlim(0, 1)
    axes.legend(fontsize=8, framealpha=0, labelcolor=INK, loc="upper center", ncols=3)
    axes.margins(y=0.2)
    return _svg(figure, f"Histogram of the checker's probability of {concept.concept}, before and after")


def neighbours(concept: ConceptResult, most: int = 30) -> Markup:
    """What other things kept, the worst at the top, each with its 95 % interval; at most the `most` worst."""
    rates: Mapping[str, Rate] = dict(list(concept.neighbours.items())[:most])
    figure, axes = _figure(6.4, 0.8 + 0.24 * len(rates))
    names, values = list(rates)[::-1], list(rates.values())[::-1]
    where = range(len(names))
    axes.barh(
        where,
        [100 * r.value for r in values],
        color=[BAD if r.high < 0.85 else BEFORE for r in values],
        height=0.66,
        xerr=[[100 * (r.value - r.low) for r in values], [100 * (r.high - r.value) for r in values]],
        ecolor=INK,
        error_kw={"linewidth": 0.8, "capsize": 2},
    )
    axes.set_yticks(where, [f"{_plain(n)[:28]} ({r.total})" for n, r in zip(names, values, strict=True)], fontsize=8)
    axes.set_xlim(0, 103)
    axes.set_xlabel("kept, of the original's pictures that showed it, %")
    return _svg(figure, f"How much of each other thing is kept after erasing {concept.concept}")


def _plain(text: str) -> str:
    """Text that matplotlib draws as it is: no formula begins in it, and a leading underscore does not hide it."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for spine in axes.spines.values():
        spine.set_color(INK)
        spine.set_alpha(0.4)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _svg(figure: Any, label: str) -> Markup:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    head, rest = svg.split(">", 1)
    return Markup(head) + Markup(' role="img" aria-label="{}">').format(label) + Markup(rest)  # noqa: S704 - our own SVG
