"""How the closed form grows with the concepts: seconds and memory on an encoder of CLIP-L's real size, random weights.

    python scripts/benchmark_closed_form.py --count 1 --count 10 --count 100

The encoder has the width, depth and positions of Stable Diffusion 1.x's; the words are the embedded model's, whose
tokenizer it gets, in all combinations of colour and object. Random weights tell nothing of what is forgotten, only what
it costs. Each count runs in a process of its own, and its memory is what the process held at its peak above what it
held with the encoder loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import click

BARS = {"seconds": 60.0, "peak_mib": 2048.0}  # for 100 concepts on two cores


def measure(count: int, method: str, layers: int) -> dict[str, Any]:
    """Erase `count` concepts at once; figures of this process."""
    import torch
    from eraser_benchmark.measure import Memory
    from transformers import CLIPTextConfig, CLIPTextModel

    from erase_diffusion.concepts import Concept, PromptSets, PromptWriter
    from erase_diffusion.erase import method_config
    from erase_diffusion.erasers import ERASERS
    from erase_diffusion.models import Model
    from erase_diffusion.preparation import share
    from erase_diffusion.text_encoder import TextEncoder

    mini = Model("mini")
    tokenizer, vocabulary = mini.text_encoder().tokenizer, mini.vocabulary
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=12,
        max_position_embeddings=77,
        vocab_size=49408,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    encoder = TextEncoder(CLIPTextModel(config).eval().requires_grad_(False), tokenizer, torch.float32)
    names = list(vocabulary.objects)[:-3]
    phrases = [f"{colour} {name}" for name in names for colour in vocabulary.attributes][:count]
    keep = {name: vocabulary.objects[name] for name in list(vocabulary.objects)[-3:]}
    concepts = [Concept(p, anchor=next(iter(keep))) for p in phrases]
    writers = [PromptWriter(c, vocabulary, keep, 0, [o for o in concepts if o is not c]) for c in concepts]
    memory, started = Memory(), time.perf_counter()
    with memory.watch():
        parts = [w.training_sets(*share(count)) for w in writers]
        sets = PromptSets(
            tuple(pair for p in parts for pair in p.forget),
            tuple(dict.fromkeys(r for p in parts for r in p.retain)),
            tuple(pair for p in parts for pair in p.forget_held_out),
            tuple(dict.fromkeys(r for p in parts for r in p.retain_held_out)),
            forget_classes=tuple(phrases),
        )
        erasure = ERASERS[method][0](method_config(method)).erase(encoder, sets, {})
    seconds = time.perf_counter() - started
    assert all(torch.isfinite(v).all() for v in erasure.encoder.model.state_dict().values())
    prompts = (len(sets.forget) + len(sets.forget_held_out), len(sets.retain) + len(sets.retain_held_out))
    return {"concepts": count, "forget": prompts[0], "retain": prompts[1], "seconds": seconds, "peak_mib": memory.peak}


@click.command(help=__doc__)
@click.option("--count", "counts", multiple=True, type=int, default=(1, 10, 100), show_default=True)
@click.option("--method", default="nullspace", show_default=True)
@click.option("--layers", default=12, show_default=True, help="Of the encoder; CLIP-L has twelve.")
@click.option("--threads", default=2, show_default=True)
@click.option("--one", type=int, hidden=True, help="Measure in this process.")
def main(counts: tuple[int, ...], method: str, layers: int, threads: int, one: int | None) -> None:
    if one is not None:
        import torch

        torch.set_num_threads(threads)
        click.echo(json.dumps(measure(one, method, layers)))
        return
    click.echo(
        "| concepts at once | forget prompts | retain prompts | seconds | peak MiB over the weights |\n"
        + "|---" * 5
        + "|"
    )
    for count in counts:
        command = [sys.executable, __file__, "--one", str(count), "--method", method, "--threads", str(threads)]
        command += ["--layers", str(layers)]
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)  # noqa: S603
        f = json.loads(done.stdout.strip().splitlines()[-1])
        peak = "–" if f["peak_mib"] is None else f"{f['peak_mib']:.0f}"
        click.echo(f"| {count} | {f['forget']} | {f['retain']} | {f['seconds']:.1f} | {peak} |")
    click.echo(f"\nbar, 100 concepts on two cores: {BARS['seconds']:.0f} s, {BARS['peak_mib']:.0f} MiB", err=True)


if __name__ == "__main__":
    main()
