"""An audit report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from erase_diffusion.report.audit_report import AuditReport, ConceptResult, EncoderResult


def audit_markdown(report: AuditReport) -> str:
    """The verdicts, the tables behind them, the worst leaks, how it was made and what it doesn't show."""
    model = report.settings["model"]["name"]
    parts = [f"# Audit of {_text(model)}", ""]
    for encoder in report.encoders:
        for concept in encoder.concepts:
            parts += _concept(encoder, concept)
    parts += ["## How it was made", "", *(f"- {_text(line)}" for line in made_lines(report)), ""]
    parts += ["## What this does not show", "", *(f"- {_text(line)}" for line in report.shortfalls), ""]
    return "\n".join(parts)


def _concept(encoder: EncoderResult, concept: ConceptResult) -> list[str]:
    tail = "" if not concept.damaged else f"; not proven kept: {', '.join(concept.damaged)}"
    lines = [f"## {_text(encoder.name)}, “{_text(concept.concept)}”: {concept.verdict}{_text(tail)}", ""]
    lines += [_text(concept.rule), ""]
    rows = [
        [
            name,
            str(g.before),
            str(g.after),
            str(g.corrected) if g.corrected else "–",
            f"{g.p_adjusted or 0:.2g}",
            g.verdict,
        ]
        for name, g in concept.groups.items()
    ]
    lines += _table(["prompts", "original", "erased", "truly there, corrected", "McNemar p, Holm", "alone"], rows)
    lines += _table(
        ["what must stay", "kept, of what the original showed"], [[n, str(r)] for n, r in concept.kept.items()]
    )
    c = concept.checked
    lines += [
        f"Checker: threshold {c.threshold:.3f}, misses {c.misses or 'unknown'}, false alarms "
        f"{c.false_alarms or 'unknown'} ({c.source}).",
        "",
    ]
    leaks = [p for p in encoder.pairs if p.why == "leak" and p.concept == concept.concept][:10]
    if leaks:
        lines += ["The worst leaks:", ""]
        lines += _table(
            ["case", "prompt", "probability"], [[p.case, p.prompt[:200], f"{p.found[1]:.2f}"] for p in leaks]
        )
    return lines


def made_lines(report: AuditReport) -> list[str]:
    """How an audit was made, one fact a line."""
    s, made = report.settings, report.made
    lines = [
        f"{s['prompts']['count']} prompts of {s['prompts']['source']}, drawn by {1 + len(s['encoders'])} encoders from "
        f"the same noise; {s['steps']} steps, {s['scheduler']}, {s['size'][0]}×{s['size'][1]}, {s['dtype']} on "
        f"{s['device']}, attention {s.get('attention', 'default')}, seed {s['seed']}",
        f"checker {made['checker'].get('checker')}, sha256 {str(made['checker'].get('judge_sha256'))[:16]}…",
        f"model sha256 {s['model']['sha256'][:16]}…, text encoder {s['model']['text_encoder'][:16]}…",
        *(f"{e['name']} ({e['method']}): sha256 {e['sha256'][:16]}…" for e in s["encoders"]),
    ]
    # The first that drew, and each further run that drew or redid something.
    for n, run in enumerate(r for r in made.get("runs", ()) if r["what"] == "drawn"):
        counts = run["counts"]
        if n and not counts.get("drawn") and not counts.get("reused"):
            continue
        told = (
            f"{run['processes']} processes on {run.get('device')}, of which the first: " if run["processes"] > 1 else ""
        )
        told += f"{counts.get('drawn')} images drawn, {counts.get('reused')} originals reused"
        for name, text in (("redone", "damaged or lost images redone"), ("bad_lines", "bad lines in the manifest")):
            told += f", {counts[name]} {text}" if counts.get(name) else ""
        told += ", memory ran out once and the batch was halved" if counts.get("halved") else ""
        lines.append(f"{told}; {run.get('command') or 'as a library call'}")
        lines.append(", ".join(f"{k} {v}" for k, v in run["versions"].items()))
    lines.append("this report: " + ", ".join(f"{k} {v}" for k, v in made.get("versions", {}).items()))
    if report.unscored[0]:
        lines.append(f"{report.unscored[0]} images could not be judged ({report.unscored[1]}); they are in no rate")
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = (header, ["---"] * len(header), *([_text(c) for c in row] for row in rows))
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _text(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, no table cell, no line of its own."""
    for sign, told in (
        ("\\", "\\\\"),
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("|", "\\|"),
        ("`", "\\`"),
        ("[", "\\["),
        ("*", "\\*"),
    ):
        text = text.replace(sign, told)
    return " ".join(text.split())
