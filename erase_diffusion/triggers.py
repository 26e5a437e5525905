"""Find the words that ask for a concept without naming it, by searching the tokenizer's vocabulary.

“Purrs” and “whiskers” are not aliases of cat, and a prompt made of them still draws one. The text tower knows:
a word whose embedding CLIP reads as the concept rather than as anything that must stay is a trigger.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from erase_diffusion.concepts import Vocabulary
from erase_diffusion.text_encoder import TextEncoder

WORD_END = "</w>"
# A bare word is like nothing CLIP was trained on; a few short sentences steady it.
TEMPLATES = ("{w}", "a {w}", "there is a {w}", "a picture of a {w}")
MAX_WORDS = 4000  # tokens come in order of frequency, and a large vocabulary's tail is rare


def vocabulary_words(encoder: TextEncoder) -> list[str]:
    """The whole words among the tokenizer's tokens: at least three letters, in the tokenizer's order."""
    tokens = sorted(encoder.tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = (token.removesuffix(WORD_END) for token, _ in tokens if token.endswith(WORD_END))
    return list(dict.fromkeys(w for w in words if len(w) >= 3 and w.isascii() and w.isalpha()))


@torch.no_grad()
def find_triggers(
    encoder: TextEncoder,
    vocabulary: Vocabulary,
    concept_words: Sequence[str],
    kept_words: Sequence[Sequence[str]],
    *,
    limit: int = 24,
    share: float = 0.5,
    known: dict[str, Tensor] | None = None,
) -> list[str]:
    """Words read as the concept with probability of at least `share`, the surest first, at most `limit`.

    The probability is CLIP's zero-shot softmax between the concept's text prototype (the mean over its words
    in a few templates) and one prototype for each kept concept, both centred: what every text shares would
    make each word look like each concept. Words that the prompts themselves are made of (the vocabulary's
    attributes, places, styles and templates, and the concepts' own words) are no triggers.
    known: word → embedding (d,); what is missing is added, so that several concepts embed the vocabulary once.
    Without a text projection (no paired CLIP) pooled states stand in for the joint space.
    """
    said = prompt_words(vocabulary) | {p for words in (concept_words, *kept_words) for w in words for p in _parts(w)}
    candidates = [w for w in vocabulary_words(encoder)[:MAX_WORDS] if w not in said]
    if not candidates:
        return []
    prototypes = torch.stack([_embed(encoder, list(words)).mean(0) for words in (concept_words, *kept_words)])
    known = {} if known is None else known
    missing = [w for w in candidates if w not in known]
    if missing:
        known.update(zip(missing, _embed(encoder, missing), strict=True))
    vectors = torch.stack([known[w] for w in candidates])
    logits = F.normalize(vectors - vectors.mean(0), dim=-1) @ F.normalize(prototypes - prototypes.mean(0), dim=-1).T
    probability = (logits * max(encoder.logit_scale, 20.0)).softmax(-1)[:, 0]
    order = probability.argsort(descending=True).tolist()
    return [candidates[i] for i in order[:limit] if probability[i] >= share]


def prompt_words(vocabulary: Vocabulary) -> set[str]:
    """Every word that the vocabulary's own prompts are built of, concepts aside."""
    tables = (vocabulary.places, vocabulary.alone, vocabulary.styles, vocabulary.style_suffixes)
    texts = [phrase for table in tables for phrases in table.values() for phrase in phrases]
    texts += [*vocabulary.attributes, *vocabulary.relations, *vocabulary.templates]
    texts += [*vocabulary.held_out_templates, *vocabulary.empty_templates, "thing something"]
    return {part for text in texts for part in _parts(text)}


def _parts(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _embed(encoder: TextEncoder, words: list[str]) -> Tensor:
    """Embeddings (n, d) of words: the normalised mean over the templates."""
    total = torch.zeros(())
    for template in TEMPLATES:
        chunks = []
        for start in range(0, len(words), 256):
            ids = encoder.tokenize([template.format(w=w) for w in words[start : start + 256]])
            # Causal attention: what comes after the longest prompt changes nothing, so it is not computed.
            ids = ids[:, : int(encoder.end_of_text(ids).max()) + 1]
            pooled = encoder.pooled(encoder.hidden(ids), ids)
            chunks.append(F.normalize(encoder.project(pooled) if encoder.projection is not None else pooled, dim=-1))
        total = total + torch.cat(chunks)
    return F.normalize(total, dim=-1)
