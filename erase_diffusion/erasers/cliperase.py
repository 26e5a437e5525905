"""CLIPErase (arXiv 2410.23330): forgetting, retention and consistency, on the text tower alone.

The paper's three modules see a text only through its pooled end-of-text vector. A Stable Diffusion pipeline
reads every position, and the empty prompt too. Two sequence terms hold and move those: with their weights at
zero this is the paper's form. The image tower is frozen, so its features are computed once, by the caller.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from erase_diffusion.concepts import PromptSets
from erase_diffusion.erasers.base import Erasure, Progress, align_all, anchored_states, silent
from erase_diffusion.errors import ConfigError
from erase_diffusion.text_encoder import TextEncoder


def forgetting_loss(text: Tensor, image: Tensor, form: Literal["raw", "cosine"] = "cosine") -> Tensor:
    """Forgetting module, L_FM = 1/N_f Σ f_img(x_i)·f_txt(t_i) over forget pairs (CLIPErase, eq. of L_FM).

    text, image: (N_f, d_proj), not normalised. "raw" is the paper's dot product, unbounded below;
    "cosine" the same of the normalised vectors, in [-1, 1].
    """
    if form == "cosine":
        text, image = F.normalize(text, dim=-1), F.normalize(image, dim=-1)
    return (text * image).sum(-1).mean()


def retention_loss(text: Tensor, image: Tensor, logit_scale: float) -> Tensor:
    """Retention module, CLIP's contrastive loss on retain pairs (Radford et al. 2021, figure 3).

    L_RM = ½ [CE(s·T·Iᵀ, 1…N_r) + CE(s·I·Tᵀ, 1…N_r)], T and I normalised; text, image: (N_r, d_proj).
    """
    logits = logit_scale * F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def consistency_loss(original: Tensor, text: Tensor, image: Tensor, logit_scale: float) -> Tensor:
    """Consistency module, L_CM = 1/N_r Σ KL(p_o^img ‖ p_u^img) + KL(p_o^txt ‖ p_u^txt) on retain pairs.

    p is the softmax of the batch's logits, by image and by text, of the original (o) and unlearned (u) model.
    original, text, image: (N_r, d_proj).
    """
    image = F.normalize(image, dim=-1)
    before = logit_scale * F.normalize(original, dim=-1) @ image.T
    after = logit_scale * F.normalize(text, dim=-1) @ image.T
    by_text = F.kl_div(after.log_softmax(1), before.log_softmax(1), log_target=True, reduction="batchmean")
    by_image = F.kl_div(after.T.log_softmax(1), before.T.log_softmax(1), log_target=True, reduction="batchmean")
    return by_image + by_text


def sequence_retention_loss(states: Tensor, original: Tensor, variance: Tensor) -> Tensor:
    """Mean squared movement of retain prompts over all positions, in units of the states' variance.

    L = 1/(n·T·d) Σ (h_u − h_o)² / σ²; states, original: (n, T, d), variance σ²: (d,). Derived for Stable Diffusion,
    which reads every position and not only the pooled one.
    """
    return ((states - original).square() / variance).mean()


def sequence_forgetting_loss(states: Tensor, anchor: Tensor, apart: Tensor) -> Tensor:
    """How much of the way from the concept to its anchor is left, over all positions: 1 at first, 0 at the anchor.

    L = 1/n Σ_i ‖h_u − h*‖² / ‖h_o − h*‖²; states, anchor: (n, T, d), the anchor prompt's original states h* at aligned
    positions; apart: (n,) the original's squared distances. Relative, so that a prompt whose one word differs counts
    as much as one that differs everywhere.
    """
    return ((states - anchor).square().sum((1, 2)) / apart.clamp_min(1e-6)).mean()


@dataclass(frozen=True)
class CLIPEraseConfig:
    """Weights and schedule.

    retention, forgetting, consistency: the paper's λ1, λ2, λ3.
    sequence_forgetting, sequence_retention: weights of the two terms over all positions; the paper
    has neither (0 and 0, with `forgetting_form` "raw").
    forgetting_form: "cosine", or the paper's "raw" dot product.
    strength: 0 leaves the encoder as it is, 1 moves it the whole way; between, the weights are blended.
    steps: at most; patience: evaluations without improvement on the held-out prompts before it stops.
    """

    strength: float = 1.0
    retention: float = 1.0
    forgetting: float = 3.0
    consistency: float = 3.0
    sequence_forgetting: float = 10.0
    sequence_retention: float = 300.0
    forgetting_form: Literal["raw", "cosine"] = "cosine"
    learning_rate: float = 1e-5
    steps: int = 200
    batch_size: int = 16
    evaluate_every: int = 20
    patience: int = 3

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise ConfigError(f"strength must lie in [0, 1], got {self.strength}")
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        if self.forgetting_form not in ("raw", "cosine"):
            raise ConfigError(f"forgetting_form must be raw or cosine, got {self.forgetting_form!r}")


class CLIPErase:
    """Trains a copy of the text tower with Adam, keeps the best held-out checkpoint, says why it stopped."""

    name: ClassVar[str] = "cliperase"
    needs_images: ClassVar[bool] = True

    def __init__(self, config: CLIPEraseConfig | None = None):
        self.config = config or CLIPEraseConfig()

    def erase(
        self,
        encoder: TextEncoder,
        sets: PromptSets,
        images: Mapping[str, Tensor],
        *,
        seed: int = 0,
        progress: Progress = silent,
    ) -> Erasure:
        """Erase from a copy of `encoder`. Raises ConfigError when no forget or no retain prompt has an image."""
        config, rng = self.config, random.Random(f"cliperase {seed}")
        torch.manual_seed(seed)
        work = encoder.copy()
        work.model.train().requires_grad_(True)
        train = _Batch(encoder, sets.forget, sets.retain, images)
        held_out = _Batch(encoder, sets.forget_held_out or sets.forget, sets.retain_held_out or sets.retain, images)
        if not (config.sequence_forgetting or config.sequence_retention or held_out.pictured):
            held_out = train  # the paper's form sees only what has a picture
        variance = train.retain_states.flatten(0, 1).var(0).clamp_min(1e-6)
        optimizer = torch.optim.Adam(work.model.parameters(), lr=config.learning_rate)

        def objective(batch: _Batch, forget: list[int], retain: list[int]) -> dict[str, Tensor]:
            return self._losses(work, batch, forget, retain, variance, rng)

        best, best_loss, best_step, waited = None, float("inf"), 0, 0
        history: list[dict[str, float]] = []
        stopped = f"all {config.steps} steps done"
        for step in range(1, config.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(1.0, step / 10)
            losses = objective(train, *train.sample(rng, config.batch_size))
            optimizer.zero_grad(set_to_none=True)
            losses["total"].backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(work.model.parameters(), 1.0)
            optimizer.step()
            if step % config.evaluate_every == 0 or step == config.steps:
                with torch.no_grad():
                    values = objective(held_out, *held_out.sample(random.Random(0), 64))
                history.append({"step": step, **{k: float(v) for k, v in values.items()}})
                total = history[-1]["total"]
                if total < best_loss - 0.01 * abs(best_loss) or best is None:
                    best_loss, best_step, waited = total, step, 0
                    best = {k: v.detach().clone() for k, v in work.model.state_dict().items()}
                else:
                    waited += 1
            progress(step, config.steps, f"held-out loss {history[-1]['total']:.3f}" if history else "")
            if waited >= config.patience:
                stopped = f"no better held-out loss for {waited} evaluations after step {best_step}"
                break
        assert best is not None
        source = encoder.model.state_dict()
        blended = {
            k: torch.lerp(source[k], v, config.strength) if v.is_floating_point() else v for k, v in best.items()
        }
        work.model.load_state_dict(blended)
        work.model.eval().requires_grad_(False)
        return Erasure(
            work,
            self.name,
            asdict(config),
            f"{stopped}; kept step {best_step}",
            tuple(history),
        )

    def _losses(
        self,
        work: TextEncoder,
        batch: _Batch,
        forget: list[int],
        retain: list[int],
        variance: Tensor,
        rng: random.Random,
    ) -> dict[str, Tensor]:
        """The weighted sum under "total" and each term under its name, from one pass of the text tower."""
        config = self.config
        ids = torch.cat([batch.forget_ids[forget], batch.retain_ids[retain]])
        states = work.hidden(ids)
        text = work.project(work.pooled(states, ids))
        n = len(forget)
        pictured = [i for i, j in enumerate(forget) if batch.forget_images[j] is not None]
        kept = [i for i, j in enumerate(retain) if batch.retain_images[j] is not None]
        terms: dict[str, Tensor] = {}
        if pictured:
            image = torch.stack([_any(batch.forget_images[forget[i]], rng) for i in pictured])
            terms["forgetting"] = forgetting_loss(text[:n][pictured], image, config.forgetting_form)
        if len(kept) > 1:
            image = torch.stack([_any(batch.retain_images[retain[i]], rng) for i in kept])
            chosen = [retain[i] for i in kept]
            terms["retention"] = retention_loss(text[n:][kept], image, work.logit_scale)
            terms["consistency"] = consistency_loss(batch.retain_text[chosen], text[n:][kept], image, work.logit_scale)
        if config.sequence_forgetting:
            terms["sequence_forgetting"] = sequence_forgetting_loss(
                states[:n], batch.anchor_states[forget], batch.apart[forget]
            )
        if config.sequence_retention:
            terms["sequence_retention"] = sequence_retention_loss(states[n:], batch.retain_states[retain], variance)
        total = torch.stack([getattr(config, name) * value for name, value in terms.items()]).sum()
        return {"total": total, **terms}


def _any(features: Tensor | None, rng: random.Random) -> Tensor:
    assert features is not None
    return features[rng.randrange(len(features))]


class _Batch:
    """Everything about the original that the loop reads, encoded once."""

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
