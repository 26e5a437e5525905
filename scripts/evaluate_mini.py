"""Measure the embedded model: the judge on drawings, the generator by the judge, the VAE, and the speed.

    python scripts/evaluate_mini.py --output runs/mini-quality.json

Every prompt uses held-out templates, every drawing and every coloured thing a held-out combination of object,
colour and place. Prints a Markdown table with Wilson 95 % intervals and the bar beside each figure.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from erase_diffusion.checker import CLIPChecker
from erase_diffusion.generation import draw
from erase_diffusion.metrics import Rate, rate
from erase_diffusion.mini.captions import RELATION_PHRASES, SUBJECT_TEMPLATES, fill_template, thing_phrase
from erase_diffusion.mini.draw import draw_malformed, draw_scene
from erase_diffusion.mini.world import CHARACTER, OBJECTS, PLACES, Scene, noun, sample_scene
from erase_diffusion.models import MODELS, Model
from erase_diffusion.verification import make_checker

SEED = 7_000_000  # apart from training, calibration and verification


def prompt_of(scene: Scene, rng: random.Random, words: Sequence[str] | None = None) -> str:
    """A held-out caption that names everything in the scene."""
    words = words or [t.name for t in scene.things]
    said = [thing_phrase(t, w, colour=True) for t, w in zip(scene.things, words, strict=True)]
    subject = said[0]
    if scene.relation:
        subject = rng.choice(RELATION_PHRASES[scene.relation]).format(a=said[0], b=said[1])
    style = None if scene.style == "plain" else scene.style
    there = " " + rng.choice(PLACES[scene.place].there)
    return fill_template(rng.choice(SUBJECT_TEMPLATES["test"]), rng, style, subject=subject, there=there)


def argmax(table: dict[str, torch.Tensor]) -> list[str]:
    names = list(table)
    return [names[i] for i in torch.stack(list(table.values())).argmax(0).tolist()]


def same(answers: Sequence[str], truth: Sequence[str | None]) -> Rate:
    return rate([a == t for a, t in zip(answers, truth, strict=True)])


def all_found(checker: CLIPChecker, images: Sequence[Image.Image] | np.ndarray, scenes: Sequence[Scene]) -> Rate:
    """How many pictures show everything that is in their scene."""
    things = checker.things(checker.embed_images(images))
    return rate([all(things[t.name][i] >= 0.5 for t in s.things) for i, s in enumerate(scenes)])


def by_object(count: int, rng: random.Random, names: Sequence[str]) -> list[Scene]:
    """Held-out scenes of one thing, each name as often as the next."""
    return [sample_scene(rng, "test", things=1, name=names[i % len(names)]) for i in range(count)]


Row = tuple[str, Rate, float]  # what, measured, bar (0 for none)


def judge_on_drawings(checker: CLIPChecker, rng: random.Random) -> tuple[list[Row], np.ndarray]:
    """The judge where the truth is known, and the drawings of one thing."""
    scenes = [sample_scene(rng, "test", things=1) for _ in range(1000)]
    drawings = np.stack([np.asarray(draw_scene(s, rng)) for s in scenes])
    seen = checker.embed_images(drawings)
    coloured = [i for i, s in enumerate(scenes) if s.things[0].colour]
    colours = argmax(checker.attributes(seen))
    pairs = [sample_scene(rng, "test", things=2) for _ in range(500)]
    nothing = [draw_malformed(sample_scene(rng, "test", things=1), rng) for _ in range(300)]
    nothing += [draw_scene(sample_scene(rng, "test", things=0), rng) for _ in range(300)]
    most = torch.stack(list(checker.things(checker.embed_images(nothing)).values())).amax(0)
    rows: list[Row] = [
        ("judge on drawings: object", same(argmax(checker.things(seen)), [s.things[0].name for s in scenes]), 0.99),
        (
            "judge on drawings: colour",
            same([colours[i] for i in coloured], [scenes[i].things[0].colour for i in coloured]),
            0.98,
        ),
        ("judge on drawings: place", same(argmax(checker.places(seen)), [s.place for s in scenes]), 0.98),
        ("judge on drawings: style", same(argmax(checker.styles(seen)), [s.style for s in scenes]), 0.98),
        ("judge on drawings: both of two", all_found(checker, [draw_scene(s, rng) for s in pairs], pairs), 0.0),
        ("judge on blobs and empty scenes: nothing", rate((most < 0.5).tolist()), 0.0),
    ]
    return rows, drawings


@click.command(help=__doc__)
@click.option(
    "--images",
    type=click.IntRange(100),
    default=400,
    show_default=True,
    help="One-object prompts; the other groups are sized after it.",
)
@click.option("--steps", default=25, show_default=True)
@click.option("--guidance", type=float, help="Default: the registry's.")
@click.option(
    "--weights",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder that `train_mini.py --stage pack` wrote; default: the shipped one.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Where to write the figures as JSON.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Where to write a contact sheet of generated pictures.")
def main(
    images: int, steps: int, guidance: float | None, weights: Path | None, output: Path | None, sheet: Path | None
) -> None:
    if weights:
        parts = {"source": "pipeline", "clip": "clip", "judge": "judge"}
        MODELS["mini"] = replace(MODELS["mini"], **{field: str(weights / part) for field, part in parts.items()})
    loaded = Model("mini")
    guidance = loaded.spec.guidance if guidance is None else guidance
    checker, pipe, encoder = make_checker(loaded), loaded.painter(), loaded.text_encoder()
    rng = random.Random(SEED)
    rows, drawings = judge_on_drawings(checker, rng)

    # The generator, by the judge.
    def generate(prompts: list[str], first_seed: int) -> np.ndarray:
        seeds = range(SEED + first_seed, SEED + first_seed + len(prompts))
        with click.progressbar(length=len(prompts), label=f"{len(prompts)} images", file=sys.stderr) as bar:
            return draw(pipe, encoder, prompts, list(seeds), steps=steps, guidance=guidance, progress=bar.update)

    def generated(label: str, scenes: list[Scene], prompts: list[str], first_seed: int, bar: float) -> np.ndarray:
        pictures = generate(prompts, first_seed)
        rows.append((f"generated: {label}", all_found(checker, pictures, scenes), bar))
        return pictures

    one = by_object(images, rng, list(OBJECTS))
    prompts = [prompt_of(s, rng) for s in one]
    first = generated("the one object named", one, prompts, 0, 0.95)
    seen = checker.embed_images(first)
    styled = [i for i, s in enumerate(one) if s.style != "plain"]
    styles = argmax(checker.styles(seen))
    rows += [
        ("generated: colour", same(argmax(checker.attributes(seen)), [s.things[0].colour for s in one]), 0.90),
        ("generated: place", same(argmax(checker.places(seen)), [s.place for s in one]), 0.90),
        ("generated: style", same([styles[i] for i in styled], [one[i].style for i in styled]), 0.90),
    ]
    named = by_object(images // 4, rng, [CHARACTER.name])
    generated("the character", named, [prompt_of(s, rng) for s in named], 10_000, 0.90)
    two = [sample_scene(rng, "test", things=2) for _ in range(images // 2)]
    pairs = generated("both of two objects", two, [prompt_of(s, rng) for s in two], 20_000, 0.80)
    for label, words, first_seed, bar in (
        ("from a synonym", "synonyms", 30_000, 0.90),
        ("from a description", "descriptions", 40_000, 0.0),
    ):
        told = by_object(images // 2, rng, [n for n, entry in OBJECTS.items() if getattr(entry, words)])
        said = [prompt_of(s, rng, [rng.choice(getattr(noun(s.things[0].name), words))]) for s in told]
        generated(label, told, said, first_seed, bar)

    # The VAE on held-out drawings, and the speed on two cores.
    with torch.no_grad():
        x = torch.from_numpy(drawings[:512]).permute(0, 3, 1, 2).float() / 127.5 - 1
        y = torch.cat([pipe.vae.decode(pipe.vae.encode(c).latent_dist.mean).sample for c in x.split(64)]).clamp(-1, 1)
    psnr = float((-10 * torch.log10((y - x).square().mean((1, 2, 3)) / 4)).mean())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    started = time.perf_counter()
    draw(pipe, encoder, prompts[:64], list(range(64)), steps=25, guidance=guidance)
    seconds = time.perf_counter() - started
    torch.set_num_threads(threads)

    click.echo("| what | measured (Wilson 95 %) | bar |\n|---|---|---|")
    for name, value, bar in rows:
        click.echo(f"| {name} | {value} | {f'≥ {bar:.0%}' if bar else '–'} |")
    click.echo(f"| VAE reconstruction of held-out drawings | PSNR {psnr:.2f} dB | ≥ 27 dB |")
    click.echo(f"| 64 images, 25 steps, guidance, 2 threads | {seconds:.1f} s | ≤ 40 s |")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        figures = {name: value.to_dict() | {"bar": bar} for name, value, bar in rows}
        settings = {"steps": steps, "guidance": guidance, "seed": SEED}
        output.write_text(
            json.dumps({"settings": settings, "rates": figures, "psnr_db": psnr, "seconds_64": seconds}, indent=2)
            + "\n"
        )
    if sheet:
        tiles = np.concatenate([first[:96], pairs[:32]])
        grid = tiles.reshape(8, 16, 64, 64, 3).transpose(0, 2, 1, 3, 4).reshape(512, 1024, 3)
        Image.fromarray(grid).save(sheet)
        click.echo("\n".join(prompts[:16]), err=True)


if __name__ == "__main__":
    main()
