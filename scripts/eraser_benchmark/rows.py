"""The rows of the benchmark: every method as it ships, and the forms of it that the papers or the questions ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """A method with its settings.  pictures: whether any picture can change; else only CLIP's own tasks are asked."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    pictures: bool = True


# The paper's three modules and nothing else: raw dot product, both towers, λ = (1, 3, 3).
PAPER = {"sequence_forgetting": 0.0, "sequence_retention": 0.0, "forgetting_form": "raw", "towers": "both"}

ROWS: dict[str, Row] = {
    "cliperase": Row("cliperase"),
    "cliperase, both towers": Row("cliperase", {"towers": "both"}),
    "cliperase, the paper's form": Row("cliperase", PAPER),
    "nullspace": Row("nullspace"),
    "nullspace, strength 0.75": Row("nullspace", {"strength": 0.75}),
    "nullspace, strength 0.5": Row("nullspace", {"strength": 0.5}),
    "nullspace, strength 0.25": Row("nullspace", {"strength": 0.25}),
    "nullspace, at the projection": Row("nullspace", {"site": "projection"}, pictures=False),
    "multimodal-nullspace": Row("multimodal-nullspace"),
    "multimodal-nullspace, at the projections": Row("multimodal-nullspace", {"site": "projection"}, pictures=False),
    "lipschitz": Row("lipschitz"),
    "subgroup": Row("subgroup"),
    "token-swap": Row("token-swap"),
    "single-layer": Row("single-layer"),
    "gradient-difference": Row("gradient-difference"),
    "gradient-ascent": Row("gradient-ascent"),
    "retain-finetune": Row("retain-finetune"),
}
