"""Draw what a plan says: batch by batch, each batch written down before the next, whoever does it and however often it
is interrupted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from erase_diffusion.audit import ledger
from erase_diffusion.audit.plan import ORIGINAL, Plan
from erase_diffusion.audit.work import Ranks
from erase_diffusion.errors import ModelError, OutputError
from erase_diffusion.generation import paint
from erase_diffusion.image_store import ImageStore
from erase_diffusion.text_encoder import TextEncoder

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

MANIFEST = "manifest"
FIELDS = ("encoder", "case", "key", "sha256")
ENCODED = 256  # prompts whose states are kept at most; one prompt's images are drawn one after the other

Progress = Callable[[str, int, int], Any]


@dataclass
class Counts:
    """What a run did. drawn: images.  reused: originals taken from the cache.  found: there already.  redone: images
    that were written down but are damaged or gone.  bad_lines: of the manifest.  halved: whether memory ran out."""

    drawn: int = 0
    reused: int = 0
    found: int = 0
    redone: int = 0
    bad_lines: int = 0
    halved: bool = False

    def __str__(self) -> str:
        told = f"{self.drawn} images drawn, {self.reused} originals reused, {self.found} were there"
        if self.redone or self.bad_lines:
            told += f"; {self.redone} damaged or lost images redone, {self.bad_lines} bad lines in the manifest"
        return told


@dataclass(frozen=True)
class Batch:
    """Images that one encoder draws together: sample numbers, each of another key, of one guidance.

    piece: the number of the samples' piece of the work; one process draws it with all encoders.
    """

    piece: int
    encoder: str
    guidance: float
    samples: tuple[int, ...]


def batches(plan: Plan) -> list[Batch]:
    """The plan's images as batches, the same for every run: each image once, those of one prompt together; for each
    piece the original first, then every erased encoder. What the cache had when the plan was made is in batches of its
    own."""
    size = int(plan.settings["batch_size"])
    first = {key: i for i, key in reversed(list(enumerate(plan.keys[ORIGINAL])))}
    prompt = {s.text: i for i, s in reversed(list(enumerate(plan.samples)))}
    pieces: dict[float, list[int]] = {}
    for i in sorted(first.values(), key=lambda i: (prompt[plan.samples[i].text], i)):
        pieces.setdefault(plan.samples[i].guidance, []).append(i)
    cut = [(g, numbers[i : i + size]) for g, numbers in pieces.items() for i in range(0, len(numbers), size)]
    found: list[Batch] = []
    for n, (guidance, piece) in enumerate(cut):
        for encoder in plan.encoders:
            cached = [i for i in piece if encoder == ORIGINAL and plan.keys[ORIGINAL][i] in plan.reused]
            for part in (cached, [i for i in piece if i not in set(cached)]):
                if part:
                    found.append(Batch(n, encoder, guidance, tuple(part)))
    return found


@dataclass
class Painter:
    """A pipeline and its encoders, drawing a batch at a time; every prompt is encoded once by each encoder."""

    pipe: StableDiffusionPipeline
    encoders: Mapping[str, TextEncoder]
    steps: int
    tell: Callable[[str], Any] = lambda text: None
    halved: int = 0
    _states: dict[str, OrderedDict[str, Tensor]] = field(default_factory=dict, repr=False)

    def states(self, encoder: str, prompts: Sequence[str]) -> Tensor:
        """Hidden states (n, T, d) of prompts; the empty one's stay, of the others the latest."""
        if encoder not in self._states:
            self._states[encoder] = OrderedDict({"": self.encoders[encoder].encode([""])[0]})
        known = self._states[encoder]
        missing = [p for p in dict.fromkeys(prompts) if p not in known]
        if missing:
            known.update(zip(missing, self.encoders[encoder].encode(missing), strict=True))
        found = torch.stack([known[p] for p in prompts])
        for prompt in list(known)[1 : len(known) - ENCODED]:  # the first is the empty one
            del known[prompt]
        return found

    def draw(self, batch: Batch, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """The images of a batch, uint8 (n, h, w, 3). Out of memory, it halves what is drawn at once, and says so."""
        embeddings = self.states(batch.encoder, prompts)
        empty = self.states(batch.encoder, [""])[0]
        images = []
        start = 0
        while start < len(prompts):
            part = slice(start, start + max(1, len(prompts) >> self.halved))
            try:
                images.append(
                    paint(self.pipe, embeddings[part], empty, seeds[part], steps=self.steps, guidance=batch.guidance)
                )
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or self.halved or len(prompts) < 2:
                    raise
                self.halved = 1
                self.tell(f"out of memory with {len(prompts)} images at once; going on with half as many")
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            start = part.stop
        return np.concatenate(images)


def _out_of_memory(error: BaseException) -> bool:
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error)


