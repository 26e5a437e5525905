"""What the benchmark measures: one method on one concept, and on several concepts at once."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from erase_diffusion.checker import Calibration
from erase_diffusion.concepts import Concept, Prompt, PromptSets, PromptWriter
from erase_diffusion.erase import method_config, run_eraser
from erase_diffusion.erasers import ERASERS, Erasure
from erase_diffusion.metrics import Limits, Rate, conclude, damaged, rate
from erase_diffusion.models import Model
from erase_diffusion.preparation import Preparation, nearest, prepare
from erase_diffusion.text_encoder import TextEncoder
from erase_diffusion.verification import Look, Verifier, found_table, keep_table, make_checker
from eraser_benchmark.cells import Cells
from eraser_benchmark.clip_tasks import ClipTasks, training_pairs
from eraser_benchmark.rows import Row

NEIGHBOURS = 2


class Memory:
    """Peak of resident memory over a piece of work, in MiB above what was there before it (Linux; else None)."""

    def __init__(self) -> None:
        self.peak: float | None = None

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
        except OSError:
            yield
            return
        before = _status("VmRSS")
        yield
        self.peak = max(0.0, (_status("VmHWM") - before) / 1024)


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return float(line.split()[1])
    return 0.0


@dataclass
class Original:
    """One concept (of those erased together) before anything is erased: its prompts, and what the original shows."""

    writer: PromptWriter
    calibration: Calibration
    prompts: list[Prompt]
    look: Look


@dataclass
class Bench:
    """A model with its judge, loaded once, and the work that all methods share."""

    model: Model
    images: int
    seed: int = 0

    def __post_init__(self) -> None:
        self.pipe, self.checker = self.model.painter(), make_checker(self.model)
        self.tasks = ClipTasks(self.model.clip()[2]) if self.model.spec.name == "mini" else None
        self._cells: Cells | None = None

    @property
    def cells(self) -> Cells:
        """The table of (class, domain), drawn when it is first asked for."""
        self._cells = self._cells or Cells(self.model, self.pipe, self.checker)
        return self._cells

    def start(self, concepts: Sequence[Concept], *, asked: bool = True, leaks: bool = False) -> Started:
        """Prepare and draw for the erasers; if `asked`, calibrate, and look at the original's pictures."""
        job = prepare(concepts, self.model, seed=self.seed)
        sets, _ = job.prompt_sets()
        pictured, pixels = job.pictures(sets, self.pipe, lambda *_: None)
        verifier = Verifier(self.model, job.encoder, self.pipe, self.checker)
        per_group = max(6, self.images // len(concepts))
        originals = []
        for writer in job.writers if asked else ():
            prompts = writer.verification_prompts(per_group)
            if leaks:
                prompts += writer.leak_prompts(per_group, _neighbours(writer, job.encoder))
            calibration = verifier.calibrate(writer, images=max(40, per_group))
            originals.append(
                Original(writer, calibration, prompts, verifier.look(writer, job.encoder, prompts, calibration))
            )
        return Started(self, job, verifier, sets, pictured, pixels, originals)


def _neighbours(writer: PromptWriter, encoder: TextEncoder) -> list[str]:
    """The nearest concepts of the same kind by the text tower."""
    v, kind = writer.vocabulary, writer.concept.kind
    if kind == "style":
        others = [s for s in v.styles if s not in (writer.name, v.neutral_style)]
    elif kind == "attribute":
        others = [a for a in v.attributes if a != writer.name]
    else:
        others = list(writer.preserve)
    return nearest(writer.concept.name, others, encoder)[:NEIGHBOURS]


@dataclass
class Started:
    """Concepts ready to be erased together by any method."""

    bench: Bench
    job: Preparation
    verifier: Verifier
    sets: PromptSets
    pictured: PromptSets
    pixels: Mapping[str, Tensor]
    originals: list[Original]

    def original(self) -> dict[str, Any]:
        """The row that every other is compared with."""
        return self._figures(self.job.encoder, [o.look for o in self.originals])

    def erase(self, row: Row) -> tuple[Erasure, float, float | None]:
        """Run a method: the erasure, its seconds, and its peak memory in MiB."""
        model = self.bench.model
        config = method_config(row.method, **row.settings)
        if hasattr(config, "learning_rate") and "learning_rate" not in row.settings:
            config = replace(config, learning_rate=model.spec.learning_rate * config.rate)
        eraser = ERASERS[row.method][0](config)
        pictured = eraser.needs in ("features", "pixels")
        sets, pixels = (self.pictured, self.pixels) if pictured else (self.sets, {})
        if row.drawings:
            sets, pixels = training_pairs(self.job.writers[0], self.job.clip[2])
        memory, started = Memory(), time.perf_counter()
        with memory.watch():
            erasure = run_eraser(
                eraser,
                self.job.encoder,
                sets,
                pixels,
                seed=self.bench.seed,
            )
        return erasure, time.perf_counter() - started, memory.peak

    def measure(self, row: Row) -> dict[str, Any]:
        """Erase with a method and measure all columns."""
        erasure, seconds, memory = self.erase(row)
        looks = [
            self.verifier.look(o.writer, erasure.encoder, o.prompts, o.calibration) if row.pictures else None
            for o in self.originals
        ]
        figures = self._figures(erasure.encoder, looks)
        return {
            "seconds": round(seconds, 2),
            "peak_mib": None if memory is None else round(memory, 1),
            "stopped": erasure.stopped,
            **figures,
        }

    def measure_cells(self, row: Row | None) -> dict[str, Any]:
        """The (class, domain) cells after an erasure, or (None) before."""
        encoder = self.job.encoder if row is None else self.erase(row)[0].encoder
        return self.bench.cells.measure(encoder, pictures=row is None or row.pictures)

    def _figures(self, encoder: TextEncoder, looks: Sequence[Look | None]) -> dict[str, Any]:
        concepts: dict[str, Any] = {}
        for original, look in zip(self.originals, looks, strict=True):
            writer, prompts = original.writer, original.prompts
            figures: dict[str, Any] = {"anchor": writer.concept.anchor}
            if look is not None:
                figures |= _picture_figures(prompts, original.look, look)
            if self.bench.tasks is not None and writer.concept.within is None:
                figures["clip"] = self.bench.tasks.measure(encoder, writer, self.job.encoder)
            concepts[writer.name] = figures
        return {"concepts": concepts}


def _picture_figures(prompts: Sequence[Prompt], before: Look, after: Look) -> dict[str, Any]:
    """Found in each group that asks for the concept, kept of each row that must stay, and what moved."""
    limits = Limits()
    groups = found_table(prompts, before.judged, after.judged)
    rows = keep_table(prompts, before.judged, after.judged)
    rest = [i for i, p in enumerate(prompts) if p.group == "preserved"]
    own = [i for i, p in enumerate(prompts) if p.group in ("named", "synonym")]
    drift = after.drift(before)
    verdict, _ = conclude(groups, rows, rate((drift[own] > limits.unchanged).tolist()), limits)
    character = [i for i in rest if prompts[i].things and prompts[i].things[0][0].isupper()]
    if character and any(before.judged["others"][i] for i in character):
        shown = [i for i in character if before.judged["others"][i]]
        rows["the character"] = Rate(sum(bool(after.judged["others"][i]) for i in shown), len(shown))
    return {
        "found": {g: after_rate.to_dict() for g, (_, after_rate) in groups.items()},
        "found by the original": {g: before_rate.to_dict() for g, (before_rate, _) in groups.items()},
        "kept": {name: r.to_dict() for name, r in rows.items()},
        "clip_score": round(float(after.clip_scores[rest].mean()), 3),
        "clip_score_original": round(float(before.clip_scores[rest].mean()), 3),
        "drift": round(float(drift[rest].mean()), 3),
        "verdict": verdict + ("" if not damaged(rows, limits) else ", rest not proven"),
    }
