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


def run_cli(*args: str, cwd: Path, timeout: float = 400) -> Run:
    """Run `erase-concept` as a user does, in a process of its own."""
    command = [sys.executable, "-c", "from erase_diffusion.cli import erase_concept; erase_concept()", *args]
    env = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    return Run(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def erased_cat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, dict[str, Any]]:
    """The main job through the command line, once for the whole session: folder, process, record."""
    work = tmp_path_factory.mktemp("main-job")
    run = run_cli("--concept", "cat", "--model", "mini", "--output", "no-cat", "--json", cwd=work)
    record = json.loads(run.out) if run.out else {}
    return work / "no-cat", run, record


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
