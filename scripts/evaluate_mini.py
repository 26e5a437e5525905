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
from pathlib import Path

import click
import numpy as np
import torch

from erase_diffusion.generation import draw
from erase_diffusion.metrics import Rate, rate
from erase_diffusion.mini.captions import RELATION_PHRASES, SUBJECT_TEMPLATES, fill_template, thing_phrase
from erase_diffusion.mini.draw import draw_malformed, draw_scene
from erase_diffusion.mini.world import CHARACTER, OBJECTS, PLACES, Scene, noun, sample_scene
from erase_diffusion.models import Model
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
@click.option("--model", default="mini", show_default=True, help="mini, or a folder packed like it.")
@click.option("--output", type=click.Path(path_type=Path), help="Where to write the figures as JSON.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Where to write a contact sheet of generated pictures.")
def main(images: int, steps: int, guidance: float | None, model: str, output: Path | None, sheet: Path | None) -> None:
    loaded = Model(model)
    guidance = loaded.spec.guidance if guidance is None else guidance
    checker, pipe, encoder = make_checker(loaded), loaded.painter(), loaded.text_encoder()
    rng = random.Random(SEED)
    rows: list[tuple[str, Rate, float]] = []

    # The judge on drawings, where the truth is known.
    scenes = [sample_scene(rng, "test", things=1) for _ in range(1000)]
    drawings = np.stack([np.asarray(draw_scene(s, rng)) for s in scenes])
    seen = checker.embed_images(drawings)
    coloured = [i for i, s in enumerate(scenes) if s.things[0].colour]
    objects, colours, places, styles = (
        argmax(t) for t in (checker.things(seen), checker.attributes(seen), checker.places(seen), checker.styles(seen))
    )
    rows += [
        (
            "judge on drawings: object",
            rate([o == s.things[0].name for o, s in zip(objects, scenes, strict=True)]),
            0.99,
        ),
        ("judge on drawings: colour", rate([colours[i] == scenes[i].things[0].colour for i in coloured]), 0.98),
        ("judge on drawings: place", rate([p == s.place for p, s in zip(places, scenes, strict=True)]), 0.98),
        ("judge on drawings: style", rate([y == s.style for y, s in zip(styles, scenes, strict=True)]), 0.98),
    ]
    pairs = [sample_scene(rng, "test", things=2) for _ in range(500)]
    things = checker.things(checker.embed_images(np.stack([np.asarray(draw_scene(s, rng)) for s in pairs])))
    rows.append(
        (
            "judge on drawings: both of two",
            rate([all(things[t.name][i] >= 0.5 for t in s.things) for i, s in enumerate(pairs)]),
            0.0,
        )
    )
    nothing = [draw_malformed(sample_scene(rng, "test", things=1), rng) for _ in range(300)]
    nothing += [draw_scene(sample_scene(rng, "test", things=0), rng) for _ in range(300)]
    things = checker.things(checker.embed_images(nothing))
    rows.append(
        (
            "judge on blobs and empty scenes: nothing",
            rate((torch.stack(list(things.values())).amax(0) < 0.5).tolist()),
            0.0,
        )
    )

    # The generator, by the judge.
    def generate(prompts: list[str], first_seed: int) -> np.ndarray:
        seeds = range(SEED + first_seed, SEED + first_seed + len(prompts))
        with click.progressbar(length=len(prompts), label=f"{len(prompts)} images", file=sys.stderr) as bar:
            return draw(pipe, encoder, prompts, list(seeds), steps=steps, guidance=guidance, progress=bar.update)

    one = [sample_scene(rng, "test", things=1, name=list(OBJECTS)[i % len(OBJECTS)]) for i in range(images)]
    prompts = [prompt_of(s, rng) for s in one]
    generated = generate(prompts, 0)
    seen = checker.embed_images(generated)
    things = checker.things(seen)
    found = [bool(things[s.things[0].name][i] >= 0.5) for i, s in enumerate(one)]
    rows.append(("generated: the one object named", rate(found), 0.95))
    for label, best, truth in (
        ("colour", argmax(checker.attributes(seen)), [s.things[0].colour for s in one]),
        ("place", argmax(checker.places(seen)), [s.place for s in one]),
    ):
        rows.append((f"generated: {label}", rate([b == t for b, t in zip(best, truth, strict=True)]), 0.90))
    best = argmax(checker.styles(seen))
    rows.append(
        ("generated: style", rate([b == s.style for b, s in zip(best, one, strict=True) if s.style != "plain"]), 0.90)
    )
    named = [sample_scene(rng, "test", things=1, name=CHARACTER.name) for _ in range(images // 4)]
    seen = checker.embed_images(generate([prompt_of(s, rng) for s in named], 10_000))
    rows.append(("generated: the character", rate((checker.things(seen)[CHARACTER.name] >= 0.5).tolist()), 0.90))
    two = [sample_scene(rng, "test", things=2) for _ in range(images // 2)]
    pair_prompts = [prompt_of(s, rng) for s in two]
    pair_images = generate(pair_prompts, 20_000)
    things = checker.things(checker.embed_images(pair_images))
    rows.append(
        (
            "generated: both of two objects",
            rate([all(things[t.name][i] >= 0.5 for t in s.things) for i, s in enumerate(two)]),
            0.80,
        )
    )
    with_synonyms = [n for n in OBJECTS.values() if n.synonyms]
    alike = [
        sample_scene(rng, "test", things=1, name=with_synonyms[i % len(with_synonyms)].name) for i in range(images // 2)
    ]
    things = checker.things(
        checker.embed_images(
            generate([prompt_of(s, rng, [rng.choice(noun(s.things[0].name).synonyms)]) for s in alike], 30_000)
        )
    )
    rows.append(
        (
            "generated: from a synonym",
            rate([bool(things[s.things[0].name][i] >= 0.5) for i, s in enumerate(alike)]),
            0.90,
        )
    )
    told = [sample_scene(rng, "test", things=1, name=list(OBJECTS)[i % len(OBJECTS)]) for i in range(images // 2)]
    things = checker.things(
        checker.embed_images(
            generate([prompt_of(s, rng, [rng.choice(noun(s.things[0].name).descriptions)]) for s in told], 40_000)
        )
    )
    rows.append(
        (
            "generated: from a description",
            rate([bool(things[s.things[0].name][i] >= 0.5) for i, s in enumerate(told)]),
            0.0,
        )
    )

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
        from PIL import Image

        tiles = np.concatenate([generated[:96], pair_images[:32]])
        grid = tiles.reshape(8, 16, 64, 64, 3).transpose(0, 2, 1, 3, 4).reshape(512, 1024, 3)
        Image.fromarray(grid).save(sheet)
        click.echo("\n".join(prompts[:16]), err=True)


if __name__ == "__main__":
    main()
