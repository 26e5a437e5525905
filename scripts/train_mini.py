"""Train the embedded model: tokenizer, CLIP, judge, VAE, UNet, then pack them as a stock diffusers repo.

    python scripts/train_mini.py --work runs/mini --stage clip --minutes 40
    python scripts/train_mini.py --work runs/mini --stage judge --minutes 85
    python scripts/train_mini.py --work runs/mini --stage vae --minutes 40
    torchrun --nproc-per-node 4 scripts/train_mini.py --work runs/mini --stage unet --minutes 240 --threads 1
    python scripts/train_mini.py --work runs/mini --stage vision --minutes 20
    python scripts/train_mini.py --work runs/mini --stage decoder --minutes 20
    python scripts/train_mini.py --work runs/mini --stage pack

`--stage unpack` lays the packed components into an empty work folder; the stages then go on from those.

Each stage goes on from its checkpoint when it is started again, and ends after --minutes (all its runs
together) or at its number of steps: the learning rate falls with whichever is further along. Losses go to
`<work>/<stage>.csv`. The judge sees another draw of the world than the generator's CLIP, and drawings only.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from erase_diffusion.mini.captions import caption
from erase_diffusion.mini.draw import draw_malformed, draw_with_boxes
from erase_diffusion.mini.world import CHARACTER, COLOURS, OBJECTS, Scene, sample_scene

# Sizes: all weights together stay under 24 MiB in fp16.
POSITIONS = 32  # the longest caption is 30 tokens; SD's 77 would triple the text tower's work for nothing
TEXT = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
VISION = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, patch_size=8)
JUDGE_TEXT = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=3)
JUDGE_VISION = dict(hidden_size=144, intermediate_size=576, num_hidden_layers=4, num_attention_heads=6, patch_size=8)
# f=4: at f=8 and 12 channels, 40 minutes gave 28 dB but small things in wrong colours; f=4 costs the UNet a fifth more.
LATENT_CHANNELS = 6
VAE = dict(block_out_channels=(32, 48, 96), layers_per_block=1, norm_num_groups=8)
# diffusers reads `attention_head_dim` of this class as the number of heads
UNET = dict(block_out_channels=(48, 96, 144), layers_per_block=1, attention_head_dim=4, norm_num_groups=8)
NAMES, COLOUR_NAMES = [*OBJECTS, CHARACTER.name], list(COLOURS)
IMAGES = 60_000  # drawings per stage, made in half a minute

STAGES: dict[str, dict[str, float]] = {
    # steps, batch size, peak learning rate, seed of the draw
    "clip": dict(steps=8000, batch=128, lr=1e-3, seed=1),
    "vision": dict(steps=8000, batch=64, lr=1e-3, seed=5),
    "judge": dict(steps=10000, batch=64, lr=1e-3, seed=2),
    "vae": dict(steps=9000, batch=16, lr=1.5e-3, seed=3),
    "decoder": dict(steps=9000, batch=16, lr=1e-3, seed=6),
    "unet": dict(steps=12000, batch=64, lr=8e-4, seed=4, images=30_000),
}


def draw_many(count: int, seed: int, malformed: int = 0) -> tuple[list[Scene], torch.Tensor, torch.Tensor]:
    """`count` training scenes, their pictures, uint8 (count, 3, 64, 64), and which thing covers each 8×8 patch.

    The first `malformed` are drawn as such. The labels are uint8 (count, 2, 64): object and colour by index,
    with the number of objects (colours) for none.
    """
    rng = random.Random(seed)
    scenes = [sample_scene(rng, things=1 if i < malformed else None) for i in range(count)]
    pictures = np.empty((count, 64, 64, 3), dtype=np.uint8)
    labels = np.empty((count, 2, 8, 8), dtype=np.uint8)
    labels[:, 0], labels[:, 1] = len(NAMES), len(COLOUR_NAMES)
    centre = np.arange(8) * 8 + 4
    for i, scene in enumerate(tqdm(scenes, desc="drawing", mininterval=5)):
        if i < malformed:
            pictures[i] = np.asarray(draw_malformed(scene, rng))
            continue
        image, boxes = draw_with_boxes(scene, rng)
        pictures[i] = np.asarray(image)
        for thing, (left, top, side) in zip(scene.things, boxes, strict=True):
            inside = ((centre > top) & (centre < top + side))[:, None] & ((centre > left) & (centre < left + side))[
                None
            ]
            labels[i, 0][inside] = NAMES.index(thing.name)
            if thing.colour is not None:
                labels[i, 1][inside] = COLOUR_NAMES.index(thing.colour)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    return scenes, images, torch.from_numpy(labels).flatten(2)


def to_float(pictures: torch.Tensor, device: str) -> torch.Tensor:
    """uint8 pictures to [-1, 1]."""
    return pictures.to(device).float() / 127.5 - 1


def train_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level BPE with CLIP's own pre-tokenisation and special tokens, EOS as pad as in SD."""
    rng = random.Random(0)
    captions = [caption(sample_scene(rng), rng).lower() for _ in range(30_000)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        end_of_word_suffix="</w>",
        min_frequency=20,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(captions, trainer)
    saved = json.loads(bpe.to_str())["model"]
    # As in CLIP's own vocabulary: every byte, every byte that ends a word, the merges, the two special tokens.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in saved["merges"]]
    tokens = dict.fromkeys([*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)])
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=POSITIONS,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(folder)
    # transformers 4's slow tokenizer reads these two.
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return tokenizer


