"""Every bad input gives one line with the value and the fix, the promised exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_cli
from safetensors.torch import load_file, save_file

from erase_diffusion.mini.vocabulary import WEIGHTS


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    return Path(shutil.copytree(WEIGHTS / "pipeline", tmp_path / "model"))


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concept", "cat", "--model", "sd-9"], "unknown model 'sd-9'"),
        (["--concept", "cat", "--method", "magic"], "unknown method 'magic'"),
        (["--concept", "cat", "--kind", "animal"], "got 'animal'"),
        (["--concept", "cat", "--strength", "1.5"], "got 1.5"),
        (["--concept", ""], "the concept is empty"),
        (["--concept", "x" * 100], "100 characters"),
        (["--concept", "cat", "--preserve", "kitten"], "'kitten' is both"),
        (["--concept", "cat", "--anchor", "kitty"], "'kitty'"),
        (["--concept", "cat", "--concept", "dog", "--alias", "pet"], "--alias belongs to one concept"),
        (["--concept", "cat", "--preserve", ""], "preserved word is empty"),
        (["--concept", "cat", "--device", "warp"], "device 'warp' cannot be used"),
        (["--concept", "cat", "--method", "nullspace", "--steps", "5"], "no setting 'steps'"),
        ([], "nothing to erase: name it with --concept"),
        (
            ["--concept", "dog", "--within", "cat", "--kind", "object"],
            "only an attribute or a style can be erased within",
        ),
        (["--concept", "cat", "--set", "towers"], "--set takes NAME=VALUE, got 'towers'"),
        (["--concept", "cat", "--method", "lipschitz", "--forget-images", "x"], "lipschitz uses no images"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    run = run_cli(*arguments, cwd=tmp_path)
    assert run.code == 2, run.err
    assert message in last_line(run.err)
    assert "Traceback" not in run.err
    assert run.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_concept_that_is_never_drawn_is_said_before_any_training(tmp_path: Path) -> None:
    run = run_cli("--concept", "submarine", "--images", "24", cwd=tmp_path)
    assert run.code == 1
    assert "does not draw 'submarine'" in last_line(run.err)
    assert "erasing" not in run.err
    assert list(tmp_path.iterdir()) == []


def damage(model: Path, how: str) -> None:
    weights = model / "text_encoder" / "model.safetensors"
    if how == "missing":
        weights.unlink()
    elif how == "pickle":
        weights.rename(weights.with_name("pytorch_model.bin"))
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:9000])
    else:
        state = load_file(weights)
        state["text_model.final_layer_norm.weight"][0] = float("nan")
        save_file(state, weights)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "no .safetensors weights"),
        ("pickle", "is a pickle"),
        ("truncated", "not a whole safetensors"),
        ("nan", "holds NaN"),
    ],
)
def test_a_damaged_model_names_the_file(broken: Path, tmp_path: Path, how: str, message: str) -> None:
    damage(broken, how)
    run = run_cli(
        "--concept",
        "cat",
        "--model",
        str(broken),
        "--method",
        "nullspace",
        "--no-verify",
        "--output",
        "out",
        cwd=tmp_path,
    )
    assert run.code == 1
    assert message in last_line(run.err)
    assert "text_encoder" in last_line(run.err)
    assert "Traceback" not in run.err
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    run = run_cli("--concept", "cat", "--output", "out", cwd=tmp_path)
    assert run.code == 1
    assert "out exists" in last_line(run.err)
    assert (tmp_path / "out" / "mine.txt").read_text() == "x"


def test_bad_image_folders(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a cat"}\n{oops\n')
    run = run_cli("--concept", "cat", "--forget-images", "mine", "--no-verify", "--output", "out", cwd=tmp_path)
    assert run.code == 1
    assert "metadata.jsonl, line 1" in last_line(run.err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--forget-images", "on the grass " * 12 + "there is a cat", "last position"),
        ("--retain-images", "two cats on a sofa", "names 'cat'"),
    ],
)
def test_captions_that_do_not_fit_the_concept(option: str, text: str, message: str, tmp_path: Path) -> None:
    from PIL import Image

    mine = tmp_path / "mine"
    mine.mkdir()
    Image.new("RGB", (64, 64), "red").save(mine / "a.png")
    (mine / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": text}))
    run = run_cli("--concept", "cat", option, "mine", "--no-verify", "--output", "out", cwd=tmp_path)
    assert run.code == 1
    assert message in last_line(run.err)
    assert not (tmp_path / "out").exists()


def test_own_images_are_used_and_bad_ones_counted(tmp_path: Path) -> None:
    import random

    from erase_diffusion.mini.draw import draw_scene
    from erase_diffusion.mini.world import Scene, Thing

    mine = tmp_path / "mine"
    mine.mkdir()
    lines = []
    for i in range(6):
        draw_scene(Scene((Thing("cat", "red"),), "grass", "plain"), random.Random(i)).save(mine / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "a red cat on the grass"}))
    (mine / "broken.png").write_bytes(b"no image")
    lines.append(json.dumps({"file_name": "broken.png", "text": "a cat"}))
    (mine / "metadata.jsonl").write_text("\n".join(lines))
    arguments = [
        "--concept",
        "cat",
        "--forget-images",
        "mine",
        "--skip-bad",
        "--no-verify",
        "--steps",
        "2",
        "--json",
        "--output",
        "out",
    ]
    run = run_cli(*arguments, cwd=tmp_path)
    assert run.code == 0, run.err
    record = json.loads(run.out)
    assert record["own_images"] == {"forget": 6, "retain": None, "skipped_files": 1}
    assert record["verification"] == []
    assert "not verified" in (tmp_path / "out" / "README.md").read_text()


def test_ctrl_c_during_training_is_clean(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from erase_diffusion.cli import erase_concept; erase_concept()"]
    command += ["--concept", "cat", "--no-verify", "--steps", "100000", "--output", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    seen = []
    for line in process.stderr:  # a fixed wait would test the wait: the training says that it has begun
        seen.append(line)
        if "erasing" in line:
            process.send_signal(signal.SIGINT)
            break
    seen += process.stderr.readlines()
    assert process.wait(timeout=60) == 130, seen
    assert "interrupted; nothing half-written was left" in seen[-1]
    assert "Traceback" not in "".join(seen)
    assert list(tmp_path.iterdir()) == []


def test_help_shows_an_example_and_never_waits_for_torch(tmp_path: Path) -> None:
    run = run_cli("--help", cwd=tmp_path)
    assert run.code == 0
    assert "erase-concept --concept cat --model mini" in run.out
    # No timing is asserted on a shared machine; what would make it slow is.
    probe = "import sys; import erase_diffusion.cli; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"]


def test_every_option_is_in_the_readme_or_the_help_says_what_it_does(tmp_path: Path) -> None:
    from erase_diffusion.cli import erase_concept

    for option in erase_concept.params:
        if option.name not in ("seed", "help", "version"):
            assert getattr(option, "help", None) or option.show_default, option.name
