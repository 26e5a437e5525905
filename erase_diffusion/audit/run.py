"""A whole audit, and its parts by themselves: plan, draw, score, report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from erase_diffusion.artifact import load_erased_text_encoder, read_record, versions
from erase_diffusion.audit import ledger
from erase_diffusion.audit.conclude import check_thresholds, conclude_audit
from erase_diffusion.audit.generate import Counts, Painter, Progress, generate, set_attention
from erase_diffusion.audit.plan import (
    ORIGINAL,
    ErasedEncoder,
    Plan,
    planned_batch,
    read_erased,
    read_plan,
    settings_of,
    write_plan,
)
from erase_diffusion.audit.samples import Sample, file_samples, suite_samples
from erase_diffusion.audit.score import Scored, read_scores, score
from erase_diffusion.audit.utility import kid, read_utility, utility
from erase_diffusion.audit.work import Ranks, only_one
from erase_diffusion.checker import CLIPChecker
from erase_diffusion.concepts import PromptWriter, preserved
from erase_diffusion.errors import ConfigError, ModelError
from erase_diffusion.generation import noise_seeds
from erase_diffusion.image_store import ImageStore, writing
from erase_diffusion.metrics import Limits
from erase_diffusion.models import MODELS, Model, source_hash
from erase_diffusion.prompts_file import read_prompts
from erase_diffusion.report.audit_html import audit_html
from erase_diffusion.report.audit_markdown import audit_markdown
from erase_diffusion.report.audit_report import AuditReport
from erase_diffusion.significance import images_for_margin
from erase_diffusion.text_encoder import TextEncoder, weights_hash
from erase_diffusion.verification import make_checker

RUNS = "runs"
ATTENTION = ("default", "sdpa", "xformers")
PIXELS_AT_ONCE = 64 * 64 * 32  # on the CPU, where more at once is no faster


def default_cache() -> Path:
    """Where originals are kept for later audits: in the user's cache folder, or ERASE_DIFFUSION_CACHE."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ERASE_DIFFUSION_CACHE") or Path(base) / "erase-diffusion" / "originals")


@dataclasses.dataclass(frozen=True)
class Asked:
    """What an audit is to draw and how.

    prompts: a file, or None for the built-in suite of `per_group` prompts a group.  steps, guidance: the model's own if
    None.  batch_size: what fits if None.
    """

    prompts: Path | None = None
    per_group: int = 60
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    batch_size: int | None = None
    attention: str = "default"

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("per_group", self.per_group, 1, 100_000),
            ("steps", self.steps, 1, 1000),
            ("guidance", self.guidance, 0, 100),
            ("batch size", self.batch_size, 1, 4096),
            ("seed", self.seed, 0, 2**31 - 1),
        ):
            if value is not None and not least <= value <= most:
                raise ConfigError(f"{name} must lie between {least} and {most}, got {value}")
        if self.attention not in ATTENTION:
            raise ConfigError(f"attention must be one of {', '.join(ATTENTION)}, got {self.attention!r}")


