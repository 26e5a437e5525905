"""Kill an audit at random instants and start it again: it must end as an undisturbed one, with no batch done twice.

    python scripts/check_audit_resume.py --kills 20

Also runs it as two processes, as `torchrun` starts them, and kills one of two.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from erase_diffusion import erase_concept

COMPARED = ("manifest.jsonl", "scores/judge/scores.jsonl")


def command(work: Path, output: str, *launcher: str) -> list[str]:
    start = launcher or (sys.executable,)
    return [
        *(*start, "-m", "erase_diffusion", "audit", "--erased", str(work / "cat"), "--suite", "--images", "12"),
        *("--output", str(work / output), "--no-cache", "--batch-size", "8", "--steps", "6", "--threshold", "0.5"),
    ]


def run(words: list[str]) -> subprocess.Popen[bytes]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(words, start_new_session=True, **quiet)  # type: ignore[call-overload, no-any-return]  # noqa: S603


def lines(folder: Path) -> list[str]:
    """The keys of all finished manifest lines, merged or not."""
    keys = []
    for path in [folder / "manifest.jsonl", *sorted(folder.glob("manifest.rank-*.jsonl"))]:
        if path.exists():
            for line in path.read_bytes().split(b"\n")[:-1]:
                keys.append(json.loads(line)["key"])
    return keys


@click.command(help=__doc__)
@click.option("--kills", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(kills: int, seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        erase_concept("cat", method="nullspace", verify=False).save_pretrained(work / "cat")
        started = time.perf_counter()
        run(command(work, "whole")).wait()
        seconds = time.perf_counter() - started
        wanted = {name: (work / "whole" / name).read_bytes() for name in COMPARED}
        images = len(lines(work / "whole"))
        click.echo(f"undisturbed: {images} images in {seconds:.0f} s")
        same = twice = worked = 0
        for i in range(kills):
            output = f"killed-{i}"
            process = run(command(work, output))
            # Anywhere from the first batch on to the end of the scoring.
            time.sleep(rng.uniform(0.3, 1.0) * seconds)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            before = lines(work / output)
            worked += 0 < len(before) < images
            run(command(work, output)).wait()
            after = lines(work / output)
            twice += len(before) != len(set(before)) or len(after) != len(set(after))
            same += all((work / output / name).read_bytes() == wanted[name] for name in COMPARED)
        click.echo(
            f"{kills} kills ({worked} while images were drawn): same manifest and scores {same}, batches twice {twice}"
        )
        ok = same == kills and not twice
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        # torchrun takes the module by -m as well.
        run(command(work, "two", *torchrun)).wait()
        two = all((work / "two" / name).read_bytes() == wanted[name] for name in COMPARED)
        scores = [
            {(r["encoder"], r["case"]): r for r in map(json.loads, (work / o / COMPARED[1]).read_text().splitlines())}
            for o in ("whole", "two")
        ]
        apart = max(abs(scores[0][k]["concepts"]["cat"] - scores[1][k]["concepts"]["cat"]) for k in scores[0])
        click.echo(f"two processes: files the same {two}, scores at most {apart:.2g} apart")
        launched = run(command(work, "died", *torchrun))
        shard = work / "died" / "manifest.rank-00001.jsonl"
        while launched.poll() is None and not shard.exists():
            time.sleep(0.05)
        victims = subprocess.run(["pgrep", "-P", str(launched.pid)], capture_output=True, text=True).stdout.split()  # noqa: S603, S607
        os.kill(int(victims[-1]), signal.SIGKILL)
        code = launched.wait(timeout=300)
        left = images - len(lines(work / "died"))
        run(command(work, "died")).wait()
        healed = all((work / "died" / name).read_bytes() == wanted[name] for name in COMPARED)
        click.echo(f"one of two processes killed: exit code {code}, {left} images left to do, then the same: {healed}")
        sys.exit(0 if ok and apart <= 1e-4 and code != 0 and healed else 1)


if __name__ == "__main__":
    main()
