"""The rows of the benchmark: every method as it ships, and the forms of it that the papers or the questions ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """A method with its settings.

    pictures: whether any picture can change; else only CLIP's own tasks are asked.
    drawings: trained on captioned drawings, as many as the papers have data for, not on a few pictures that the model
    drew itself.
    """

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    pictures: bool = True
    drawings: bool = False


# The paper's three modules and nothing else, λ = (1, 3, 3), both towers; the forgetting module's dot product of CLIP's
# embeddings as CLIP gives them out, normalised, or raw.
PAPER = {"sequence_forgetting": 0.0, "sequence_retention": 0.0, "towers": "both", "batch_size": 64}

ROWS: dict[str, Row] = {
    "cliperase": Row("cliperase"),
    "cliperase, both towers": Row("cliperase", {"towers": "both"}),
    "cliperase, the paper's form": Row("cliperase", PAPER | {"learning_rate": 2e-4, "steps": 150}, drawings=True),
    "cliperase, the paper's form, raw": Row(
        "cliperase", PAPER | {"learning_rate": 2e-5, "steps": 60, "forgetting_form": "raw"}, drawings=True
    ),
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

# What the cells of (class, domain) are asked of: the method whose paradigms they are, and the default beside it.
CELL_ROWS = ("cliperase", "multimodal-nullspace", "multimodal-nullspace, at the projections")