@dataclasses.dataclass
class Audit:
    """An audit of erased encoders of one model in a folder, loaded as far as its work needs it."""

    model: Model
    folder: Path
    ranks: Ranks = dataclasses.field(default_factory=Ranks)
    progress: Progress = lambda stage, done, total: None
    tell: Callable[[str], Any] = lambda text: None
    _judges: dict[str | None, tuple[CLIPChecker, dict[str, str]]] = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def original(self) -> TextEncoder:
        """The model's own text encoder, loaded once."""
        return self.model.text_encoder()

    def plan(
        self,
        erased: Sequence[Path],
        asked: Asked,
        cache: ImageStore | None = None,
        ready: Callable[[Plan], Any] = lambda plan: None,
    ) -> Plan:
        """Settle everything that is drawn, and write it down; or read it, when it was written down before.

        ready: called before that, to refuse what could not be finished.
        Raises ConfigError, ModelError, DataError for what cannot be audited, OutputError for a folder of another audit.
        """
        encoders = read_erased(erased)
        if not encoders:
            raise ConfigError("nothing to audit: name at least one drop-in folder with --erased")
        original = self.original
        spec, unet = self.model.spec, self.model.component_config("unet")
        guidance = float(spec.guidance if asked.guidance is None else asked.guidance)
        if asked.prompts is not None:
            file = read_prompts(asked.prompts, seed=asked.seed)
            samples = file_samples(file.prompts, self.model.vocabulary, guidance)
            source: dict[str, Any] = {"source": asked.prompts.name, "unseeded": file.unseeded}
        else:
            samples = self._suite(encoders, original, asked, guidance)
            source = {"source": f"the built-in suite, {asked.per_group} a group", "unseeded": 0}
        scale = 2 ** (len(self.model.component_config("vae").get("block_out_channels", (1,) * 4)) - 1)
        side = int(unet["sample_size"]) * scale
        settings = settings_of(
            self.model,
            encoders,
            samples,
            {**source, "truncated": original.cut([s.text for s in samples])},
            text_encoder=source_hash(original),
            steps=asked.steps or spec.steps,
            size=(side, side),
            scheduler=str(self.model.index["scheduler"][1]),
            device=self.model.device,
            attention=asked.attention,
            batch_size=asked.batch_size or planned_batch(self.folder) or fitting_batch(self.model, side),
            seed=asked.seed,
        )
        plan = Plan(self.folder, settings, tuple(samples))
        if cache is not None:
            reused = frozenset(k for k in set(plan.keys[ORIGINAL]) if cache.read(k) is not None)
            plan = dataclasses.replace(plan, reused=reused)
        ready(plan)
        return write_plan(plan)

    def _suite(
        self, encoders: Sequence[ErasedEncoder], original: TextEncoder, asked: Asked, guidance: float
    ) -> list[Sample]:
        """The suite of every concept that any encoder has forgotten."""
        v = self.model.vocabulary
        samples: list[Sample] = []
        done: set[str] = set()
        for e in encoders:
            for a in e.concepts:
                if a.name in done:
                    continue
                done.add(a.name)
                together = [o.concept for o in e.concepts if o is not a]
                gone = [w for c in together if c.within is None for w in c.words]
                keep = preserved(a.concept, v, a.preserve, [w for w in gone if w not in a.preserve])
                # Not the sentences of the erasure's own verification.
                seed = noise_seeds("suite", asked.seed, 1)[0]
                writer = PromptWriter(a.concept, v, keep, seed, together)
                samples += suite_samples(writer, original, asked.per_group, guidance)
        return samples

    def draw(self, plan: Plan, cache: ImageStore | None = None) -> Counts:
        """Draw what is missing. Raises OutputError, ModelError."""
        return generate(plan, lambda: self._painter(plan), cache=cache, ranks=self.ranks, progress=self.progress)

    def _painter(self, plan: Plan) -> Painter:
        pipe = self.model.painter()
        set_attention(pipe, plan.settings["attention"])
        encoders = {ORIGINAL: self.original}
        for e in plan.erased:
            tower = load_erased_text_encoder(e.folder).to(self.model.device)
            found = read_record(e.folder)["erased"]["sha256"]
            if found != e.sha256:
                raise ModelError(f"{e.folder} is another encoder (sha256 {str(found)[:12]}…) than when the audit began")
            encoders[e.name] = dataclasses.replace(self.original, model=tower)
        return Painter(pipe, encoders, int(plan.settings["steps"]), self.tell)

    def score(self, plan: Plan, *, checker: str | None = None, name: str = "judge") -> Scored:
        """Judge what is not judged yet. checker: another CLIP (folder or hub id) than the model's own judge."""
        judge, about = self.judge(checker)
        scored = score(plan, judge, about, name=name, ranks=self.ranks, progress=self.progress)
        if self.ranks.main and scored.judged:
            self.note("judged", None, scores=name, counts=vars(scored))
        return scored

    def note(self, what: str, command: str | None, **more: Any) -> None:
        """Write down what was done here, and with what, in `runs.jsonl`: reports tell how each part was made."""
        row = {"what": what, "command": command, "device": self.model.device, "processes": self.ranks.count, **more}
        ledger.append(self.folder / f"{RUNS}.jsonl", [row | {"versions": versions()}])

    def judge(self, source: str | None = None) -> tuple[CLIPChecker, dict[str, str]]:
        """The checker, loaded once, and what it is. Raises ModelError when it can't be had, or is the generator's."""
        if source not in self._judges:
            judge = make_checker(self.model, source)
            judge.refuse_generator(self.original)
            digest = weights_hash(dict(judge.model.state_dict()))
            self._judges[source] = judge, {"checker": source or self.model.judge_name, "judge_sha256": digest}
        return self._judges[source]

    def utility(self, plan: Plan, features: str) -> dict[str, dict[str, str]]:
        """KID between original and erased on what must stay; see `utility.utility`."""
        return utility(plan, self.judge()[0], features, progress=self.progress)


