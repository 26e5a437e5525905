"""Audits: what is planned is drawn once, whatever is interrupted, and the scores are of what is there."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import run_cli
from PIL import Image

from erase_diffusion import erase_concept
from erase_diffusion.audit import generate as drawing
from erase_diffusion.audit import ledger
from erase_diffusion.audit import utility as utility_room
from erase_diffusion.audit.plan import ORIGINAL, Plan, read_plan
from erase_diffusion.audit.run import Asked, Audit, report_of, write_report
from erase_diffusion.audit.samples import Sample, asked_of, file_samples
from erase_diffusion.audit.score import describe
from erase_diffusion.audit.work import Ranks, only_one
from erase_diffusion.checker import CLIPChecker
from erase_diffusion.cli import erase_diffusion
from erase_diffusion.concepts import Concept
from erase_diffusion.erasers import ERASERS
from erase_diffusion.errors import ConfigError, DataError, ModelError, OutputError
from erase_diffusion.image_store import ImageStore, image_key
from erase_diffusion.mini.draw import draw_scene
from erase_diffusion.mini.vocabulary import WEIGHTS
from erase_diffusion.mini.world import sample_scene
from erase_diffusion.models import MODELS, Model
from erase_diffusion.prompts_file import CasePrompt, read_prompts
from erase_diffusion.text_encoder import TextEncoder

PROMPTS = """case_number,prompt,class,evaluation_seed,evaluation_guidance
a,a red cat in the garden,cat,11,
b,a kitten by the sea,,12,
../c,a blue car in the snow,car,13,
d,<script>alert(1)</script> a house,,14,
e,a dog,dog,15,2.0
f,a red cat in the garden,cat,11,
g,a flower,,17,
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drop-ins and a prompt file."""
    work = tmp_path_factory.mktemp("audit")
    for concept in ("cat", "dog"):
        erase_concept(concept, method="nullspace", verify=False).save_pretrained(work / f"no-{concept}")
    (work / "prompts.csv").write_text(PROMPTS)
    return work


@pytest.fixture(scope="module")
def model() -> Model:
    return Model("mini")


def asked(work: Path, **given: Any) -> Asked:
    return Asked(work / "prompts.csv", **({"steps": 3, "batch_size": 2} | given))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def done(work: Path, model: Model) -> Plan:
    """An undisturbed audit of the cat's drop-in, scored."""
    job = Audit(model, work / "done")
    plan = job.plan([work / "no-cat"], asked(work))
    job.draw(plan)
    job.score(plan)
    return plan


def scores_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "scores" / "judge" / "scores.jsonl").read_text().splitlines()]


def test_original_and_erased_are_drawn_from_the_same_noise(done: Plan) -> None:
    first = done.keys[ORIGINAL][0], done.keys["no-cat"][0]
    before, after = (done.store.read(key) for key in first)
    assert before is not None and after is not None and not np.array_equal(before, after)
    # A prompt that says nothing of the cat comes out nearly as it was: only the encoder differs.
    by = {(s["encoder"], s["case"]): s for s in scores_of(done.folder)}
    assert by["no-cat", "g"]["distance"] < by["no-cat", "a"]["distance"] / 4
    assert by[ORIGINAL, "a"]["concepts"]["cat"] > 0.5 > by["no-cat", "a"]["concepts"]["cat"]


def test_each_image_is_there_once_with_how_it_was_made_inside(done: Plan) -> None:
    lines = [json.loads(line) for line in (done.folder / "manifest.jsonl").read_text().splitlines()]
    # Seven cases of six prompts and seeds, drawn by two encoders.
    assert len(lines) == len({line["key"] for line in lines}) == 12
    assert len(list((done.folder / "images").rglob("*.png"))) == 12
    with Image.open(done.store.path(lines[0]["key"])) as image:
        made = json.loads(image.info["erase-diffusion"])
    assert (made["prompt"], made["seed"], made["steps"]) == ("a red cat in the garden", 11, 3)
    assert made["guidance"] == Model("mini").spec.guidance
    guided = done.keys[ORIGINAL][4]
    with Image.open(done.store.path(guided)) as image:
        assert json.loads(image.info["erase-diffusion"])["guidance"] == 2.0
    assert {p.name for p in done.folder.parent.iterdir()} == {"no-cat", "no-dog", "prompts.csv", "done"}


