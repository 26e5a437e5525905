"""The closed form: properties that hold exactly, on random keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from erase_diffusion.erasers.base import align
from erase_diffusion.erasers.nullspace import NullspaceConfig, project_to_mean
from erase_diffusion.erasers.values import occupied, solve_values
from erase_diffusion.errors import ConfigError

generator = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_without_anything_to_hold_the_change_is_exact() -> None:
    keys, change = random(10, 40), random(10, 6)
    update = solve_values(keys, change, torch.zeros(40, 40, dtype=torch.float64), retain=0, ridge=1e-9)
    assert torch.allclose(keys @ update.T, change, atol=1e-5)


def test_the_solution_is_the_minimum() -> None:
    keys, change, kept = random(30, 12), random(30, 5), random(50, 12)
    gram = kept.T @ kept / 50
    ridge = 0.1

    def objective(w: torch.Tensor) -> torch.Tensor:
        mu = ridge * (keys.T @ keys / 30).diagonal().mean()
        return (keys @ w.T - change).square().sum() / 30 + 2.0 * torch.trace(w @ gram @ w.T) + mu * w.square().sum()

    best = solve_values(keys, change, gram, retain=2.0, ridge=ridge)
    value = objective(best)
    for _ in range(20):
        assert objective(best + 0.01 * random(5, 12)) > value


def test_more_retention_moves_the_kept_keys_less() -> None:
    keys, change, kept = random(30, 12), random(30, 5), random(50, 12)
    gram = kept.T @ kept / 50
    moved = [
        float((kept @ solve_values(keys, change, gram, retain=r, ridge=1e-3).T).norm()) for r in (0.0, 1.0, 10.0, 100.0)
    ]
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.1 * moved[0]


def test_the_occupied_directions_are_those_of_the_kept_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = random(20, 4) @ random(4, 16)
    gram = kept.T @ kept / 20
    basis = occupied(gram, 1e-9)
    assert basis.shape == (16, 4)
    assert torch.allclose(basis.T @ basis, torch.eye(4, dtype=basis.dtype), atol=1e-8)
    assert (kept - kept @ basis @ basis.T).norm() < 1e-5 * kept.norm()
    # Control: what is free is not nothing.
    other = random(5, 16)
    assert (other - other @ basis @ basis.T).norm() > 1
    # A wide matrix's are found by iteration, and are the same.
    wide = random(400, 6) @ random(6, 300)
    gram = wide.T @ wide / 400
    exact = occupied(gram, 0.05)
    monkeypatch.setattr("erase_diffusion.erasers.values.LARGE", 100)
    quick = occupied(gram, 0.05)
    assert torch.allclose(exact @ exact.T, quick @ quick.T, atol=1e-8)


@pytest.mark.parametrize("given", [{"strength": 2.0}, {"ridge": 0.0}, {"retain": -1.0}, {"null": 0.0}, {"site": "x"}])
def test_bad_settings_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="got"):
        NullspaceConfig(**given)


def test_alignment_of_sentences_of_different_length() -> None:
    end = 9
    # <s> a purple CAT in snow </s> pads  ↔  <s> a purple THING THERE in snow </s> pads
    prompt = torch.tensor([0, 1, 2, 3, 4, 5, end, end, end, end])
    anchor = torch.tensor([0, 1, 2, 7, 8, 4, 5, end, end, end])
    assert align(prompt, anchor, end).tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 9]
    # A description of three words becomes one.
    prompt = torch.tensor([0, 1, 3, 3, 3, 4, end, end])
    anchor = torch.tensor([0, 1, 7, 4, end, end, end, end])
    assert align(prompt, anchor, end).tolist() == [0, 1, 2, 2, 2, 3, 4, 5]


def test_alignment_of_equal_sentences_is_the_identity() -> None:
    ids = torch.tensor([0, 1, 2, 9, 9])
    assert align(ids, ids, 9).tolist() == [0, 1, 2, 3, 4]


def test_at_the_projection_the_forgotten_goes_to_the_mean_and_the_rest_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(16, generator=generator)
    classes = shared + torch.randn(4, 16, generator=generator)
    prompts = torch.nn.functional.normalize(
        classes.repeat_interleave(30, 0) + 0.05 * torch.randn(120, 16, generator=generator), dim=-1
    ).double()
    forget, retain = prompts[:30], prompts[30:]
    p = project_to_mean(forget, retain, weight=1.0, ridge=1e-6)
    mean = retain.mean(0)
    before, after = ((x - mean).norm(dim=-1).mean() for x in (forget, forget @ p.T))
    assert before > 0.3  # control
    assert after < 0.15 * before
    assert (retain @ p.T - retain).norm(dim=-1).mean() < 0.1 * before


def test_the_solution_at_the_projection_is_the_minimum() -> None:
    generator = torch.Generator().manual_seed(1)
    forget, retain = (torch.randn(n, 6, generator=generator).double() for n in (9, 20))
    ridge = 0.1

    def objective(p: torch.Tensor) -> float:
        gone = (forget @ p.T - retain.mean(0)).square().sum() / len(forget)
        held = (retain @ p.T - retain).square().sum() / len(retain)
        size = (p - torch.eye(6, dtype=p.dtype)).square().sum()
        return float(gone + 2.0 * held + ridge * retain.square().mean() * size)

    best = project_to_mean(forget, retain, weight=2.0, ridge=ridge)
    for _ in range(20):
        assert objective(best + 1e-2 * torch.randn(6, 6, generator=generator).double()) > objective(best)
