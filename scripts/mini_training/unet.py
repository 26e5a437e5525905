"""The UNet and its noise schedule."""

from __future__ import annotations

import os
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from erase_diffusion.mini.captions import caption
from erase_diffusion.mini.world import sample_scene
from mini_training.clip import TEXT
from mini_training.drawings import NAMES, draw_many
from mini_training.loop import STAGES, Run, autocast, rank, start
from mini_training.tokenizer import load_tokenizer, tokenize
from mini_training.vae import LATENT_CHANNELS, encode_all

# diffusers reads `attention_head_dim` of this class as the number of heads
UNET = dict(block_out_channels=(48, 96, 144), layers_per_block=1, attention_head_dim=4, norm_num_groups=8)


def make_scheduler() -> DPMSolverMultistepScheduler:
    """SD's noise schedule, read as v; DPM-Solver++ draws well in 25 steps and acceptably in 12."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        algorithm_type="dpmsolver++",
    )


def make_unet() -> UNet2DConditionModel:
    """A three-level UNet with random weights; the finest level, four times the positions, does without attention."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        cross_attention_dim=TEXT["hidden_size"],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        **UNET,
    )


def train_unet(work: Path, minutes: float, device: str) -> None:
    """v-prediction on the VAE's latents, conditioned on the frozen text tower, 10 % empty prompts."""
    settings = STAGES["unet"]
    torch.manual_seed(int(settings["seed"]))
    tokenizer = load_tokenizer(work)
    text = CLIPTextModel.from_pretrained(work / "clip").to(device).eval().requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(work / "vae").to(device).eval()
    unet, ema = (start(UNet2DConditionModel, work / "unet", make_unet) for _ in range(2))
    unet, ema = unet.to(device), ema.to(device)
    if device == "cpu":
        # The backward pass of PyTorch's fused attention takes nine times as long in bf16 as in fp32 on a CPU.
        unet.set_attn_processor(AttnProcessor())
    share = int(settings["batch"]) // int(os.environ.get("WORLD_SIZE", 1))
    ema.load_state_dict(unet.state_dict())
    run = Run("unet", work, minutes, unet, ema.requires_grad_(False))
    file = work / "latents.safetensors"
    # A second draw of two things only, so that half of what is seen are pairs: which word belongs to which thing is the
    # hardest to learn.
    images = int(settings["images"])
    draws = [(int(settings["seed"]), None), (int(settings["seed_of_pairs"]), 2)]
    if rank() == 0 and not file.exists():
        parts: dict[str, list[torch.Tensor]] = {"latents": [], "things": []}
        for seed, many in draws:
            _, pictures, labels = draw_many(images, seed, things=many)
            parts["latents"].append(encode_all(vae, pictures, device))
            parts["things"].append((labels[:, 0] < len(NAMES)).unflatten(1, (8, 8)))
            del pictures
        save_file({name: torch.cat(part) for name, part in parts.items()}, file)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    latents, things = (load_file(file)[name] for name in ("latents", "things"))
    scenes = [
        sample_scene(scene_rng, things=many)
        for scene_rng, many in ((random.Random(seed), many) for seed, many in draws)
        for _ in range(images)
    ]
    del vae
    scale = AutoencoderKL.load_config(work / "vae")["scaling_factor"]
    alphas = make_scheduler().alphas_cumprod.to(device)

    def loss(rng: random.Random) -> dict[str, torch.Tensor]:
        index = [rng.randrange(images) + images * (rng.random() < 0.3) for _ in range(share)]
        x = latents[index].to(device).float() * scale
        # Who asks for one thing is shown one: so many of the pictures are pairs that a tenth of them would be many.
        texts = ["" if rng.random() < 0.1 else caption(scenes[i], rng, one_of_two=0) for i in index]
        with torch.no_grad():
            context = text(tokenize(tokenizer, texts, device)).last_hidden_state
        # Half of the times one from each of as many equal strata (less variance than independent draws), half from
        # the middle and a little over it, where it is settled what is drawn where.
        n = len(index)
        even = (torch.arange(n, device=device) + torch.rand(n, device=device)) / n
        middle = torch.sigmoid(torch.randn(n, device=device) + 0.5)
        t = (torch.where(torch.rand(n, device=device) < 0.5, even, middle) * 1000).long().clamp(0, 999)
        a, s = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        noise = torch.randn_like(x)
        with autocast(device, cpu=True):
            v = unet(a * x + s * noise, t, context).sample
        error = (v.float() - (a * noise - s * x)).square().mean(1)
        # Things are small and are what the words are about: where they are counts three times. The minimum is the same.
        weight = 1 + 2 * things[index].to(device).float().repeat_interleave(2, 1).repeat_interleave(2, 2)
        return {"loss": (weight * error).sum() / weight.sum(), "error": error.mean()}

    run.train(loss)
    if rank() == 0:
        ema.save_pretrained(work / "unet")
