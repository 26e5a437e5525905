"""From a work folder to the stock repo in the package, and back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel

from mini_training.tokenizer import load_tokenizer, save_tokenizer
from mini_training.unet import make_scheduler


def unpack(work: Path, packed: Path) -> None:
    """Copy packed components into the work folder, so that training goes on from them."""
    parts = {"tokenizer": "pipeline/tokenizer", "vae": "pipeline/vae", "unet": "pipeline/unet"}
    for name, part in (parts | {"clip": "clip", "judge": "judge"}).items():
        shutil.copytree(packed / part, work / name)


def pack(work: Path, output: Path) -> None:
    """Write the stock repo, the full CLIP and the judge as fp16 safetensors into a sibling, then rename."""
    tokenizer = load_tokenizer(work)
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe = StableDiffusionPipeline(
        text_encoder=CLIPTextModel.from_pretrained(work / "clip"),
        tokenizer=tokenizer,
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        unet=UNet2DConditionModel.from_pretrained(work / "unet"),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16)
    pipe.save_pretrained(temporary / "pipeline")
    save_tokenizer(work, tokenizer, temporary / "pipeline" / "tokenizer")
    for name in ("clip", "judge"):
        CLIPModel.from_pretrained(work / name).half().save_pretrained(temporary / name)
        CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(
            temporary / name
        )
        save_tokenizer(work, tokenizer, temporary / name)
    for file in temporary.rglob("config.json"):
        # transformers loads in the dtype that a config names, diffusers in float32: the two must agree.
        config = json.loads(file.read_text()) | ({"dtype": "float32"} if "model_type" in file.read_text() else {})
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")
    # Not its quality.json: other weights have other figures.
    if (output / "README.md").exists():
        shutil.copy(output / "README.md", temporary / "README.md")
    shutil.rmtree(output, ignore_errors=True)
    os.replace(temporary, output)
    total = sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    click.echo(f"{output}: {total / 2**20:.1f} MiB")
