"""The benchmark of the erasers: it measures, it resumes, and its tables say what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Run
from PIL import Image

from erase_diffusion.metrics import Rate

SCRIPT = ROOT / "scripts" / "benchmark_erasers.py"


def benchmark(*args: str, cwd: Path, script: Path = SCRIPT) -> Run:
    done = subprocess.run([sys.executable, str(script), *args], cwd=cwd, capture_output=True, text=True, timeout=400)
    return Run(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    work = tmp_path_factory.mktemp("benchmark")
    small = ["--concept", "cat", "--count", "2", "--images", "8", "--output", "figures.json", "--report", "table.md"]
    return work, benchmark("--method", "token-swap", "--method", "nullspace, at the projection", *small, cwd=work)


def test_it_measures_what_is_gone_what_is_kept_and_what_it_costs(measured: tuple[Path, Run]) -> None:
    work, run = measured
    assert run.code == 0, run.err[-2000:]
    figures = json.loads((work / "figures.json").read_text())
    swap, original = (figures["one"]["cat"][row]["concepts"]["cat"] for row in ("token-swap", "original"))
    assert original["found"]["named"]["rate"] > 0.8  # it was there
    assert swap["found"]["named"]["rate"] < 0.2
    assert {"named", "synonym", "described", "two-object", "misspelt"} <= set(swap["found"])
    assert {"preserved concepts", "nearest concepts", "other object of a pair"} <= set(swap["kept"])
    projection = figures["one"]["cat"]["nullspace, at the projection"]["concepts"]["cat"]
    assert "found" not in projection  # no picture can change
    assert projection["clip"]["zero-shot forget"]["rate"] < original["clip"]["zero-shot forget"]["rate"]
    assert original["clip"]["retrieval"]["retain, text to image"]["R@10"]["rate"] > 0.9
    assert figures["one"]["cat"]["token-swap"]["seconds"] > 0
    assert set(figures["together"]["2"]["token-swap"]["concepts"]) == {"cat", "car"}
    table = (work / "table.md").read_text()
    assert "token-swap" in table and "[" in table and " of 8" in table
    with Image.open(work / "table.png") as picture:
        assert picture.width > 500


def test_what_is_measured_already_is_not_measured_again(measured: tuple[Path, Run]) -> None:
    work, _ = measured
    before = (work / "figures.json").read_bytes()
    small = ["--concept", "cat", "--count", "2", "--images", "8", "--output", "figures.json"]
    run = benchmark("--method", "token-swap", *small, cwd=work)
    assert run.code == 0
    assert "token-swap" in run.out
    assert "one cat" not in run.err  # what is measured is told
    assert (work / "figures.json").read_bytes() == before
    other = benchmark("--images", "9", "--output", "figures.json", cwd=work)
    assert other.code == 2 and "choose another --output" in other.err


def test_the_table_gives_every_rate_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from eraser_benchmark.table import GONE, median, pooled, report

    def cell(found: int) -> dict[str, Any]:
        return {
            "found": {"named": Rate(found, 10).to_dict()},
            "kept": {"preserved concepts": Rate(9, 10).to_dict()},
            "verdict": "removed",
        }

    row = [{"concepts": {str(i): cell(i)}, "seconds": 2.0, "peak_mib": None} for i in (0, 1, 5)]
    figures = {
        "asked": {"model": "mini", "images": 10, "seed": 0},
        "one": {str(i): {"token-swap": r} for i, r in enumerate(row)},
        "within": {},
        "together": {},
    }
    cells = [cell(i) for i in (0, 1, 5)]
    assert median(cells, GONE["named"]) == "10.0%"
    r = Rate(6, 30)
    assert pooled(cells, GONE["named"]) == f"20.0% [{r.low:.1%}, {r.high:.1%}] of 30"
    assert pooled(cells, GONE["ambiguous"]) == "–"
    assert f"20.0% [{r.low:.1%}, {r.high:.1%}] of 30" in report(figures)


def test_the_growth_of_the_closed_form_is_measured() -> None:
    script = ROOT / "scripts" / "benchmark_closed_form.py"
    run = benchmark("--count", "1", "--layers", "1", cwd=ROOT, script=script)
    assert run.code == 0, run.err[-2000:]
    seconds = float(run.out.strip().splitlines()[2].split("|")[4])
    assert seconds > 0
