"""Lip: unlearning a class from a CLIP with synthetic samples and Lipschitz regularisation (arXiv 2407.07485).

No pictures are needed: samples of the class are made by gradient ascent on noise, through the image tower. Then both
towers learn to give, for a sample, what they give for the sample under noise: the class loses its shape. Only the
tensors that the loss pulls at most are trained, the noise grows when nothing moves any more, and it stops when the
samples are no longer told as the class. The paper's loss holds nothing of what must stay.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erase_diffusion.concepts import PromptSets
from erase_diffusion.erasers.base import Erasure, Needs, Progress, blend, check_strength, silent
from erase_diffusion.errors import ConfigError
from erase_diffusion.text_encoder import TextEncoder

# The paper's figures are for pictures of 224 pixels; a step's length and the jitter go with the size.
SIZE, STEP, JITTER, PIXELS, FLOOR = 224, 25.0, 16, 2.5, 0.45


@dataclass(frozen=True)
class LipschitzConfig:
    """The paper's settings.

    samples: synthetic pictures a class, made in at most `iterations` steps.  noises: for each sample in a step.
    sigmas: the noise's standard deviations, in the order in which they are tried.  tensors: how many of each tower
    are trained.  forgotten: share of the samples still told as their class at which it stops.
    """

    rate: ClassVar[float] = 5.0

    strength: float = 1.0
    learning_rate: float = 5e-5
    samples: int = 64
    iterations: int = 3000
    epochs: int = 30
    batch_size: int = 64
    noises: int = 25
    tensors: int = 10
    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
    forgotten: float = 0.1

    def __post_init__(self) -> None:
        check_strength(self.strength)
        counts = (self.samples, self.iterations, self.epochs, self.batch_size, self.noises, self.tensors)
        if min(counts) < 1:
            raise ConfigError(
                f"samples, iterations, epochs, batch_size, noises and tensors must be at least 1, got {counts}"
            )
        if not self.sigmas or min(self.sigmas) <= 0 or self.learning_rate <= 0:
            raise ConfigError(f"sigmas and learning_rate must be over 0, got {self.sigmas} and {self.learning_rate}")


def lipschitz_loss(text: Tensor, sample: Tensor, noisy: Tensor, noise: Tensor) -> Tensor:
    """(‖t − f(x+ε)‖ + ‖f(x) − f(x+ε)‖) / (2‖ε‖), the mean over noises and samples (arXiv 2407.07485).

    text t, sample f(x): (n, d_proj), not normalised; noisy f(x+ε): (k, n, d_proj), without gradient; noise ‖ε‖: (k, n).
    """
    moved = (text - noisy).norm(dim=-1) + (sample - noisy).norm(dim=-1)
    mean: Tensor = (moved / (2 * noise)).mean()
    return mean


class Lipschitz:
    """Trains the most pulled tensors of copies of both towers on samples made from noise."""

    name: ClassVar[str] = "lipschitz"
    needs: ClassVar[Needs] = "clip"

    def __init__(self, config: LipschitzConfig | None = None):
        self.config = config or LipschitzConfig()

    def erase(
        self,
        encoder: TextEncoder,
        sets: PromptSets,
        images: Mapping[str, Tensor],
        *,
        seed: int = 0,
        progress: Progress = silent,
    ) -> Erasure:
        """Erase from copies of `encoder` and of its image tower; `images` are not used.

        Raises ConfigError when the sets name no classes, when no sample of a class can be made, or when the loss stops
        being finite.
        """
        config = self.config
        if not sets.forget_classes or not sets.retain_classes:
            raise ConfigError(f"{self.name} needs the classes to forget and those that stay; the prompt sets name none")
        assert encoder.image_tower is not None
        generator = torch.Generator(encoder.device).manual_seed(seed)
        rng = random.Random(seed)
        classes = [*sets.forget_classes, *sets.retain_classes]
        with torch.no_grad():
            prototypes = F.normalize(_text(encoder, classes), dim=-1)
        made = [
            synthesise(encoder, prototypes, i, config, generator, rng, label)
            for i, label in enumerate(sets.forget_classes)
        ]
        samples, labels = torch.cat(made), torch.cat([torch.full((len(m),), i) for i, m in enumerate(made)])
        work, tower = encoder.copy(), encoder.image_tower.copy()
        work = replace(work, image_tower=tower)
        towers = nn.ModuleList([work.model, tower.model])
        source = copy.deepcopy(towers.state_dict())

        def loss(batch: Tensor, sigma: float) -> Tensor:
            x, text = samples[batch], _text(work, sets.forget_classes)[labels[batch]]
            noisy, lengths = [], []
            with torch.no_grad():
                for _ in range(config.noises):
                    noise = sigma * torch.randn(x.shape, generator=generator, device=x.device)
                    noisy.append(tower.embed(x + noise))
                    lengths.append(noise.flatten(1).norm(dim=1))
            return lipschitz_loss(text, tower.embed(x), torch.stack(noisy), torch.stack(lengths))

        def accuracy() -> float:
            with torch.no_grad():
                known = torch.cat([_text(work, sets.forget_classes), _text(work, sets.retain_classes)])
                answers = (F.normalize(tower.features(samples), dim=-1) @ F.normalize(known, dim=-1).T).argmax(1)
            return float((answers.cpu() == labels).float().mean())

        some = torch.arange(min(len(samples), config.batch_size))
        trained = _most_pulled(towers, loss(some, config.sigmas[0]), config)
        towers.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)

        level, last, best = 0, accuracy(), copy.deepcopy(towers.state_dict())
        history: list[dict[str, float]] = []
        stopped = f"all {config.epochs} epochs done"
        optimizer = _adam(trained, config)
        for epoch in range(1, config.epochs + 1):
            order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed + epoch))
            for batch in torch.split(order, config.batch_size):
                value = loss(batch, config.sigmas[level])
                if not torch.isfinite(value):
                    raise ConfigError(
                        f"{self.name}: the loss is {value.item()} in epoch {epoch}; try a lower learning rate than "
                        f"{config.learning_rate}"
                    )
                optimizer.zero_grad(set_to_none=True)
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            now = accuracy()
            history.append({"step": epoch, "total": float(value.detach()), "sigma": config.sigmas[level], "told": now})
            progress(epoch, config.epochs, f"{now:.0%} of the samples told")
            if now <= config.forgotten:
                best = copy.deepcopy(towers.state_dict())
                stopped = f"{now:.0%} of the samples are told after {epoch} epochs"
                break
            if now < last:
                last, best = now, copy.deepcopy(towers.state_dict())
                continue
            towers.load_state_dict(best)
            optimizer, level = _adam(trained, config), level + 1
            if level == len(config.sigmas):
                stopped = f"no noise moves anything any more after {epoch} epochs, {last:.0%} of the samples are told"
                break
        towers.load_state_dict(blend(source, best, config.strength))
        towers.requires_grad_(False)
        return Erasure(work, self.name, asdict(config), stopped, tuple(history))


def _text(encoder: TextEncoder, classes: tuple[str, ...] | list[str]) -> Tensor:
    """Unnormalised text embeddings (n, d_proj), with gradient."""
    return encoder.embed(encoder.tokenize(classes))


def _adam(trained: list[nn.Parameter], config: LipschitzConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)


def _most_pulled(towers: nn.ModuleList, loss: Tensor, config: LipschitzConfig) -> list[nn.Parameter]:
    """Of each tower the parameters with the highest mean |gradient|."""
    chosen: list[nn.Parameter] = []
    everything = list(towers.parameters())
    gradients = dict(zip(everything, torch.autograd.grad(loss, everything, allow_unused=True), strict=True))
    for tower in towers:
        pulled = [(float(g.abs().mean()), p) for p in tower.parameters() if (g := gradients[p]) is not None]
        chosen += [p for _, p in sorted(pulled, key=lambda pair: -pair[0])[: config.tensors]]
    return chosen


def synthesise(
    encoder: TextEncoder,
    prototypes: Tensor,
    index: int,
    config: LipschitzConfig,
    generator: torch.Generator,
    rng: random.Random,
    label: str,
) -> Tensor:
    """Pixel values (n, 3, size, size) that CLIP tells as one class, made from noise.

    Ascends the class's logit − 1e-3‖x‖ in steps of a fixed length, under jitter, with a little blur now and then. A
    sample is taken when the class wins with a probability over a threshold that falls while none passes.
    prototypes: (c, d_proj), normalised, of all classes, `index` the wished one.
    Raises ConfigError when not one sample passes.
    """
    tower = encoder.image_tower
    assert tower is not None
    size, scale = tower.size, max(encoder.logit_scale, 20.0)
    step, jitter = STEP * size / SIZE, max(1, JITTER * size // SIZE)
    x = torch.randn((config.samples, 3, size, size), generator=generator, device=prototypes.device)
    taken, threshold = [], 0.99
    for iteration in range(1, config.iterations + 1):
        shift = (rng.randint(-jitter, jitter), rng.randint(-jitter, jitter))
        moved = x.roll(shift, (2, 3)).requires_grad_(True)
        logits = scale * F.normalize(tower.embed(moved), dim=-1) @ prototypes.T
        wish = logits[:, index] - 1e-3 * moved.flatten(1).norm(dim=1)
        gradient = torch.autograd.grad(wish.sum(), moved)[0]
        gradient = gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
        x = (moved.detach() + step * gradient).clamp(-PIXELS, PIXELS).roll((-shift[0], -shift[1]), (2, 3))
        if iteration % 10:
            continue
        x = _blur(x)
        with torch.no_grad():
            p = (scale * F.normalize(tower.embed(x), dim=-1) @ prototypes.T).softmax(-1)
        passed = (p.argmax(1) == index) & (p[:, index] > threshold)
        if passed.any():
            taken.append(x[passed])
            x = x[~passed]
            if not len(x):
                break
        elif threshold == FLOOR and 2 * len(x) <= config.samples:
            break  # the rest wander; there is enough
        else:
            threshold = max(FLOOR, threshold - 0.025)
    if not taken:
        raise ConfigError(
            f"no sample of {label!r} could be made in {config.iterations} iterations; the CLIP does not know it"
        )
    return torch.cat(taken)


def _blur(x: Tensor, sigma: float = 0.5) -> Tensor:
    """A 3×3 Gaussian blur."""
    weights = torch.exp(-torch.tensor([1.0, 0.0, 1.0], device=x.device) / (2 * sigma**2))
    weights = weights / weights.sum()
    kernel = torch.outer(weights, weights).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
