"""Shared fixtures: the embedded model's parts, loaded once, and one erased cat made through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from erase_diffusion.checker import CLIPChecker
from erase_diffusion.mini.vocabulary import WEIGHTS
from erase_diffusion.models import Model
from erase_diffusion.text_encoder import TextEncoder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def mini() -> Model:
    return Model("mini")


@pytest.fixture(scope="session")
def encoder(mini: Model) -> TextEncoder:
    return mini.paired_text_encoder(mini.clip()[0])


@pytest.fixture(scope="session")
def painter(mini: Model) -> Any:
    return mini.painter()


@pytest.fixture(scope="session")
def checker(mini: Model) -> CLIPChecker:
    model, tokenizer, processor = mini.judge()
    return CLIPChecker(model, tokenizer, processor, mini.vocabulary)


@dataclass
class Run:
    """A finished command."""

    code: int
    out: str
    err: str


def run_cli(*args: str, cwd: Path, timeout: float = 400, group: bool = False) -> Run:
    """Run `erase-concept`, or `erase-diffusion` with its commands, as a user does, in a process of its own."""
    name = "erase_diffusion" if group else "erase_concept"
    command = [sys.executable, "-c", f"from erase_diffusion.cli import {name}; {name}()", *args]
    env = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    return Run(done.returncode, done.stdout, done.stderr)


def missed_bars() -> list[str]:
    """The bars that the shipped mini misses, by the figures that `scripts/evaluate_mini.py` wrote beside it."""
    file = WEIGHTS / "quality.json"
    if not file.exists():
        return ["it was not measured"]
    quality = json.loads(file.read_text())
    missed = [f"{name}: {r['rate']:.1%}" for name, r in quality["rates"].items() if r["rate"] < r["bar"]]
    missed += [f"PSNR {quality['psnr_db']:.1f} dB"] if quality["psnr_db"] < 27 else []
    return missed + ([f"{quality['seconds_64']:.1f} s for 64 images"] if quality["seconds_64"] > 40 else [])


@pytest.fixture(scope="session")
def drop_in(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, dict[str, Any]]:
    """A drop-in made through the command line, unverified, once for the whole session: folder, process, record."""
    work = tmp_path_factory.mktemp("drop-in")
    arguments = ["--concept", "cat", "--method", "nullspace", "--no-verify", "--output", "no-cat", "--json"]
    run = run_cli(*arguments, cwd=work)
    return work / "no-cat", run, json.loads(run.out) if run.out else {}


@pytest.fixture(scope="session")
def erased_cat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, dict[str, Any]]:
    """The main job through the command line, verified, once for the whole session: folder, process, record."""
    work = tmp_path_factory.mktemp("main-job")
    run = run_cli("--concept", "cat", "--model", "mini", "--output", "no-cat", "--json", cwd=work)
    return work / "no-cat", run, json.loads(run.out) if run.out else {}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
