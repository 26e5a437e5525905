"""A whole audit, and its parts by themselves: plan, draw, score, report."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from erase_diffusion.artifact import load_erased_text_encoder
from erase_diffusion.audit.conclude import conclude_audit
from erase_diffusion.audit.generate import Counts, Painter, Progress, generate, set_attention
from erase_diffusion.audit.plan import (
    ORIGINAL,
    ErasedEncoder,
    Plan,
    read_erased,
    read_plan,
    settings_of,
    write_plan,
)
from erase_diffusion.audit.samples import Sample, file_samples, suite_samples
from erase_diffusion.audit.score import Scored, read_scores, score
from erase_diffusion.audit.utility import read_utility, utility
from erase_diffusion.audit.work import Ranks
from erase_diffusion.concepts import PromptWriter, preserved
from erase_diffusion.errors import ConfigError
from erase_diffusion.generation import noise_seeds
from erase_diffusion.image_store import ImageStore, writing
from erase_diffusion.metrics import Limits
from erase_diffusion.models import MODELS, Model, source_hash
from erase_diffusion.prompts_file import read_prompts
from erase_diffusion.report.audit_html import audit_html
from erase_diffusion.report.audit_markdown import audit_markdown
from erase_diffusion.report.audit_report import AuditReport
from erase_diffusion.text_encoder import TextEncoder, weights_hash
from erase_diffusion.verification import make_checker

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

    def plan(self, erased: Sequence[Path], asked: Asked, cache: ImageStore | None = None) -> Plan:
        """Settle everything that is drawn, and write it down; or read it, when it was written down before.

        Raises ConfigError, ModelError, DataError for what cannot be audited, OutputError for a folder of another audit.
        """
        encoders = read_erased(erased)
        if not encoders:
            raise ConfigError("nothing to audit: name at least one drop-in folder with --erased")
        original = self.model.text_encoder()
        spec, unet = self.model.spec, self.model.component_config("unet")
        guidance = spec.guidance if asked.guidance is None else asked.guidance
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
            batch_size=asked.batch_size or fitting_batch(self.model, side),
            seed=asked.seed,
        )
        plan = Plan(self.folder, settings, tuple(samples))
        if cache is not None:
            reused = frozenset(k for k in set(plan.keys[ORIGINAL]) if cache.read(k) is not None)
            plan = dataclasses.replace(plan, reused=reused)
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
        original = self.model.text_encoder()
        encoders = {ORIGINAL: original}
        for e in plan.erased:
            # Against the base: that the plan's settings have checked already.
            tower = load_erased_text_encoder(e.folder).to(self.model.device)
            encoders[e.name] = dataclasses.replace(original, model=tower)
        return Painter(pipe, encoders, int(plan.settings["steps"]), self.tell)

    def score(self, plan: Plan, *, checker: str | None = None, name: str = "judge") -> Scored:
        """Judge what is not judged yet. checker: another CLIP (folder or hub id) than the model's own judge."""
        judge = make_checker(self.model, checker)
        judge.refuse_generator(self.model.text_encoder())
        about = {
            "checker": checker or self.model.judge_name,
            "judge_sha256": weights_hash(dict(judge.model.state_dict())),
        }
        return score(plan, judge, about, name=name, ranks=self.ranks, progress=self.progress)

    def utility(self, plan: Plan, features: str) -> dict[str, dict[str, str]]:
        """KID between original and erased on what must stay; see `utility.utility`."""
        return utility(plan, make_checker(self.model), features, progress=self.progress)


def report_of(
    folder: Path,
    *,
    scores: str = "judge",
    limits: Limits | None = None,
    threshold: float | None = None,
    made: Mapping[str, Any] | None = None,
    shown: int = 40,
) -> tuple[AuditReport, Plan]:
    """The report of a scored audit, from what its folder holds. Raises DataError, ConfigError."""
    plan = read_plan(folder)
    about, rows = read_scores(plan, scores)
    name = plan.settings["model"]["name"]
    vocabulary = MODELS[name].vocabulary if name in MODELS else Model(name).vocabulary
    made = {"versions": versions(), "python": platform.python_version(), **(made or {})}
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


def versions() -> dict[str, str]:
    """The versions of the packages that decide a result."""
    found = {}
    for package in ("erase-diffusion", "torch", "transformers", "diffusers", "accelerate", "safetensors", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