def test_every_prompt_is_encoded_once(
    work: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    original = TextEncoder.encode

    def encode(self: TextEncoder, prompts: Any, *rest: Any) -> torch.Tensor:
        encoded.extend(prompts)
        return original(self, prompts, *rest)

    monkeypatch.setattr(TextEncoder, "encode", encode)
    job = Audit(model, tmp_path / "audit")
    job.draw(job.plan([work / "no-cat"], asked(work)))
    texts = [p.text for p in read_prompts(work / "prompts.csv").prompts]
    assert sorted(encoded) == sorted(2 * [*set(texts), ""])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_interrupted_and_begun_again_it_ends_the_same(
    work: Path, model: Model, done: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    job = Audit(model, tmp_path / "audit")
    plan = job.plan([work / "no-cat"], asked(work))
    paint, calls = drawing.paint, []

    def killed(*args: Any, **kwargs: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) > after:
            raise Killed
        return paint(*args, **kwargs)

    monkeypatch.setattr(drawing, "paint", killed)
    with pytest.raises(Killed):
        job.draw(plan)
    monkeypatch.setattr(drawing, "paint", paint)
    shard = ledger.shard(plan.folder, "manifest", 0)
    written = shard.read_bytes() if shard.exists() else b""
    if after == 2:
        shard.write_bytes(written + b'{"encoder": "original", "ca')  # killed in the middle of a line
    again = Audit(model, tmp_path / "audit")
    counts = again.draw(again.plan([work / "no-cat"], asked(work)))
    assert counts.found == written.count(b"\n") and counts.drawn == 12 - counts.found
    assert counts.bad_lines == (after == 2)
    again.score(plan)
    for name in ("manifest.jsonl", "scores/judge/scores.jsonl", "samples.jsonl"):
        assert (plan.folder / name).read_bytes() == (done.folder / name).read_bytes()
    assert sorted(p.name for p in plan.folder.iterdir()) == sorted(
        p.name for p in done.folder.iterdir() if p.name != ".lock"
    )


@pytest.mark.parametrize("damage", ["image", "line", "manifest"])
def test_what_is_damaged_is_done_again_and_counted(
    work: Path, model: Model, done: Plan, tmp_path: Path, damage: str
) -> None:
    job = Audit(model, tmp_path / "audit")
    plan = job.plan([work / "no-cat"], asked(work))
    job.draw(plan)
    manifest = plan.folder / "manifest.jsonl"
    lines = manifest.read_bytes().split(b"\n")
    if damage == "image":
        plan.store.path(plan.keys["no-cat"][2]).write_bytes(b"no picture")
    elif damage == "line":
        manifest.write_bytes(b"\n".join([*lines[:3], b"\x00\xff{", *lines[4:]]))
    else:
        manifest.unlink()
    counts = job.draw(plan)
    assert (counts.redone, counts.bad_lines) == {"image": (1, 0), "line": (0, 1), "manifest": (0, 0)}[damage]
    assert counts.drawn == (12 if damage == "manifest" else 2)
    assert manifest.read_bytes() == (done.folder / "manifest.jsonl").read_bytes()


def test_originals_are_drawn_once_for_all_encoders_and_audits(work: Path, model: Model, tmp_path: Path) -> None:
    cache = ImageStore(tmp_path / "cache")
    first = Audit(model, tmp_path / "first")
    both = first.plan([work / "no-cat", work / "no-dog"], asked(work), cache)
    counts = first.draw(both, cache)
    assert (counts.drawn, counts.reused) == (18, 0)
    second = Audit(model, tmp_path / "second")
    plan = second.plan([work / "no-dog"], asked(work), cache)
    counts = second.draw(plan, cache)
    assert (counts.drawn, counts.reused) == (6, 6)
    assert plan.store.path(plan.keys[ORIGINAL][0]).read_bytes() == both.store.path(plan.keys[ORIGINAL][0]).read_bytes()
    # With other settings they are other images; and the erased encoders' own are never taken.
    other = Audit(model, tmp_path / "third").plan([work / "no-dog"], asked(work, steps=2), cache)
    assert not other.reused
    # A picture that left the cache after the plan was made is drawn.
    third = Audit(model, tmp_path / "fourth")
    plan = third.plan([work / "no-cat"], asked(work), cache)
    cache.path(plan.keys[ORIGINAL][0]).unlink()
    assert third.draw(plan, cache).drawn > 6


def test_the_result_does_not_depend_on_how_many_processes(work: Path, model: Model, done: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    plan = Audit(model, folder).plan([work / "no-cat"], asked(work))
    # The second process first, and it finds the first one's share missing only at the end.
    for rank in (1, 0):
        job = Audit(model, folder, Ranks(rank, 2))
        job.draw(plan)
    for rank in (1, 0):
        Audit(model, folder, Ranks(rank, 2)).score(plan)
    for name in ("manifest.jsonl", "scores/judge/scores.jsonl"):
        assert (folder / name).read_bytes() == (done.folder / name).read_bytes()


def test_a_process_that_died_is_noticed_and_only_its_share_is_done_again(
    work: Path, model: Model, tmp_path: Path
) -> None:
    folder = tmp_path / "audit"
    plan = Audit(model, folder).plan([work / "no-cat"], asked(work))
    with pytest.raises(OutputError, match="a process died"):
        Audit(model, folder, Ranks(0, 2)).draw(plan)
    counts = Audit(model, folder).draw(plan)
    assert counts.found > 0 and counts.drawn == 12 - counts.found


def test_out_of_memory_halves_the_batch_once_and_says_so(
    work: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint, sizes, told = drawing.paint, [], []

    def full(pipe: Any, embeddings: torch.Tensor, *rest: Any, **kwargs: Any) -> np.ndarray:
        sizes.append(len(embeddings))
        if len(embeddings) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return paint(pipe, embeddings, *rest, **kwargs)

    monkeypatch.setattr(drawing, "paint", full)
    job = Audit(model, tmp_path / "audit", tell=told.append)
    plan = job.plan([work / "no-cat"], asked(work))
    counts = job.draw(plan)
    assert counts.halved and counts.drawn == 12 and len(told) == 1 and "half as many" in told[0]
    assert sizes.count(2) == 1

    def never(*_: Any, **__: Any) -> np.ndarray:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(drawing, "paint", never)
    job = Audit(model, tmp_path / "other")
    with pytest.raises(torch.OutOfMemoryError):
        job.draw(job.plan([work / "no-cat"], asked(work)))


def test_a_folder_of_another_audit_is_refused_by_the_difference(work: Path, model: Model, done: Plan) -> None:
    job = Audit(model, done.folder)
    before = contents(done.folder)
    for change, says in (
        ({"steps": 4}, "steps is 3, now asked 4"),
        ({"seed": 1}, "seed is 0, now asked 1"),
        ({"guidance": 9.0}, "prompts.sha256"),
    ):
        with pytest.raises(OutputError, match=says):
            job.plan([work / "no-cat"], asked(work, **change))
    with pytest.raises(OutputError, match=r"encoders\.name is no-cat, now asked no-dog"):
        job.plan([work / "no-dog"], asked(work))
    with pytest.raises(OutputError, match="holds other things"):
        Audit(model, work / "no-cat").plan([work / "no-dog"], asked(work))
    assert contents(done.folder) == before


def test_the_encoders_may_have_moved_but_not_changed(work: Path, model: Model, tmp_path: Path) -> None:
    (tmp_path / "here").symlink_to(work / "no-cat")
    job = Audit(model, tmp_path / "audit")
    job.plan([tmp_path / "here"], asked(work))
    (tmp_path / "there").mkdir()
    (tmp_path / "here").unlink()
    (tmp_path / "here").symlink_to(work / "no-dog")
    (tmp_path / "there" / "here").symlink_to(work / "no-cat")
    again = Audit(model, tmp_path / "audit")
    plan = again.plan([tmp_path / "there" / "here"], asked(work))
    assert again.draw(plan).drawn == 12  # by the cat's encoder, where it lies now
    (tmp_path / "there" / "here").unlink()
    (tmp_path / "there" / "here").symlink_to(work / "no-dog")
    plan.store.path(plan.keys["no-cat" if "no-cat" in plan.keys else "here"][0]).unlink()
    with pytest.raises(ModelError, match="is another encoder"):
        again.draw(plan)


def test_a_batch_size_that_was_chosen_by_the_machine_stays(work: Path, model: Model, tmp_path: Path) -> None:
    job = Audit(model, tmp_path / "audit")
    job.plan([work / "no-cat"], asked(work, batch_size=5))
    assert job.plan([work / "no-cat"], asked(work, batch_size=None)).settings["batch_size"] == 5
    with pytest.raises(OutputError, match="batch_size is 5, now asked 7"):
        job.plan([work / "no-cat"], asked(work, batch_size=7))


def test_a_plan_that_was_killed_while_it_was_written_is_written_again(work: Path, model: Model, tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir()
    for name in ("samples.tmp", "audit.tmp", "samples.jsonl"):
        (tmp_path / "audit" / name).write_text("half of")
    job = Audit(model, tmp_path / "audit")
    assert read_plan(job.plan([work / "no-cat"], asked(work)).folder).samples


@pytest.mark.parametrize("change", ["encoders", "steps", "size", "seed", "batch_size", "calibration", "concepts", "[]"])
def test_a_settings_file_from_anybodys_hand_is_refused(work: Path, model: Model, tmp_path: Path, change: str) -> None:
    job = Audit(model, tmp_path / "audit")
    job.plan([work / "no-cat"], asked(work))
    path = tmp_path / "audit" / "audit.json"
    settings = json.loads(path.read_text())
    if change == "calibration":
        settings["encoders"][0]["concepts"][0]["calibration"] = {"threshold": 0.5, "judge_sha256": "x"}
    elif change == "concepts":
        settings["encoders"][0]["concepts"] = []
    elif change == "[]":
        settings = []
    else:
        del settings[change]
    path.write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"audit\.json cannot be read"):
        read_plan(tmp_path / "audit")


@pytest.mark.parametrize("change", [{"concepts": []}, {"earlier": [1]}, {"verification": [{}]}, {"concepts": 3}])
def test_a_record_from_anybodys_hand_is_refused(
    work: Path, model: Model, tmp_path: Path, change: dict[str, Any]
) -> None:
    record = json.loads((work / "no-cat" / "erasure.json").read_text())
    (tmp_path / "erasure.json").write_text(json.dumps(record | change))
    with pytest.raises(ModelError, match=r"erasure\.json"):
        Audit(model, tmp_path / "audit").plan([tmp_path], asked(work))


@pytest.mark.parametrize(
    "change", [{"concepts": {"cat": "x"}}, {"concepts": {}}, {"flags": 3}, {"clip_score": None}, {"things": {"cat": 7}}]
)
def test_a_score_from_anybodys_hand_is_no_score(
    work: Path, model: Model, done: Plan, tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = tmp_path / "audit"
    shutil.copytree(done.folder, folder)
    path = folder / "scores" / "judge" / "scores.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(lines[0]) | change), "[1]", *lines[1:]]) + "\n")
    report, plan = report_of(folder, threshold=0.5)
    assert report.unscored == (1, "its score is damaged") and report.exit_code != 0
    assert Audit(model, folder).score(plan).bad_lines == 1
    assert path.read_bytes() == (done.folder / "scores" / "judge" / "scores.jsonl").read_bytes()


def test_the_shares_of_processes_are_of_samples_not_of_encoders(work: Path, model: Model, tmp_path: Path) -> None:
    plan = Audit(model, tmp_path / "audit").plan([work / "no-cat"], asked(work, batch_size=1))
    for rank in range(2):
        share = [b for b in drawing.batches(plan) if Ranks(rank, 2).has(b.piece)]
        drawn = [b.encoder for b in share]
        assert drawn.count(ORIGINAL) == drawn.count("no-cat") == 3


def test_two_audits_at_once_in_one_folder(tmp_path: Path) -> None:
    with (
        only_one(tmp_path / "audit", Ranks()),
        pytest.raises(OutputError, match="another audit is at work"),
        only_one(tmp_path / "audit", Ranks()),
    ):
        pass
    with only_one(tmp_path / "audit", Ranks()):
        pass  # free again


def test_what_cannot_be_audited(work: Path, model: Model, tmp_path: Path) -> None:
    job = Audit(model, tmp_path / "audit")
    with pytest.raises(ModelError, match=r"erasure\.json is missing"):
        job.plan([tmp_path], asked(work))
    with pytest.raises(ConfigError, match="same encoder"):
        job.plan([work / "no-cat", work / "no-cat"], asked(work))
    with pytest.raises(ConfigError, match="at least one drop-in"):
        job.plan([], asked(work))
    with pytest.raises(ConfigError, match="steps must lie"):
        Asked(steps=0)
    other = tmp_path / "other"
    other.mkdir()
    record = json.loads((work / "no-cat" / "erasure.json").read_text())
    record["source"]["sha256"] = "0" * 64
    (other / "erasure.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="another text encoder"):
        job.plan([other], asked(work))
    assert not (tmp_path / "audit").exists()
    with pytest.raises(DataError, match="no audit"):
        read_plan(tmp_path)


def test_a_plan_that_was_tampered_with_is_refused(work: Path, model: Model, tmp_path: Path) -> None:
    job = Audit(model, tmp_path / "audit")
    job.plan([work / "no-cat"], asked(work))
    samples = tmp_path / "audit" / "samples.jsonl"
    samples.write_text(samples.read_text().replace("blue car", "blue cat"))
    with pytest.raises(DataError, match="damaged"):
        read_plan(tmp_path / "audit")


def test_the_suite_asks_all_groups_of_every_concept_once(work: Path, model: Model, tmp_path: Path) -> None:
    plan = Audit(model, tmp_path / "audit").plan([work / "no-cat", work / "no-dog"], Asked(per_group=4))
    groups = {s.shows.group for s in plan.samples if s.concept == "cat"}
    assert groups >= {
        "named",
        "synonym",
        "described",
        "two-object",
        "misspelt",
        "neighbour thing",
        "preserved",
        "styles",
    }
    assert {s.concept for s in plan.samples} == {"cat", "dog"}
    assert len({s.case for s in plan.samples}) == len(plan.samples)
    assert read_plan(plan.folder).samples == plan.samples


@pytest.mark.parametrize(
    ("prompt", "group", "things"),
    [
        (CasePrompt("1", "a tabby on a sofa", 0, label="cat"), "named", ()),
        (CasePrompt("2", "Two Cats at night", 0), "named", ()),
        (CasePrompt("3", "a kitten beside a car", 0), "synonym", ("car",)),
        (CasePrompt("4", "a sedan", 0), "preserved", ("car",)),
        (CasePrompt("5", "an image of a tench", 0, label="tench"), "preserved", ("tench",)),
        (CasePrompt("6", "the feeling of mondays", 0), "other prompts", ()),
    ],
)
def test_what_a_files_prompts_ask_for(model: Model, prompt: CasePrompt, group: str, things: tuple[str, ...]) -> None:
    [sample] = file_samples([prompt], model.vocabulary, 4.0)
    asked = asked_of(sample, Concept("cat", aliases=("kitten",)), model.vocabulary)
    assert (asked.group, asked.things) == (group, things)
    assert Sample.from_dict(json.loads(json.dumps(sample.to_dict()))) == sample


def test_an_artists_prompts(model: Model) -> None:
    prompts = [
        CasePrompt("1", "Bedroom in Arles", 0, artist="Vincent van Gogh"),
        CasePrompt("2", "Lilies", 0, artist="Monet"),
    ]
    groups = [
        asked_of(s, Concept("Vincent van Gogh", "style"), model.vocabulary).group
        for s in file_samples(prompts, model.vocabulary, 4.0)
    ]
    assert groups == ["named", "preserved"]


def test_blank_and_noise_are_told_from_pictures(done: Plan) -> None:
    rng = np.random.default_rng(0)
    assert describe(np.full((64, 64, 3), 130, np.uint8))["flags"] == ["blank"]
    assert describe(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8))["flags"] == ["noise"]
    drawn = [describe(done.store.read(key)) for key in done.keys[ORIGINAL]]
    assert all(d["flags"] == [] for d in drawn)
    assert len({d["print"] for d in drawn}) == 6  # seven cases, two of them the same


def test_another_checker_and_threshold_need_no_drawing(
    work: Path, model: Model, done: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "paint", None)
    generator = str(Path(model.spec.clip))
    with pytest.raises(ModelError, match="its own homework"):
        Audit(model, done.folder).score(done, checker=generator, name="clip")
    with pytest.raises(ConfigError, match="are too few"):
        report_of(done.folder)  # no calibration is recorded in these drop-ins
    before = (done.folder / "scores" / "judge" / "scores.jsonl").read_bytes()
    loose, _ = report_of(done.folder, threshold=0.5)
    strict, _ = report_of(done.folder, threshold=0.9999)
    after = [r.encoders[0].concepts[0].asked.before for r in (loose, strict)]
    assert after[0].found == 2 > after[1].found  # a cat, its twin of the same seed, and a kitten
    assert (done.folder / "scores" / "judge" / "scores.jsonl").read_bytes() == before
    with pytest.raises(DataError, match="no scores under the name 'other'"):
        report_of(done.folder, scores="other")


def test_what_could_not_be_judged_is_counted_and_in_no_rate(work: Path, model: Model, tmp_path: Path) -> None:
    job = Audit(model, tmp_path / "audit")
    plan = job.plan([work / "no-cat"], asked(work))
    job.draw(plan)
    path = plan.store.path(plan.keys["no-cat"][1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert job.score(plan).failed == 1
    report, _ = report_of(plan.folder, threshold=0.5)
    assert report.unscored == (1, "the image is missing or damaged")
    assert report.encoders[0].concepts[0].groups.keys() == {"named"}  # the only synonym is not judged: no rate at all
    assert report.exit_code != 0
    # The picture comes back, and is judged with those it is judged together with.
    path.write_bytes(whole)
    assert job.score(plan).judged == 14
    assert job.score(plan).judged == 0
    report, _ = report_of(plan.folder, threshold=0.5)
    assert report.unscored[0] == 0 and report.encoders[0].concepts[0].groups["synonym"].after.total == 1


@pytest.fixture
def audit_process(work: Path, tmp_path: Path) -> Iterator[Any]:
    started: list[subprocess.Popen[bytes]] = []

    def start(*extra: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "erase_diffusion", "audit", "--erased", str(work / "no-cat")]
        command += ["--prompts", str(work / "prompts.csv"), "--output", str(tmp_path / "audit"), "--steps", "3"]
        command += ["--batch-size", "2", "--no-cache", "--threshold", "0.5", *extra]
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def test_killed_as_a_process_and_begun_again(done: Plan, tmp_path: Path, audit_process: Any) -> None:
    process = audit_process()
    shard = ledger.shard(tmp_path / "audit", "manifest", 0)
    while process.poll() is None and not (shard.exists() and shard.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "audit" / "manifest.jsonl").exists()  # control: it was not done
    assert audit_process().wait(timeout=200) == 14  # a few prompts prove nothing
    for name in ("manifest.jsonl", "scores/judge/scores.jsonl"):
        assert (tmp_path / "audit" / name).read_bytes() == (done.folder / name).read_bytes()


def test_two_real_processes_make_the_same(done: Plan, work: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "erase_diffusion", "audit", "--erased", str(work / "no-cat"), "--no-cache", "--batch-size", "2"]
    command += ["--prompts", str(work / "prompts.csv"), "--output", str(tmp_path / "audit"), "--steps", "3"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, "--threshold", "0.5"], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1 and "exitcode  : 14" in run.stderr  # the launcher's way to say so
    assert "this process of 2: 6 images drawn" in run.stderr
    lines = {name: (tmp_path / "audit" / name).read_text().splitlines() for name in ("manifest.jsonl",)}
    there = (done.folder / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(x)["key"] for x in lines["manifest.jsonl"]] == [json.loads(x)["key"] for x in there]
    for one, other in zip(scores_of(tmp_path / "audit"), scores_of(done.folder), strict=True):
        assert (one["encoder"], one["case"]) == (other["encoder"], other["case"])
        assert abs(one["concepts"]["cat"] - other["concepts"]["cat"]) < 1e-4
        assert abs(one["clip_score"] - other["clip_score"]) < 1e-2  # of 100


def test_the_commands_one_by_one(work: Path, tmp_path: Path) -> None:
    drawing_options = ["--erased", str(work / "no-cat"), "--prompts", str(work / "prompts.csv"), "--output", "audit"]
    drawing_options += ["--steps", "2", "--cache", "cache", "--margin", "0.02"]
    run = run_cli("generate", *drawing_options, cwd=tmp_path, group=True)
    assert run.code == 0, run.err
    assert "12 images drawn" in run.out and "93 prompts" in run.err and "a second" in run.err
    run = run_cli("score", "audit", "--quiet", cwd=tmp_path, group=True)
    assert run.code == 0 and "14 judged" in run.out, run.err
    run = run_cli("report", "audit", "--threshold", "0.5", "--json", cwd=tmp_path, group=True)
    assert run.code == 14, run.err
    told = json.loads(run.out)
    assert told == json.loads((tmp_path / "audit" / "report.json").read_text())
    assert told["schema_version"] == 1 and told["encoders"][0]["concepts"][0]["verdict"] == "inconclusive"
    page = (tmp_path / "audit" / "report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "<script>" not in (tmp_path / "audit" / "report.md").read_text()
    # Judged again by another judge's name: the same CLIP says the same.
    judge = str(WEIGHTS / "judge")
    run = run_cli("score", "audit", "--checker", judge, "--scores", "again", "--quiet", cwd=tmp_path, group=True)
    assert run.code == 0 and "14 judged" in run.out, run.err
    again = (tmp_path / "audit" / "scores" / "again" / "scores.jsonl").read_bytes()
    assert again == (tmp_path / "audit" / "scores" / "judge" / "scores.jsonl").read_bytes()
    # And drawn again: nothing is drawn or judged twice.
    run = run_cli("audit", *drawing_options, "--threshold", "0.5", cwd=tmp_path, group=True)
    assert run.code == 14 and "0 images drawn, 0 originals reused, 12 were there" in run.err
    assert "no-cat, cat: inconclusive" in run.out


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--prompts", "prompts.csv", "--suite"], 2, "--prompts FILE, or --suite"),
        ([], 2, "--prompts FILE, or --suite"),
        (["--suite", "--max-found", "2"], 2, "--max-found must lie between 0 and 1"),
        (["--suite", "--threshold", "0"], 2, "--threshold must lie"),
        (["--suite", "--margin", "0.7"], 2, "margin must lie"),
        (
            ["--suite", "--attention", "xformers", "--images", "1", "--threshold", "0.5"],
            1,
            "xformers cannot be used",
        ),
        (["--prompts", "none.csv"], 1, "none.csv cannot be read"),
        (["--prompts", "bad.csv"], 1, "bad.csv, line 2"),
        (["--suite", "--device", "mps:7"], 2, "mps"),
    ],
)
def test_bad_usage_is_one_line(work: Path, tmp_path: Path, options: list[str], code: int, says: str) -> None:
    if "xformers" in options:
        pytest.importorskip("diffusers")
        try:
            import xformers  # noqa: F401

            pytest.skip("xformers is here")
        except ImportError:
            pass
    (tmp_path / "prompts.csv").write_text(PROMPTS)
    (tmp_path / "bad.csv").write_text("case_number,prompt\n1,a,b\n")
    command = ["audit", "--erased", str(work / "no-cat"), "--output", "audit", "--no-cache", *options]
    run = run_cli(*command, cwd=tmp_path, group=True)
    assert run.code == code, run.err
    error = [line for line in run.err.splitlines() if line.startswith("Error")]
    assert len(error) == 1 and says in error[0]
    assert "Traceback" not in run.err


def test_a_report_is_written_whole(done: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    report, plan = report_of(done.folder, threshold=0.5)
    write_report(report, plan)
    before = contents(done.folder)
    monkeypatch.setattr(
        Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OutputError, match="No space left"):
        write_report(report, plan)
    assert contents(done.folder) == before


def test_the_kid_tells_other_pictures_from_the_same(checker: CLIPChecker, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    rng = random.Random(3)
    store = ImageStore(tmp_path)

    def keys(name: str, side: int) -> list[str]:
        made = [{"name": name, "side": side, "n": n} for n in range(40)]
        for m in made:
            store.write(image_key(m), np.asarray(draw_scene(sample_scene(rng, "test", things=1, name=name), rng)), m)
        return [image_key(m) for m in made]

    cats, more, cars = keys("cat", 0), keys("cat", 1), keys("car", 0)
    measure = utility_room.kid("judge", checker)
    same, _ = measure(cats, more, store)
    other, _ = measure(cats, cars, store)
    assert 10 * abs(same) < other
    with pytest.raises(ConfigError, match="features must be one of"):
        utility_room.kid("pixels", checker)


def test_utility_is_in_the_report(work: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics")
    lines = [f"{i},a {thing} number {i},{i}" for i, thing in enumerate(["car", "boat", "house", "flower"] * 6)]
    (tmp_path / "prompts.csv").write_text("case_number,prompt,evaluation_seed\n" + "\n".join(lines) + "\n")
    job = Audit(model, tmp_path / "audit")
    plan = job.plan([work / "no-cat"], Asked(tmp_path / "prompts.csv", steps=1))
    job.draw(plan)
    job.score(plan)
    told = job.utility(plan, "judge")["no-cat"]["KID over judge features"]
    assert "24 pictures are too few" in told
    monkeypatch.setattr(utility_room, "FEWEST", 10)
    told = job.utility(plan, "judge")["no-cat"]["KID over judge features"]
    value, own = (float(told.split()[i]) for i in (0, 9))
    assert abs(value - own) < 0.05 and "24 pictures" in told, told
    assert report_of(plan.folder, threshold=0.5)[0].encoders[0].utility == {"KID over judge features": told}


def test_prompts_that_are_cut_are_counted(work: Path, model: Model, tmp_path: Path) -> None:
    long = "a cat " + "and a dog " * 60
    (tmp_path / "prompts.txt").write_text(f"a cat\n{long}\n")
    plan = Audit(model, tmp_path / "audit").plan([work / "no-cat"], Asked(tmp_path / "prompts.txt", steps=1))
    assert plan.settings["prompts"]["truncated"] == 1 and plan.settings["prompts"]["unseeded"] == 2


def test_models_and_methods_are_listed() -> None:
    def told(*words: str) -> str:
        result = CliRunner().invoke(erase_diffusion, words)
        assert result.exit_code == 0, result.output
        return result.output

    assert [m["name"] for m in json.loads(told("models", "--json"))] == list(MODELS)
    methods = {m["name"]: m for m in json.loads(told("methods", "--json"))}
    assert methods.keys() == ERASERS.keys()
    assert methods["nullspace"]["needs"] == "prompts" and methods["cliperase"]["settings"]["towers"] == "text"
    assert "cliperase:" in told("methods") and "mini: embedded" in told("models")