@contextlib.contextmanager
def drawn(
    erased: Sequence[str | Path],
    output: str | Path,
    *,
    model: str = "mini",
    asked: Asked | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache: ImageStore | None = None,
    margin: float | None = None,
    command: str | None = None,
    ready: Callable[[Audit, Plan], Any] = lambda job, plan: None,
    progress: Progress = lambda stage, done, total: None,
    tell: Callable[[str], Any] = lambda text: None,
) -> Iterator[tuple[Audit, Plan, Counts]]:
    """Plan an audit and draw what is missing of it; the folder is held until the caller is done with it.

    cache: where originals are taken from and kept, none if None.  margin: tell how many prompts an interval of ± this
    needs.  command: what the audit is recorded to be made by.  ready: called before anything is written, to refuse what
    could not be finished. Under `accelerate launch` each process draws its share, and the main one alone makes progress
    known.
    """
    asked, folder = asked or Asked(), Path(output)
    if margin is not None and not 0 < margin < 0.5:
        raise ConfigError(f"the margin must lie between 0 and 0.5, got {margin}")
    ranks = Ranks.here(device)
    if device == "cuda" and ranks.state is not None:
        device = str(ranks.state.device)
    quiet = (lambda *_: None) if not ranks.main else None
    with only_one(folder, ranks):
        job = Audit(Model(model, device=device, dtype=dtype), folder, ranks, quiet or progress, quiet or tell)
        plan = ranks.first_on_main(
            lambda: job.plan([Path(e) for e in erased], asked, cache, lambda plan: ready(job, plan)),
            then=lambda: read_plan(folder),
        )
        for text in _advice(plan, margin):
            job.tell(text)
        counts = job.draw(plan, cache)
        if ranks.main:
            job.note("drawn", command, counts=vars(counts))
        job.tell(f"{counts}" if ranks.count == 1 else f"this process of {ranks.count}: {counts}")
        yield job, plan, counts


def _advice(plan: Plan, margin: float | None) -> list[str]:
    """What is cut, what has no seed, and what interval the prompts will bear."""
    prompts = plan.settings["prompts"]
    told = {
        "truncated": "are longer than the text encoder reads and are cut",
        "unseeded": "have no seed; theirs come from the audit's and the case number",
    }
    lines = [f"{prompts[n]} of {prompts['count']} prompts {text}" for n, text in told.items() if prompts.get(n)]
    if margin is not None:
        lines.append(
            f"an interval of ±{margin:.1%} needs {images_for_margin(margin, 0.0)} prompts for a concept that is gone, "
            f"{images_for_margin(margin)} whatever the rate; this audit asks {prompts['count']} of all groups"
        )
    return lines


