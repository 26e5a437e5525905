"""What is kept, counted by hand; which exit code a verification has; and the shipped model's own figures."""

from __future__ import annotations

from conftest import missed_bars

from erase_diffusion.checker import Calibration
from erase_diffusion.concepts import Prompt
from erase_diffusion.metrics import Limits, Rate, Verdict
from erase_diffusion.verification import Verification, keep_table


def test_what_is_kept_is_counted_of_what_the_original_showed() -> None:
    prompts = [
        Prompt("a red cat on the grass", "named", ("cat",), "red", "grass"),
        Prompt("a blue kitten", "synonym", ("cat",), "blue", None),
        Prompt("a cat beside a car", "two-object", ("cat", "car")),
        Prompt("a cat beside a dog", "two-object", ("cat", "dog")),
        Prompt("a green dog", "preserved", ("dog",), "green", None),
        Prompt("a tree", "preserved", ("tree",)),
    ]
    before = {
        "others": [None, None, True, False, True, True],
        "attribute": [True, True, None, None, True, None],
        "place": [True, None, None, None, None, None],
        "style": [None] * 6,
    }
    after = {
        "others": [None, None, True, True, True, False],
        "attribute": [True, False, None, None, True, None],
        "place": [False, None, None, None, None, None],
        "style": [None] * 6,
    }
    assert {name: (r.found, r.total) for name, r in keep_table(prompts, before, after).items()} == {
        "preserved concepts": (1, 2),
        "other object of a pair": (1, 1),  # the dog was not there before
        "attribute of an erased prompt": (1, 2),
        "attribute of a preserved prompt": (1, 1),
        "place of an erased prompt": (0, 1),
    }


def verification(verdict: Verdict, damaged: tuple[str, ...]) -> Verification:
    return Verification(
        verdict=verdict,
        rule="",
        damaged=damaged,
        groups={},
        kept={},
        calibration=Calibration(0.5, Rate(0, 10), Rate(0, 10)),
        clip_score=(60.0, 59.0),
        changed=Rate(1, 1),
        limits=Limits(),
        images={},
    )


def test_removed_at_the_cost_of_the_rest_has_an_exit_code_of_its_own() -> None:
    assert verification("removed", ()).exit_code == 0
    assert verification("removed", ("preserved concepts",)).exit_code == 15
    assert verification("inconclusive", ("preserved concepts",)).exit_code == 14
    assert verification("removed", ("preserved concepts",)).to_dict()["not_proven_kept"] == ["preserved concepts"]


def test_the_shipped_mini_meets_every_bar() -> None:
    assert missed_bars() == []
