"""An audit report as one HTML file with its images inside: no network, no script, everything from outside escaped."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from erase_diffusion.report import charts
from erase_diffusion.report.audit_markdown import made_lines
from erase_diffusion.report.audit_report import AuditReport, ConceptResult, EncoderResult, Pair

SIDE = 192  # pixels of a picture in the report
WHY = {"leak": "still found", "damage": "damage", "random": "sample"}


def audit_html(report: AuditReport, read: Callable[[str], np.ndarray | None]) -> str:
    """The report as a page. read: image key → uint8 (h, w, 3), or None for one that is gone."""
    environment = Environment(
        loader=PackageLoader("erase_diffusion.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = lambda x: f"{x:.0%}" if round(100 * x) == round(100 * x, 6) else f"{x:.1%}"
    embedded: dict[str, str] = {}

    def picture(key: str) -> str:
        if key not in embedded:
            embedded[key] = data_uri(read(key))
        return embedded[key]

    return environment.get_template("audit.html").render(
        settings=report.settings,
        checker=report.made["checker"],
        limits=report.limits,
        unscored=report.unscored,
        encoders=[_encoder(i, e, picture) for i, e in enumerate(report.encoders)],
        plot=charts.forgetting_retention(report.encoders),
        made_lines=made_lines(report),
        shortfalls=report.shortfalls,
    )


def _encoder(number: int, encoder: EncoderResult, picture: Callable[[str], str]) -> dict[str, Any]:
    return {
        **vars(encoder),
        "id": number,
        "concepts": [
            _concept(c, [p for p in encoder.pairs if p.concept == c.concept], picture) for c in encoder.concepts
        ],
    }


def _concept(concept: ConceptResult, pairs: list[Pair], picture: Callable[[str], str]) -> dict[str, Any]:
    groups = list(dict.fromkeys(p.group for p in pairs))
    filters = [{"name": "all", "css": "", "count": len(pairs)}]
    filters += [
        {"name": told, "css": why, "count": sum(p.why == why for p in pairs)}
        for why, told in WHY.items()
        if any(p.why == why for p in pairs)
    ]
    filters += [{"name": g, "css": _css(g), "count": sum(p.group == g for p in pairs)} for g in groups]
    good, sure = concept.exit_code == 0, concept.verdict not in ("inconclusive", "removed")
    return {
        **vars(concept),
        "colour": "good" if good else "bad" if sure else "warn",
        "histogram": charts.histogram(concept),
        "neighbours": charts.neighbours(concept) if concept.neighbours else "",
        "filters": filters,
        "pairs": [
            {**vars(p), "css": _css(p.group), "before": picture(p.before), "after": picture(p.after)} for p in pairs
        ],
    }


def _css(group: str) -> str:
    """A group's name as a class of its own."""
    return "g-" + re.sub(r"[^a-z0-9]+", "-", group.lower())


def data_uri(image: np.ndarray | None) -> str:
    """An image as WebP inside a `data:` address, at most `SIDE` pixels wide; an empty one for one that is gone."""
    if image is None:
        return "data:,"
    picture = Image.fromarray(image)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=82, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