def run_audit(
    erased: Sequence[str | Path],
    output: str | Path,
    *,
    checker: str | None = None,
    scores: str = "judge",
    features: str | None = None,
    limits: Limits | None = None,
    threshold: float | None = None,
    shown: int = 40,
    **drawing: Any,
) -> AuditReport | None:
    """Audit erased encoders: draw, judge, and write the report into `output`; None in all processes but the main one.

    erased: drop-in folders of one model.  output: the folder of the audit, in which it goes on when it was begun.
    drawing: as `drawn` has it: model, asked, device, dtype, cache, margin, command, progress, tell.
    checker: another CLIP (folder or hub id) than the model's judge, whose scores go under the name `scores`.
    features: measure the KID of what must stay over these ("judge" or "inception") as well.
    limits, threshold, shown: as `report_of` has them.

    Raises ConfigError, ModelError, DataError and OutputError; what is done is kept.
    """

    def ready(job: Audit, plan: Plan) -> None:
        judge, about = job.judge(checker)
        check_thresholds(plan, about, judge.vocabulary, threshold)
        if features:
            kid(features, judge)

    with drawn(erased, output, ready=ready, **drawing) as (job, plan, _):
        job.score(plan, checker=checker, name=scores)
        if not job.ranks.main:
            return None
        if features:
            job.utility(plan, features)
        report, _ = report_of(plan.folder, scores=scores, limits=limits, threshold=threshold, shown=shown)
        write_report(report, plan)
        return report


def report_of(
    folder: Path,
    *,
    scores: str = "judge",
    limits: Limits | None = None,
    threshold: float | None = None,
    shown: int = 40,
) -> tuple[AuditReport, Plan]:
    """The report of a scored audit, from what its folder holds. Raises DataError, ConfigError."""
    plan = read_plan(folder)
    about, rows = read_scores(plan, scores)
    name = plan.settings["model"]["name"]
    vocabulary = MODELS[name].vocabulary if name in MODELS else Model(name).vocabulary
    runs = [row for row, _ in ledger.scan(folder, RUNS, ("what", "versions", "processes", "counts"))]
    runs = [r for r in runs if isinstance(r["counts"], dict) and isinstance(r["versions"], dict)]
    runs = [r for r in runs if isinstance(r["processes"], int)]
    made = {"versions": versions(), "runs": runs}
    report = conclude_audit(
        plan,
        plan.erased,
        rows,
        about=about,
        vocabulary=vocabulary,
        limits=limits or Limits(),
        threshold=threshold,
        made=made,
        utility=read_utility(plan),
        shown=shown,
    )
    return report, plan


def write_report(report: AuditReport, plan: Plan) -> Path:
    """Write `report.html`, `report.json` and `report.md` into the audit's folder, each at once; returns the page.

    Raises OutputError.
    """
    texts = {
        "report.json": json.dumps(report.to_dict(), ensure_ascii=False, indent=1, allow_nan=False) + "\n",
        "report.md": audit_markdown(report),
        "report.html": audit_html(report, plan.store.read),
    }
    for name, text in texts.items():
        path = plan.folder / name
        with writing(path):
            temporary = path.with_suffix(path.suffix + ".tmp")
            # A lone half of a surrogate pair in a prompt can't be encoded.
            temporary.write_text(text, encoding="utf-8", errors="replace")
            temporary.replace(path)
    return plan.folder / "report.html"


def fitting_batch(model: Model, side: int) -> int:
    """How many images of `side` × `side` pixels to draw at once: by the free memory of a GPU, few on the CPU."""
    if torch.device(model.device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        each = 3 * 2**30 * (side / 512) ** 2 * (1 if model.dtype == torch.float32 else 0.5)
        return int(max(1, min(64, 0.8 * free // each)))
    return max(1, min(32, PIXELS_AT_ONCE // side**2))
