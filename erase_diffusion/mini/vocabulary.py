"""The picture-book world as a `Vocabulary`: what the forget, retain and verification prompts are made of."""

from __future__ import annotations

from pathlib import Path

from erase_diffusion.concepts import Vocabulary
from erase_diffusion.mini.captions import EMPTY_TEMPLATES, RELATION_PHRASES, SUBJECT_TEMPLATES
from erase_diffusion.mini.world import CHARACTER, COLOURS, OBJECTS, PLACES, STYLES, is_held_out

WEIGHTS = Path(__file__).parent / "weights"


def vocabulary() -> Vocabulary:
    """Everything the embedded model was taught to draw, with its training and held-out templates."""
    return Vocabulary(
        objects={n.name: (n.name, *n.synonyms) for n in OBJECTS.values()},
        characters={CHARACTER.name: (CHARACTER.name, *CHARACTER.synonyms)},
        attributes=tuple(COLOURS),
        places={p.name: p.there for p in PLACES.values()},
        alone={p.name: p.alone for p in PLACES.values()},
        styles={s.name: s.phrases for s in STYLES.values()},
        style_suffixes={s.name: s.suffixes for s in STYLES.values()},
        descriptions={n.name: n.descriptions for n in (*OBJECTS.values(), CHARACTER)},
        # The templates' slots: {s} subject, {p} place with its space, {y} style phrase, {a} a place alone.
        templates=SUBJECT_TEMPLATES["train"],
        held_out_templates=SUBJECT_TEMPLATES["test"],
        empty_templates=EMPTY_TEMPLATES["train"],
        held_out_empty_templates=EMPTY_TEMPLATES["test"],
        is_held_out=is_held_out,
        relations=tuple(phrase for phrases in RELATION_PHRASES.values() for phrase in phrases),
    )
