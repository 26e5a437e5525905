"""Train the embedded model: tokenizer, CLIP, judge, VAE, UNet, then pack them as a stock diffusers repo.

    python scripts/train_mini.py --work runs/mini --stage clip --minutes 40
    python scripts/train_mini.py --work runs/mini --stage judge --minutes 120
    python scripts/train_mini.py --work runs/mini --stage vae --minutes 40
    torchrun --nproc-per-node 4 scripts/train_mini.py --work runs/mini --stage refine --minutes 30 --threads 1
    torchrun --nproc-per-node 4 scripts/train_mini.py --work runs/mini --stage unet --minutes 180 --threads 1
    python scripts/train_mini.py --work runs/mini --stage vision --minutes 20
    python scripts/train_mini.py --work runs/mini --stage pack

`--stage unpack` lays the packed components into an empty work folder; the stages then go on from those.

Each stage goes on from its checkpoint when it is started again, and ends after --minutes (all its runs
together) or at its number of steps: the learning rate falls with whichever is further along. Losses go to
`<work>/<stage>.csv`. The judge sees another draw of the world than the generator's CLIP, and drawings only.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
import torch
from mini_training.clip import train_clip
from mini_training.loop import STAGES
from mini_training.packing import pack, unpack
from mini_training.unet import train_unet
from mini_training.vae import train_vae


@click.command(help=__doc__, context_settings={"max_content_width": 110})
@click.option("--stage", type=click.Choice([*STAGES, "pack", "unpack"]), required=True)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("runs/mini"),
    show_default=True,
    help="Checkpoints, logs and components.",
)
@click.option("--minutes", type=float, default=60.0, show_default=True, help="Bound on the training time of the stage.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=int, help="CPU threads; torch's own choice if not given.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("erase_diffusion/mini/weights"),
    show_default=True,
    help="Where `pack` writes.",
)
def main(stage: str, work: Path, minutes: float, device: str, threads: int | None, output: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
    if threads:
        torch.set_num_threads(threads)
    if stage in ("clip", "vision", "judge"):
        train_clip(stage, work, minutes, device)
    elif stage in ("vae", "refine"):
        train_vae(stage, work, minutes, device)
    elif stage == "unet":
        train_unet(work, minutes, device)
    elif stage == "unpack":
        unpack(work, output)
    else:
        pack(work, output)


if __name__ == "__main__":
    main()
