"""The drop-in's README: a Hugging Face model card with the loading snippet, the figures and the limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment

_CARD = """\
---
library_name: diffusers
tags: [concept-erasure, text-encoder, stable-diffusion]
---
# {{ names|join(', ') }}: erased from the text encoder of {{ record.source.model|cell }}

A drop-in CLIP text encoder for `{{ record.source.model|cell }}`, made by erase-diffusion with the method
`{{ record.method }}` (seed {{ record.parameters.seed }}). UNet, VAE and tokenizer are the source's own.

| concept | kind | removed with it | becomes |
|---|---|---|---|
{% for c in record.concepts -%}
| {{ c|named|cell }} | {{ c.kind }} | {{ c.aliases|join(', ')|cell or '–' }} | {{ c.anchor|cell }} |
{% endfor %}
{% if record.earlier -%}
It goes on from an encoder that had been erased before, and stays so:
{% for r in record.earlier %}{% for c in r.concepts %}
- {{ c|named|cell }} (became {{ c.anchor|cell }}, by `{{ r.method|cell }}`)
{%- endfor %}{% endfor %}

{% endif -%}
## Use

```python
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel
{%- if record.source.model == "mini" %}
from erase_diffusion.mini.vocabulary import WEIGHTS  # where the embedded model lies
{%- endif %}

text_encoder = CLIPTextModel.from_pretrained("THIS_FOLDER", subfolder="text_encoder")
pipe = StableDiffusionPipeline.from_pretrained({{ base }}, text_encoder=text_encoder)
```

With erase-diffusion, `load_erased_text_encoder("THIS_FOLDER", base={{ record.source.model|literal|cell }})` also checks
that the base is the one this was made from.

## Evidence
{% for v in record.verification %}
**{{ v.concept|cell }}: {{ v.verdict }}{{ '' if v.preserved else ', the rest not proven preserved' }}.**
{{ v.rule|cell }}.
The judge is a separate CLIP (threshold {{ '%.3f'|format(v.checker.threshold) }},
false alarms {{ v.checker.false_alarms|rate }}, misses {{ v.checker.misses|rate }}). Intervals are Wilson's at 95 %.
Mean CLIP score of preserved prompts: {{ v.clip_score_preserved.before }}, after it {{ v.clip_score_preserved.after }}.

| prompts | found by the original | found after the erasure |
|---|---|---|
{% for group, r in v.found.items() -%}
| {{ group }} | {{ r.before|rate }} | {{ r.after|rate }} |
{% endfor %}
| what must stay | kept of what the original showed |
|---|---|
{% for name, r in v.kept.items() -%}
| {{ name }} | {{ r|rate }} |
{% endfor %}
{% else %}
This erasure was **not verified**: nothing is claimed of it.
{% endfor %}
## Limits

- The concept is gone from this encoder, not from the UNet: whoever swaps the original text encoder back in, or
  trains a new embedding for it, can have it again.
- The figures hold for prompts like those asked here, drawn with these settings, and for what the judge can see.
- Images given as input (img2img, ControlNet, adapters) don't pass through the text encoder.
"""


def _rate(value: Mapping[str, Any]) -> str:
    if value["rate"] is None:
        return "no images"
    return f"{value['rate']:.1%} [{value['low']:.1%}, {value['high']:.1%}] of {value['total']}"


def _named(concept: Mapping[str, Any]) -> str:
    """“red, within cat”: a concept of a record with the thing on which alone it is erased."""
    return str(concept["name"]) + (f", within {concept['within']}" if concept.get("within") else "")


def _cell(value: object) -> str:
    """Text that cannot break a Markdown table or slip in HTML."""
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")


def model_card(record: Mapping[str, Any]) -> str:
    """The card of an `erasure.json` record, as Markdown."""
    # Markdown, not HTML: what comes from the user goes through `cell`, which escapes for both.
    environment = Environment(autoescape=False, keep_trailing_newline=True)  # noqa: S701
    environment.filters |= {"rate": _rate, "cell": _cell, "literal": json.dumps, "named": _named}
    names = [_cell(_named(c)) for c in record["concepts"]]
    source = record["source"]
    base = 'WEIGHTS / "pipeline"' if source["model"] == "mini" else json.dumps(source["load_from"])
    return environment.from_string(_CARD).render(record=record, names=names, base=base)
