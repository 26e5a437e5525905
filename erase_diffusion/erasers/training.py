"""What the trained methods share: the sets encoded once, and one loop that keeps the best held-out checkpoint."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from erase_diffusion.concepts import PromptSets
from erase_diffusion.erasers.base import Erasure, Progress, align_all, anchored_states, blend, check_strength
from erase_diffusion.errors import ConfigError
from erase_diffusion.text_encoder import TextEncoder


@dataclass(frozen=True)
class Schedule:
    """How a method trains.

    rate: the method's learning rate as a multiple of what its model usually takes.

    strength: 0 leaves the encoder as it is, 1 moves it the whole way; between, the weights are blended.
    steps: at most; batch_size: prompts of each side and sort (with a picture, without) in a step.
    patience: evaluations, one every `evaluate_every` steps, without improvement on the held-out prompts before it
    stops.
    """

    rate: ClassVar[float] = 1.0

    strength: float = 1.0
    learning_rate: float = 1e-5
    steps: int = 200
    batch_size: int = 16
    evaluate_every: int = 20
    patience: int = 3

    def __post_init__(self) -> None:
        check_strength(self.strength)
        for name in ("steps", "batch_size", "evaluate_every", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate must be over 0, got {self.learning_rate}")


class Batches:
    """Forget pairs and retain prompts with everything about the original that a loss reads, encoded once.

    forget_ids, retain_ids: (n, T).  anchor_states: the anchor prompts' original states at aligned positions, (n, T, d);
    apart: the forget prompts' squared distances from them, (n,).  retain_states: (n, T, d); retain_text: (n, d_proj).
    forget_images, retain_images: image features (k, d_proj) of each prompt's pictures, or None.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        pairs: tuple[tuple[str, str], ...],
        retain: tuple[str, ...],
        images: Mapping[str, Tensor],
    ):
        prompts, anchors = [p for p, _ in pairs], [a for _, a in pairs]
        self.forget_ids, self.retain_ids = encoder.tokenize(prompts), encoder.tokenize(retain)
        anchor_ids = encoder.tokenize(anchors)
        where = align_all(self.forget_ids, anchor_ids, encoder.end_of_text(self.forget_ids))
        self.anchor_states = anchored_states(encoder.encode(anchors), where)
        self.apart = (encoder.encode(prompts) - self.anchor_states).square().sum((1, 2))
        self.retain_states = encoder.encode(retain)
        with torch.no_grad():
            self.retain_text = encoder.project(encoder.pooled(self.retain_states, self.retain_ids))
        self.forget_images = [images.get(p) for p in prompts]
        self.retain_images = [images.get(p) for p in retain]
        self._retain_prompts = retain

    @property
    def pictured(self) -> bool:
        """Whether both sides have prompts with an image."""
        return all(any(i is not None for i in images) for images in (self.forget_images, self.retain_images))

    def sample(self, rng: random.Random, size: int) -> tuple[list[int], list[int]]:
        """Half of each batch with an image, half without where there are such, and always the empty prompt."""
        return self._draw(rng, self.forget_images, size), [
            *self._draw(rng, self.retain_images, size),
            *([self._retain_prompts.index("")] if "" in self._retain_prompts else []),
        ]

    @staticmethod
    def _draw(rng: random.Random, images: list[Tensor | None], size: int) -> list[int]:
        pictured = [i for i, image in enumerate(images) if image is not None]
        bare = [i for i, image in enumerate(images) if image is None]
        chosen = rng.sample(pictured, min(size, len(pictured)))
        return chosen + rng.sample(bare, min(size if chosen else 2 * size, len(bare)))


def pick(images: list[Tensor | None], chosen: list[int], rng: random.Random) -> tuple[list[int], Tensor | None]:
    """Of the chosen prompts, the places of those with pictures, and one picture's features of each, (k, d_proj)."""
    places = [i for i, j in enumerate(chosen) if images[j] is not None]
    features = [f[rng.randrange(len(f))] for f in (images[chosen[i]] for i in places) if f is not None]
    return places, torch.stack(features) if features else None


# The weighted sum under "total" and each term under its name, for the chosen forget and retain prompts.
Losses = Callable[[TextEncoder, Batches, list[int], list[int], random.Random], dict[str, Tensor]]


def make_batches(
    encoder: TextEncoder, sets: PromptSets, images: Mapping[str, Tensor], *, pictures_only: bool
) -> tuple[Batches, Batches]:
    """The batches to train on and those to stop by; pictures_only: the losses see no prompt without a picture."""
    train = Batches(encoder, sets.forget, sets.retain, images)
    held_out = Batches(encoder, sets.forget_held_out or sets.forget, sets.retain_held_out or sets.retain, images)
    return train, train if pictures_only and not held_out.pictured else held_out


def whole(work: TextEncoder) -> nn.Module:
    """The whole text tower."""
    model: nn.Module = work.model.requires_grad_(True)
    return model


def train(
    name: str,
    encoder: TextEncoder,
    batches: tuple[Batches, Batches],
    losses: Losses,
    config: Schedule,
    *,
    seed: int,
    progress: Progress,
    prepare: Callable[[TextEncoder], nn.Module] = whole,
    ema: float = 0.0,
) -> Erasure:
    """Adam on a copy of `encoder`, warmed up over ten steps; the best held-out checkpoint is kept.

    prepare: given the copy, what of it (or beside it) is trained: the parameters of the returned module that ask for a
    gradient.  ema: decay of the exponential moving average of the weights that is evaluated and kept; 0 for none.
    Raises ConfigError when the loss stops being finite: nothing of such a run is worth keeping.
    """
    rng = random.Random(f"{name} {seed}")
    torch.manual_seed(seed)
    work = encoder.copy()
    module = prepare(work).train()
    source = {k: v.detach().clone() for k, v in module.state_dict().items()}
    average = source
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.learning_rate)
    training, held_out = batches
    best, best_loss, best_step, waited = None, float("inf"), 0, 0
    history: list[dict[str, float]] = []
    stopped = f"all {config.steps} steps done"
    for step in range(1, config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, step / 10)
        loss = losses(work, training, *training.sample(rng, config.batch_size), rng)["total"]
        if not torch.isfinite(loss):
            raise ConfigError(
                f"{name}: the loss is {loss.item()} at step {step}; try a lower learning rate than "
                f"{config.learning_rate}"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if ema:
            average = blend(module.state_dict(), average, ema)
        if step % config.evaluate_every == 0 or step == config.steps:
            live = {k: v.detach().clone() for k, v in module.state_dict().items()} if ema else None
            if live:
                module.load_state_dict(average)
            with torch.no_grad():
                values = losses(work, held_out, *held_out.sample(random.Random(0), 64), rng)
            history.append({"step": step, **{k: float(v) for k, v in values.items()}})
            total = history[-1]["total"]
            if total < best_loss - 0.01 * abs(best_loss) or best is None:
                best_loss, best_step, waited = total, step, 0
                best = {k: v.detach().clone() for k, v in module.state_dict().items()}
            else:
                waited += 1
            if live:
                module.load_state_dict(live)
        progress(step, config.steps, f"held-out loss {history[-1]['total']:.3f}" if history else "")
        if waited >= config.patience:
            stopped = f"no better held-out loss for {waited} evaluations after step {best_step}"
            break
    assert best is not None
    module.load_state_dict(blend(source, best, config.strength))
    module.eval().requires_grad_(False)
    return Erasure(work, name, asdict(config), f"{stopped}; kept step {best_step}", tuple(history))
