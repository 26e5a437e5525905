"""The f=4 autoencoder."""

from __future__ import annotations

import os
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm
from transformers import CLIPImageProcessor, CLIPVisionModel

from mini_training.drawings import IMAGES, NAMES, draw_many, to_float
from mini_training.loop import STAGES, Run, autocast, rank, start

# f=4: at f=8 and 12 channels, 40 minutes gave 28 dB but small things in wrong colours; f=4 costs the UNet a fifth more.
LATENT_CHANNELS = 6
VAE = dict(block_out_channels=(32, 48, 96), layers_per_block=1, norm_num_groups=8)


def make_vae() -> AutoencoderKL:
    """An f=4 autoencoder with random weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=LATENT_CHANNELS,
        sample_size=64,
        **VAE,
    )


def recolour(x: torch.Tensor) -> torch.Tensor:
    """Half of the pictures with their channels permuted and some inverted: (n, 3, h, w) in [-1, 1].

    Skies and meadows have few colours, things are small: without this, red and green are told apart very late.
    """
    n = len(x)
    order = torch.stack([torch.randperm(3) for _ in range(n)]).to(x.device)
    sign = torch.where(torch.rand(n, 3, 1, 1, device=x.device) < 0.3, -1.0, 1.0)
    changed = x.gather(1, order[:, :, None, None].expand_as(x)) * sign
    return torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, changed, x)


def train_vae(stage: str, work: Path, minutes: float, device: str) -> None:
    """Stage "vae" goes from random weights to balanced latents, "refine" on from there, with what a UNet needs.

    Both: L1 and L2 on pixels, L1 on edges and on colour. "vae" adds a light KL. "refine" adds noise to the latents
    instead, up to a quarter of their spread: what is told by less than a UNet's error is lost when a UNet tells it.
    There things count five times, and the generator's own image tower says whether a shape is still that shape
    (a perceptual loss, as LPIPS in Stable Diffusion's autoencoder; the judge has no part in it).
    """
    settings = STAGES[stage]
    refine = stage == "refine"
    torch.manual_seed(int(settings["seed"]))
    vae = start(AutoencoderKL, work / "vae", make_vae).to(device)
    run = Run(stage, work, minutes, vae)
    _, pictures, labels = draw_many(IMAGES, int(settings["seed"]))
    share = int(settings["batch"]) // int(os.environ.get("WORLD_SIZE", 1))
    if refine:
        tower = CLIPVisionModel.from_pretrained(work / "clip").to(device).eval().requires_grad_(False)
        mean, std = (
            torch.tensor(value, device=device).view(1, 3, 1, 1)
            for value in (CLIPImageProcessor().image_mean, CLIPImageProcessor().image_std)
        )

    def shapes(x: torch.Tensor) -> list[torch.Tensor]:
        """The patches' features after each layer, of unit length."""
        states = tower(pixel_values=((x + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states
        return [F.normalize(h[:, 1:].float(), dim=-1) for h in states[1:]]

    def loss(rng: random.Random) -> dict[str, torch.Tensor]:
        index = [rng.randrange(IMAGES) for _ in range(share)]
        x = to_float(pictures[index], device)
        # The perceptual loss knows this world's colours only.
        x = x if refine else recolour(x)
        with autocast(device, cpu=True):
            posterior = vae.encode(x).latent_dist
            spread = 0.25 * torch.rand(len(x), 1, 1, 1, device=device) if refine else posterior.std
            y = vae.decode(posterior.mean + spread * torch.randn_like(posterior.mean)).sample
        error = y.float() - x
        psnr = -10 * torch.log10(error.detach().clamp(-2, 2).square().mean((1, 2, 3)) / 4).mean()
        if refine:
            things = (labels[index, 0] < len(NAMES)).view(-1, 1, 8, 8).to(device).float()
            weight = 1 + 4 * things.repeat_interleave(8, 2).repeat_interleave(8, 3)
            error = error * (weight / weight.mean())
        pixel = error.abs().mean() + 4 * (error * (y.float() - x)).mean()
        edge = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        # Without these two small things stay grey for long: colour apart from brightness, and local means.
        chroma = 2 * (error - error.mean(1, keepdim=True)).abs().mean() + 2 * F.avg_pool2d(error, 4).abs().mean()
        total = pixel + 0.3 * edge + chroma
        if refine:
            with torch.no_grad(), autocast(device, cpu=True):
                wanted = shapes(x)
            with autocast(device, cpu=True):
                drawn = shapes(y)
            shape = torch.stack([1 - (a * b).sum(-1).mean() for a, b in zip(wanted, drawn, strict=True)]).mean()
            size = posterior.mean.float().square().mean()
            # The latents keep their size, or noise of a fixed size would be outgrown.
            rest = {"shape": shape, "size": size}
            total = total + 0.5 * shape + 0.1 * (size - 1).square()
        else:
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            rest = {"kl": kl}
            total = total + 2e-4 * kl
        return {"loss": total, "pixel": pixel, "edge": edge, **rest, "psnr": psnr}

    run.train(loss)
    if rank() != 0:
        return
    if not refine:
        balance(vae, to_float(pictures[:1024], device))
    vae.save_pretrained(work / "vae")
    (work / "latents.safetensors").unlink(missing_ok=True)


@torch.no_grad()
def balance(vae: AutoencoderKL, pictures: torch.Tensor, power: float = 0.25) -> None:
    """Rewrite the VAE so that its latents have no mean, independent channels and like spreads; same pictures.

    Left to itself the encoder keeps colours in three directions and the detail that tells a cat from a dog in others
    with a thousandth of their variance, where a diffusion loss never looks. The linear change is folded into the two
    1×1 convolutions around the latents. Standard deviations become their `power`-th power: colours still come first.

    pictures: (n, 3, h, w) in [-1, 1] to measure the latents on.
    """
    posterior = [vae.encode(p).latent_dist for p in pictures.split(128)]
    x, variances = (
        torch.cat([getattr(p, what) for p in posterior]).double().transpose(0, 1).flatten(1) for what in ("mean", "var")
    )
    mean, covariance = x.mean(1), torch.cov(x)
    values, vectors = torch.linalg.eigh(covariance)
    change = (values.sqrt() ** (power - 1))[:, None] * vectors.T
    change = change / (change @ covariance @ change.T).diagonal().mean().sqrt()
    into, back = vae.quant_conv, vae.post_quant_conv
    means, to_mean = into.weight.double()[..., 0, 0].chunk(2)[0], into.bias.double().chunk(2)[0]
    # A full posterior covariance has no place in the stock class: the mean of its diagonal is kept.
    spread = (change.square() @ variances.mean(1)).log()
    into.weight.copy_(torch.cat([change @ means, torch.zeros_like(means)])[..., None, None])
    into.bias.copy_(torch.cat([change @ (to_mean - mean), spread]))
    out = back.weight.double()[..., 0, 0]
    back.bias.copy_(back.bias.double() + out @ mean)
    back.weight.copy_((out @ torch.linalg.inv(change))[..., None, None])
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: torch.Tensor, device: str) -> torch.Tensor:
    """Posterior means of all pictures, fp16 (n, c, 16, 16), unscaled."""
    chunks = []
    with autocast(device, cpu=True):
        for part in tqdm(pictures.split(128), desc="encoding", mininterval=5):
            chunks.append(vae.encode(to_float(part, device)).latent_dist.mean.half().cpu().contiguous())
    return torch.cat(chunks)