def load_tokenizer(work: Path) -> CLIPTokenizer:
    """The tokenizer of this run, trained on first use."""
    folder = work / "tokenizer"
    return CLIPTokenizer.from_pretrained(folder) if (folder / "merges.txt").exists() else train_tokenizer(folder)


def save_tokenizer(work: Path, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save with `vocab.json` and `merges.txt` beside `tokenizer.json`: transformers 4 and other tools read those."""
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(work / "tokenizer" / name, folder / name)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], device: str) -> torch.Tensor:
    """Token ids (n, POSITIONS), padded with EOS."""
    batch = tokenizer(texts, padding="max_length", max_length=POSITIONS, truncation=True, return_tensors="pt")
    return batch.input_ids.to(device)


def make_clip(tokenizer: CLIPTokenizer, text: dict[str, int], vision: dict[str, int], projection: int) -> CLIPModel:
    """A CLIPModel of the given sizes with random weights."""
    special = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id
    )
    config = CLIPConfig(
        text_config=CLIPTextConfig(
            vocab_size=len(tokenizer), max_position_embeddings=POSITIONS, projection_dim=projection, **text, **special
        ).to_dict(),
        vision_config=CLIPVisionConfig(image_size=64, projection_dim=projection, **vision).to_dict(),
        projection_dim=projection,
    )
    return CLIPModel(config)


def start(cls: Any, folder: Path, make: Callable[[], Any]) -> Any:
    """The component that lies in the work folder (from `unpack`, or an earlier run), else one with random weights."""
    return cls.from_pretrained(folder, torch_dtype=torch.float32) if (folder / "config.json").exists() else make()


def unpack(work: Path, packed: Path) -> None:
    """Copy packed components into the work folder, so that training goes on from them."""
    parts = {"tokenizer": "pipeline/tokenizer", "vae": "pipeline/vae", "unet": "pipeline/unet"}
    for name, part in (parts | {"clip": "clip", "judge": "judge"}).items():
        shutil.copytree(packed / part, work / name)


class Run:
    """One stage's step counter, clock, learning rate, log and checkpoint."""

    def __init__(
        self, stage: str, work: Path, minutes: float, module: torch.nn.Module, ema: torch.nn.Module | None = None
    ):
        self.stage, self.minutes, self.module, self.ema = stage, minutes, module, ema
        self.steps, self.peak = int(STAGES[stage]["steps"]), STAGES[stage]["lr"]
        self.optimizer = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=self.peak,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=True,
        )
        self.path, self.log = work / f"{stage}.pt", work / f"{stage}.csv"
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            if ema is not None:
                ema.load_state_dict(state["ema"])
            self.step, self.seconds = state["step"], state["seconds"]

    def progress(self) -> float:
        return max(self.step / self.steps, self.seconds / 60 / self.minutes)

    def save(self) -> None:
        if rank() != 0:
            return
        state = dict(
            module=self.module.state_dict(), optimizer=self.optimizer.state_dict(), step=self.step, seconds=self.seconds
        )
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def train(self, loss_of_batch: Callable[[random.Random], dict[str, torch.Tensor]]) -> None:
        """The loop: batch → losses (the first is the one minimised) → step, with a checkpoint every two minutes."""
        bar = tqdm(total=self.steps, initial=self.step, desc=self.stage, mininterval=10)
        saved = self.seconds
        sums: dict[str, float] = {}
        while self.progress() < 1:
            started = time.monotonic()
            progress = self.progress()
            lr = self.peak * min(1, (self.step + 1) / 200) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * progress))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            # A generator per step: a run that was stopped and resumed sees the batches an undisturbed one does.
            rng = random.Random(f"{self.stage} {self.step} {rank()}")
            torch.manual_seed(rng.randrange(2**31))
            losses = loss_of_batch(rng)
            self.optimizer.zero_grad(set_to_none=True)
            next(iter(losses.values())).backward()
            average_gradients(self.module)
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            if self.ema is not None:
                decay = min(0.9985, (1 + self.step) / (10 + self.step))
                with torch.no_grad():
                    torch._foreach_lerp_(list(self.ema.parameters()), list(self.module.parameters()), 1 - decay)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            self.seconds += agreed(time.monotonic() - started)
            bar.update()
            if self.step % 50 == 0:
                means = {name: total / 50 for name, total in sums.items()}
                sums = {}
                bar.set_postfix({k: f"{v:.4f}" for k, v in means.items()})
                if rank() != 0:
                    continue
                fresh = not self.log.exists()
                with self.log.open("a", newline="") as file:
                    writer = csv.writer(file)
                    if fresh:
                        writer.writerow(["step", "seconds", *means])
                    writer.writerow([self.step, round(self.seconds), *(round(v, 5) for v in means.values())])
            if self.seconds - saved > 120:
                saved = self.seconds
                self.save()
        self.save()
        bar.close()


