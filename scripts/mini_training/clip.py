"""The generator's CLIP and the judge."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from erase_diffusion.mini.captions import (
    MALFORMED_PHRASES,
    RELATION_PHRASES,
    SUBJECT_TEMPLATES,
    caption,
    fill_template,
    thing_phrase,
)
from erase_diffusion.mini.world import PLACES, Thing
from mini_training.drawings import COLOUR_NAMES, IMAGES, NAMES, PAIRS, draw_many
from mini_training.loop import STAGES, Run, autocast, start
from mini_training.tokenizer import POSITIONS, load_tokenizer, tokenize

TEXT = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
VISION = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, patch_size=8)
JUDGE_TEXT = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=3)
JUDGE_VISION = dict(hidden_size=144, intermediate_size=576, num_hidden_layers=4, num_attention_heads=6, patch_size=8)


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


def hypotheses(rng: random.Random) -> list[str]:
    """What could be in a picture, in one wording: nothing, each thing, each pair of things in `PAIRS`' order."""
    template = rng.choice(SUBJECT_TEMPLATES["train"])
    pair = rng.choice(RELATION_PHRASES["beside"])
    nothing = rng.choice((*MALFORMED_PHRASES, *rng.choice(list(PLACES.values())).alone))
    said = [nothing, *(thing_phrase(Thing(n, None), n, False) for n in NAMES)]
    for i, j in PAIRS:
        a, b = rng.sample((said[1 + i], said[1 + j]), 2)
        said.append(pair.format(a=a, b=b))
    return [fill_template(template, rng, None, subject=text, there="") for text in said]


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
    # Of 60,000 drawings it learned the pairs by heart and found 93 % of others; of three times as many, all of 500.
    count = 3 * IMAGES if stage == "judge" else IMAGES
    malformed = count // 10 if stage == "judge" else 0
    scenes, pictures, labels = draw_many(count, int(settings["seed"]), malformed)
    mean = torch.tensor(CLIPImageProcessor().image_mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(CLIPImageProcessor().image_std, device=device).view(1, 3, 1, 1)

    shown = np.array([sum(1 << NAMES.index(t.name) for t in s.things) for s in scenes])
    shown[:malformed] = 0
    places = {frozenset(p): k for k, p in enumerate([(), *((k,) for k in range(len(NAMES))), *PAIRS])}
    answers = [places[frozenset(k for k in range(len(NAMES)) if mask >> k & 1)] for mask in shown.tolist()]

    def sample(rng: random.Random) -> list[int]:
        """Every other batch is of a few things only: to tell its pairs apart, both of a pair must be seen and read."""
        size = int(settings["batch"])
        if stage == "clip" or rng.random() < 0.5:
            return [rng.randrange(count) for _ in range(size)]
        few = sum(1 << i for i in rng.sample(range(len(NAMES)), 5))
        pairs = np.flatnonzero((shown > 0) & (shown & ~few == 0) & (shown & (shown - 1) > 0)).tolist()
        alone = np.flatnonzero((shown > 0) & (shown & ~few == 0)).tolist()
        return rng.sample(pairs, size // 2) + rng.sample(alone, size - size // 2)

    def loss(rng: random.Random) -> dict[str, torch.Tensor]:
        index = sample(rng)
        pixels = pictures[index].to(device).float() / 255
        # A shade lighter or darker, a little softer: generated pictures are never quite the drawn ones.
        soft = (2 * torch.rand(len(index), 1, 1, 1, device=device) - 1).clamp_min(0)
        pixels = pixels.lerp(F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False), soft)
        shade = 1 + 0.1 * torch.randn(len(index), 1, 1, 1, device=device)
        pixels = ((pixels * shade).clamp(0, 1) + 0.03 * torch.randn_like(pixels) - mean) / std
        texts = [caption(scenes[i], rng, malformed=i < malformed) for i in index]
        ids = tokenize(tokenizer, texts, device)
        # Only the end-of-text state is compared, and causal attention never looks at what comes after it.
        ids = ids[:, : int((ids == tokenizer.eos_token_id).int().argmax(1).max()) + 1]
        with autocast(device, cpu=True):
            out = model(input_ids=ids, pixel_values=pixels)
        logits = model.logit_scale.exp() * out.image_embeds.float() @ out.text_embeds.float().T
        target = torch.arange(len(index), device=device)
        value = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        patches = out.vision_model_output.last_hidden_state[:, 1:].float()
        truth = labels[index].to(device).long()
        dense = [F.cross_entropy(head(patches).flatten(0, 1), truth[:, k].flatten()) for k, head in enumerate(heads)]
        losses = {
            "loss": value + dense[0] + 0.3 * dense[1],
            "contrastive": value,
            "patch": dense[0],
            "accuracy": (logits.argmax(1) == target).float().mean(),
        }
        if stage != "clip":
            # Asked outright what is in a picture: from captions alone pairs are hardly learned.
            ids = tokenize(tokenizer, hypotheses(rng), device)
            ids = ids[:, : int((ids == tokenizer.eos_token_id).int().argmax(1).max()) + 1]
            with autocast(device, cpu=True):
                said = F.normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output), dim=-1)
            among = model.logit_scale.exp() * out.image_embeds.float() @ said.float().T
            answer = torch.tensor([answers[i] for i in index], device=device)
            losses["among"] = F.cross_entropy(among, answer)
            losses["exact"] = (among.argmax(1) == answer).float().mean()
            losses["loss"] = losses["loss"] + losses["among"]
        return losses

    run.train(loss)
    model.save_pretrained(work / ("clip" if stage == "vision" else stage))