def generate(
    plan: Plan,
    load: Callable[[], Painter],
    *,
    cache: ImageStore | None = None,
    ranks: Ranks | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Counts:
    """Draw what is missing of a plan; at the end the main process writes the manifest, one line an image.

    load: makes the painter, when there is anything to draw.  cache: where the original's images are taken from and put.
    Raises OutputError when the disk is full or another process died; what is done is kept.
    """
    ranks = ranks or Ranks()
    counts = Counts()
    # Lines of processes that were interrupted: from here on what this run writes is the newest of its key.
    counts.bad_lines = ranks.first_on_main(
        lambda: ledger.consolidate(plan.folder, MANIFEST, FIELDS, lambda row: str(row["key"])), then=lambda: 0
    )
    known = manifest(plan)
    mine = [b for b in batches(plan) if ranks.has(b.piece)]
    total, done = sum(len(b.samples) for b in mine), 0
    painter: Painter | None = None
    path = ledger.shard(plan.folder, MANIFEST, ranks.rank)
    progress("drawing", 0, total)
    for batch in mine:
        keys = [plan.keys[batch.encoder][i] for i in batch.samples]
        sound = [k in known and plan.store.read(k, known[k]) is not None for k in keys]
        if all(sound):
            counts.found += len(keys)
        else:
            counts.redone += sum(k in known for k, s in zip(keys, sound, strict=True) if not s)
            hashes = _taken(plan, batch, keys, cache)
            if hashes is None:
                painter = painter or load()
                hashes = _drawn(plan, painter, batch, keys)
                counts.drawn += len(keys)
            else:
                counts.reused += len(keys)
            ledger.append(
                path,
                (
                    {"encoder": batch.encoder, "case": plan.samples[i].case, "key": key, "sha256": sha}
                    for i, key, sha in zip(batch.samples, keys, hashes, strict=True)
                ),
            )
            if cache is not None and batch.encoder == ORIGINAL:
                for key in keys:
                    if cache.read(key) is None:
                        cache.take(key, plan.store)
        done += len(keys)
        progress("drawing", done, total)
    counts.halved = bool(painter and painter.halved)
    ranks.wait()
    if ranks.main:
        _finish(plan)
    ranks.wait()
    return counts


def _taken(plan: Plan, batch: Batch, keys: Sequence[str], cache: ImageStore | None) -> list[str] | None:
    """The hashes of a batch whose images all come from the cache; None for any other."""
    if cache is None or batch.encoder != ORIGINAL or not set(keys) <= plan.reused:
        return None
    hashes = [plan.store.take(key, cache) for key in keys]
    return None if None in hashes else [h for h in hashes if h is not None]


def _drawn(plan: Plan, painter: Painter, batch: Batch, keys: Sequence[str]) -> list[str]:
    samples = [plan.samples[i] for i in batch.samples]
    images = painter.draw(batch, [s.text for s in samples], [s.seed for s in samples])
    return [
        plan.store.write(key, image, plan.made(batch.encoder, sample))
        for key, image, sample in zip(keys, images, samples, strict=True)
    ]


def manifest(plan: Plan) -> dict[str, str]:
    """Key → SHA-256 of every image that is written down. The last line of a key counts."""
    return {str(row["key"]): str(row["sha256"]) for row, _ in ledger.scan(plan.folder, MANIFEST, FIELDS)}


def _finish(plan: Plan) -> None:
    """Write the whole manifest in the plan's order. Raises OutputError when an image is missing."""
    places = {str(row["key"]): place for row, place in ledger.scan(plan.folder, MANIFEST, FIELDS)}
    wanted = list(dict.fromkeys(key for encoder in plan.encoders for key in plan.keys[encoder]))
    missing = [key for key in wanted if key not in places]
    if missing:
        raise OutputError(
            f"{len(missing)} of {len(wanted)} images are missing: a process died; start the audit again to do the rest"
        )
    ledger.merge(plan.folder, MANIFEST, (places[key] for key in wanted))


def set_attention(pipe: StableDiffusionPipeline, attention: str) -> None:
    """Choose the UNet's attention: sdpa (torch's own), xformers, or default (what diffusers chose).

    Raises ModelError when xformers is not there, or can't run here.
    """
    if attention == "sdpa":
        from diffusers.models.attention_processor import AttnProcessor2_0

        pipe.unet.set_attn_processor(AttnProcessor2_0())
    elif attention == "xformers":
        try:
            pipe.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError, RuntimeError, NotImplementedError) as error:
            first = " ".join(str(error).split())[:120]
            raise ModelError(f"--attention xformers cannot be used here: {first}; choose sdpa or default") from None