def rank() -> int:
    """This process's number; several run under torchrun, each with its share of the batch."""
    return int(os.environ.get("RANK", 0))


def agreed(seconds: float) -> float:
    """The first process's clock, so that all of them stop at the same step."""
    if not torch.distributed.is_initialized():
        return seconds
    value = torch.tensor([seconds], dtype=torch.float64)
    torch.distributed.broadcast(value, 0)
    return float(value)


def average_gradients(module: torch.nn.Module) -> None:
    """Mean of the gradients over the processes. On a CPU one thread a process is faster than many threads in one."""
    if not torch.distributed.is_initialized():
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(mean.view_as(g))


def train_clip(stage: str, work: Path, minutes: float, device: str) -> None:
    """Contrastive training of the generator's CLIP or of the judge.

    "vision" goes on with the CLIP that is there, its text tower (which the UNet was trained on) locked.
    """
    settings = STAGES[stage]
    torch.manual_seed(int(settings["seed"]))
    tokenizer = load_tokenizer(work)
    if stage == "vision":
        model = CLIPModel.from_pretrained(work / "clip").to(device)
        model.text_model.requires_grad_(False)
    else:
        sizes = (TEXT, VISION, 128) if stage == "clip" else (JUDGE_TEXT, JUDGE_VISION, 96)
        model = start(CLIPModel, work / stage, lambda: make_clip(tokenizer, *sizes)).to(device)
    # From captions alone a small ViT learns shapes very slowly (half of the objects after 2,000 steps). Two heads
    # that say what covers each patch, thrown away afterwards, teach it where to look.
    width = model.config.vision_config.hidden_size
    heads = torch.nn.ModuleList(
        [torch.nn.Linear(width, len(NAMES) + 1), torch.nn.Linear(width, len(COLOUR_NAMES) + 1)]
    ).to(device)
    run = Run(stage, work, minutes, torch.nn.ModuleDict({"clip": model, "heads": heads}))
    # The judge also learns what is no drawing of anything, so that it can answer 'none of these'.
    malformed = IMAGES // 10 if stage == "judge" else 0
    scenes, pictures, labels = draw_many(IMAGES, int(settings["seed"]), malformed)
    mean = torch.tensor(CLIPImageProcessor().image_mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(CLIPImageProcessor().image_std, device=device).view(1, 3, 1, 1)

    shown = np.array([sum(1 << NAMES.index(t.name) for t in s.things) for s in scenes])
    shown[:malformed] = 0

    def sample(rng: random.Random) -> list[int]:
        """Every other batch is of a few things only: to tell its pairs apart, both of a pair must be seen and read."""
        size = int(settings["batch"])
        if stage == "clip" or rng.random() < 0.5:
            return [rng.randrange(IMAGES) for _ in range(size)]
        few = sum(1 << i for i in rng.sample(range(len(NAMES)), 5))
        pairs = np.flatnonzero((shown > 0) & (shown & ~few == 0) & (shown & (shown - 1) > 0)).tolist()
        alone = np.flatnonzero((shown > 0) & (shown & ~few == 0)).tolist()
        return rng.sample(pairs, size // 2) + rng.sample(alone, size - size // 2)

    def loss(rng: random.Random) -> dict[str, torch.Tensor]:
        index = sample(rng)
        pixels = pictures[index].to(device).float() / 255
        # A shade lighter or darker: generated pictures are never quite the drawn ones.
        shade = 1 + 0.1 * torch.randn(len(index), 1, 1, 1, device=device)
        pixels = ((pixels * shade).clamp(0, 1) + 0.03 * torch.randn_like(pixels) - mean) / std
        ids = tokenize(tokenizer, [caption(scenes[i], rng, malformed=i < malformed) for i in index], device)
        # Only the end-of-text state is compared, and causal attention never looks at what comes after it.
        ids = ids[:, : int((ids == tokenizer.eos_token_id).int().argmax(1).max()) + 1]
        with autocast(device, cpu=True):
            out = model(input_ids=ids, pixel_values=pixels)
        logits = model.logit_scale.exp() * out.text_embeds.float() @ out.image_embeds.float().T
        target = torch.arange(len(index), device=device)
        value = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        patches = out.vision_model_output.last_hidden_state[:, 1:].float()
        truth = labels[index].to(device).long()
        dense = [F.cross_entropy(head(patches).flatten(0, 1), truth[:, k].flatten()) for k, head in enumerate(heads)]
        return {
            "loss": value + dense[0] + 0.3 * dense[1],
            "contrastive": value,
            "patch": dense[0],
            "accuracy": (logits.argmax(1) == target).float().mean(),
        }

    run.train(loss)
    model.save_pretrained(work / ("clip" if stage == "vision" else stage))


def autocast(device: str, cpu: bool = False) -> torch.autocast | nullcontext[None]:
    """bf16 on a GPU; on a CPU it is 1.5 times as fast for CLIP, 1.8 for the VAE and 1.2 for the UNet."""
    return torch.autocast(device, torch.bfloat16) if device == "cuda" or cpu else nullcontext()


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
    with torch.no_grad():
        latents = encode_all(vae, pictures[:2048], device)
    vae.register_to_config(scaling_factor=round(1 / latents.float().std().item(), 5))
    vae.save_pretrained(work / "vae")
    (work / "latents.safetensors").unlink(missing_ok=True)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: torch.Tensor, device: str) -> torch.Tensor:
    """Posterior means of all pictures, fp16 (n, c, 16, 16), unscaled."""
    chunks = []
    with autocast(device, cpu=True):
        for part in tqdm(pictures.split(128), desc="encoding", mininterval=5):
            chunks.append(vae.encode(to_float(part, device)).latent_dist.mean.half().cpu().contiguous())
    return torch.cat(chunks)


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
    unet, ema = (m.to(device, memory_format=torch.channels_last) for m in (unet, ema))
    share = int(settings["batch"]) // int(os.environ.get("WORLD_SIZE", 1))
    ema.load_state_dict(unet.state_dict())
    run = Run("unet", work, minutes, unet, ema.requires_grad_(False))
    file = work / "latents.safetensors"
    if rank() == 0 and not file.exists():
        _, pictures, _ = draw_many(int(settings["images"]), int(settings["seed"]))
        save_file({"latents": encode_all(vae, pictures, device)}, file)
        del pictures
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    latents = load_file(file)["latents"]
    scene_rng = random.Random(int(settings["seed"]))
    scenes = [sample_scene(scene_rng) for _ in range(len(latents))]
    del vae
    scale = AutoencoderKL.load_config(work / "vae")["scaling_factor"]
    alphas = make_scheduler().alphas_cumprod.to(device)

    def loss(rng: random.Random) -> dict[str, torch.Tensor]:
        index = [rng.randrange(len(latents)) for _ in range(share)]
        x = latents[index].to(device).float() * scale
        texts = ["" if rng.random() < 0.1 else caption(scenes[i], rng) for i in index]
        with torch.no_grad():
            context = text(tokenize(tokenizer, texts, device)).last_hidden_state
        # Half of the times one from each of as many equal strata (less variance than independent draws), half from
        # the middle, where what is drawn takes its shape.
        n = len(index)
        even = (torch.arange(n, device=device) + torch.rand(n, device=device)) / n
        middle = torch.sigmoid(torch.randn(n, device=device))
        t = (torch.where(torch.rand(n, device=device) < 0.5, even, middle) * 1000).long().clamp(0, 999)
        a, s = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        noise = torch.randn_like(x)
        with autocast(device, cpu=True):
            v = unet(a * x + s * noise, t, context).sample
        return {"loss": F.mse_loss(v.float(), a * noise - s * x)}

    run.train(loss)
    if rank() == 0:
        ema.save_pretrained(work / "unet")


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
    if threads:
        torch.set_num_threads(threads)
    if stage in ("clip", "vision", "judge"):
        train_clip(stage, work, minutes, device)
    elif stage in ("vae", "decoder"):
        train_vae(stage, work, minutes, device)
    elif stage == "unet":
        train_unet(work, minutes, device)
    elif stage == "unpack":
        unpack(work, output)
    else:
        pack(work, output)


if __name__ == "__main__":
    main()
