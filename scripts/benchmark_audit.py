"""What an audit costs: its speed beside the plain diffusers loop, a second encoder, its memory, and its report.

    python scripts/benchmark_audit.py                     # all four, about a quarter of an hour on two cores
    python scripts/benchmark_audit.py --part speed --prompts 128

All figures are ratios or sizes of one run on one machine. The plain loop is what one would write first: two stock
pipelines, one prompt a call, each picture judged by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from erase_diffusion import erase_concept
from erase_diffusion.audit.plan import read_plan
from erase_diffusion.audit.run import Asked, Audit, report_of, write_report
from erase_diffusion.concepts import Concept
from erase_diffusion.image_store import ImageStore
from erase_diffusion.mini.vocabulary import WEIGHTS
from erase_diffusion.models import Model
from erase_diffusion.verification import make_checker, presence

PARTS = ("speed", "second", "memory", "report")


def prompts_file(work: Path, count: int) -> Path:
    """A prompt file of the built-in suite's sentences, as many as asked for."""
    from erase_diffusion.concepts import PromptWriter, preserved

    v = Model("mini").vocabulary
    concept = Concept("cat", aliases=("kitten", "kitty"), anchor="dog")
    texts: list[str] = []
    seed = 0
    while len(texts) < count:
        writer = PromptWriter(concept, v, preserved(concept, v), seed)
        texts += [p.text for p in writer.verification_prompts(100)]
        seed += 1
    path = work / f"prompts-{count}.csv"
    lines = [f'{i},"{text}",{1000 + i}' for i, text in enumerate(texts[:count])]
    path.write_text("case_number,prompt,evaluation_seed\n" + "\n".join(lines) + "\n")
    return path


def audit(erased: Path, prompts: Path, output: Path, cache: Path) -> float:
    """Seconds of a whole audit: load, draw, judge, report."""
    started = time.perf_counter()
    store = ImageStore(cache)
    job = Audit(Model("mini"), output)
    plan = job.plan([erased], Asked(prompts), store)
    job.draw(plan, store)
    job.score(plan)
    write_report(*report_of(output))
    return time.perf_counter() - started


def plain_loop(erased: Path, prompts: Path, count: int) -> float:
    """Seconds of the plain loop over the first prompts."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging
    from transformers import CLIPTextModel

    from erase_diffusion.prompts_file import read_prompts

    logging.disable_progress_bar()
    started = time.perf_counter()
    spec = Model("mini").spec
    pipes = []
    for text_encoder in (None, CLIPTextModel.from_pretrained(erased / "text_encoder")):
        parts = {"text_encoder": text_encoder} if text_encoder else {}
        pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS / "pipeline", safety_checker=None, **parts)
        pipe.set_progress_bar_config(disable=True)
        pipes.append(pipe)
    checker = make_checker(Model("mini"))
    for prompt in read_prompts(prompts).prompts[:count]:
        for pipe in pipes:
            generator = torch.Generator().manual_seed(prompt.seed)
            image = pipe(
                prompt.text, num_inference_steps=spec.steps, guidance_scale=spec.guidance, generator=generator
            ).images[0]
            seen = checker.embed_images([image])
            presence(checker, Concept("cat"), seen)
            checker.clip_score(seen, [prompt.text])
    return time.perf_counter() - started


def resident(pid: int) -> float:
    """Resident memory in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return float(line.split()[1]) / 1024
    return 0.0


def memory(erased: Path, prompts: Path, output: Path) -> dict[str, float]:
    """Peak resident MiB of an audit's process up to 200 images drawn, and afterwards until it ends."""
    command = [sys.executable, "-m", "erase_diffusion", "audit", "--erased", str(erased), "--prompts", str(prompts)]
    command += ["--output", str(output), "--steps", "1", "--no-cache", "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603 - our own command
    early, late = 0.0, 0.0
    manifest = output / "manifest.rank-00000.jsonl"
    while process.poll() is None:
        try:
            now = resident(process.pid)
        except (OSError, ProcessLookupError):
            break
        drawn = manifest.read_bytes().count(b"\n") if not late and manifest.exists() else 0
        if late or drawn > 200:
            late = max(late, now)
        else:
            early = max(early, now)
        time.sleep(0.2)
    return {"up to 200 images": early, "afterwards": late}


def opening(page: Path) -> float | None:
    """Seconds in which a headless Chromium opens the page, or None where there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    chromium = next((p for p in ("/usr/bin/chromium", "/usr/bin/google-chrome") if os.path.exists(p)), None)
    if chromium is None:
        return None
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1440, "height": 900})
        started = time.perf_counter()
        tab.goto(page.resolve().as_uri())
        tab.wait_for_load_state("load")
        seconds = time.perf_counter() - started
        browser.close()
    return seconds


@click.command(help=__doc__)
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), default=PARTS)
@click.option("--prompts", "count", default=512, show_default=True, help="Prompts of the speed and second parts.")
@click.option("--plain", default=128, show_default=True, help="Prompts of the plain loop; its rate is compared.")
@click.option("--memory-prompts", default=10_000, show_default=True)
@click.option("--report-pairs", default=2_000, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(parts: tuple[str, ...], count: int, plain: int, memory_prompts: int, report_pairs: int, threads: int) -> None:
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, concept in (("cat", "cat"), ("dog", "dog")):
            erase_concept(concept, method="nullspace", verify=False).save_pretrained(work / name)
        if "speed" in parts or "second" in parts:
            prompts = prompts_file(work, count)
            first = audit(work / "cat", prompts, work / "first", work / "cache")
            figures["first audit, seconds"] = first
        if "speed" in parts:
            loop = plain_loop(work / "cat", prompts, plain)
            figures["audit, images a second"] = 2 * count / first
            figures["plain loop, images a second"] = 2 * plain / loop
            figures["faster"] = (2 * count / first) / (2 * plain / loop)
        if "second" in parts:
            second = audit(work / "dog", prompts, work / "second", work / "cache")
            figures["second encoder, seconds"] = second
            figures["second of first"] = second / first
        if "memory" in parts:
            found = memory(work / "cat", prompts_file(work, memory_prompts), work / "memory")
            figures |= {f"memory {name}, MiB": value for name, value in found.items()}
        if "report" in parts:
            output = work / "report"
            job = Audit(Model("mini"), output)
            plan = job.plan([work / "cat"], Asked(prompts_file(work, report_pairs), steps=2), None)
            job.draw(plan)
            job.score(plan)
            for told, shown in (("", 40), (", all pairs shown", report_pairs)):
                started = time.perf_counter()
                page = write_report(*report_of(output, shown=shown))
                figures[f"report{told}, seconds"] = time.perf_counter() - started
                figures[f"report{told}, MB"] = page.stat().st_size / 1e6
                seconds = opening(page)
                if seconds is not None:
                    figures[f"report{told}, opens in seconds"] = seconds
            assert len(read_plan(output).samples) == report_pairs
    click.echo(json.dumps({k: round(v, 3) for k, v in figures.items()}, indent=1))


if __name__ == "__main__":
    main()
