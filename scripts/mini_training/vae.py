"""The f=4 autoencoder."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

from mini_training.drawings import IMAGES, draw_many, to_float
from mini_training.loop import STAGES, Run, autocast, start

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
    """L1 and L2 on pixels, L1 on edges and on colour, and a light KL.

    "decoder" goes on with the VAE that is there, its encoder (whose latents the UNet was trained on) locked.
    """
    settings = STAGES[stage]
    torch.manual_seed(int(settings["seed"]))
    if stage == "decoder":
        vae = AutoencoderKL.from_pretrained(work / "vae").to(device)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    else:
        vae = start(AutoencoderKL, work / "vae", make_vae).to(device)
    run = Run(stage, work, minutes, vae)
    _, pictures, _ = draw_many(IMAGES, int(settings["seed"]))

    def loss(rng: random.Random) -> dict[str, torch.Tensor]:
        x = to_float(pictures[[rng.randrange(IMAGES) for _ in range(int(settings["batch"]))]], device)
        x = recolour(x) if stage == "vae" else x
        with autocast(device, cpu=True):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        y = y.float()
        error = y - x
        pixel = error.abs().mean() + 4 * error.square().mean()
        edge = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        # Without these two small things stay grey for long: colour apart from brightness, and local means.
        chroma = 2 * (error - error.mean(1, keepdim=True)).abs().mean() + 2 * F.avg_pool2d(error, 4).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        psnr = -10 * torch.log10(error.detach().clamp(-2, 2).square().mean((1, 2, 3)) / 4).mean()
        return {"loss": pixel + 0.3 * edge + chroma + 2e-4 * kl, "pixel": pixel, "edge": edge, "kl": kl, "psnr": psnr}

    run.train(loss)
    if stage == "decoder":
        vae.save_pretrained(work / "vae")
        return
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
