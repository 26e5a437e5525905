"""The training loop of every stage: bounded, resumable, logged, over several processes where asked."""

from __future__ import annotations

import csv
import math
import os
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

STAGES: dict[str, dict[str, float]] = {
    # steps, batch size, peak learning rate, seed of the draw
    "clip": dict(steps=8000, batch=128, lr=1e-3, seed=1),
    "vision": dict(steps=8000, batch=64, lr=1e-3, seed=5),
    "judge": dict(steps=40000, batch=64, lr=1e-3, seed=2),
    "vae": dict(steps=9000, batch=16, lr=1.5e-3, seed=3),
    "refine": dict(steps=9000, batch=16, lr=1e-3, seed=6),
    "unet": dict(steps=200_000, batch=64, lr=8e-4, seed=4, seed_of_pairs=7, images=30_000),
}


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
        self.device = next(module.parameters()).device
        self.path, self.log = work / f"{stage}.pt", work / f"{stage}.csv"
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True, map_location=self.device)
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
        since = self.step
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
            self.seconds += agreed(time.monotonic() - started, self.device)
            bar.update()
            if self.step % 50 == 0:
                means = {name: total / (self.step - since) for name, total in sums.items()}
                sums, since = {}, self.step
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


def start(cls: Any, folder: Path, make: Callable[[], Any]) -> Any:
    """The component that lies in the work folder (from `unpack`, or an earlier run), else one with random weights."""
    return cls.from_pretrained(folder, torch_dtype=torch.float32) if (folder / "config.json").exists() else make()


def autocast(device: str, cpu: bool = False) -> torch.autocast | nullcontext[None]:
    """bf16 on a GPU; on a CPU it is 1.5 times as fast for CLIP, 1.8 for the VAE and 1.2 for the UNet."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16) if kind == "cuda" or cpu else nullcontext()


def rank() -> int:
    """This process's number; several run under torchrun, each with its share of the batch."""
    return int(os.environ.get("RANK", 0))


def agreed(seconds: float, device: torch.device) -> float:
    """The first process's clock, so that all of them stop at the same step."""
    if not torch.distributed.is_initialized():
        return seconds
    value = torch.tensor([seconds], dtype=torch.float64, device=device)
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
