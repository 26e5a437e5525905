"""Find the words that ask for a concept without naming it, by searching the tokenizer's vocabulary.

“Purrs” and “whiskers” are not aliases of cat, and a prompt made of them still draws one. The text tower knows:
a word whose embedding CLIP reads as the concept rather than as anything that must stay is a trigger.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from erase_diffusion.text_encoder import TextEncoder

WORD_END = "</w>"


def vocabulary_words(encoder: TextEncoder) -> list[str]:
    """The whole words among the tokenizer's tokens: at least three letters, in the tokenizer's order."""
    tokens = sorted(encoder.tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = (token.removesuffix(WORD_END) for token, _ in tokens if token.endswith(WORD_END))
    return list(dict.fromkeys(w for w in words if len(w) >= 3 and w.isascii() and w.isalpha()))


@torch.no_grad()
def find_triggers(
    encoder: TextEncoder,
    concept_words: Sequence[str],
    kept_words: Sequence[Sequence[str]],
    *,
    limit: int = 24,
    share: float = 0.5,
) -> list[str]:
    """Words read as the concept with probability of at least `share`, the surest first, at most `limit`.

    The probability is CLIP's zero-shot softmax between the concept's text prototype (the mean over its words)
    and one prototype for each kept concept. Words that are the concept's own or a kept concept's are left out.
    Without a text projection (no paired CLIP) pooled states stand in for the joint space.
    """
    prototypes = torch.stack([_embed(encoder, list(words)).mean(0) for words in (concept_words, *kept_words)])
    said = {part for words in (concept_words, *kept_words) for word in words for part in word.lower().split()}
    candidates = [w for w in vocabulary_words(encoder) if w not in said]
    if not candidates:
        return []
    # The mean of all is what any text shares; without it every word looks like every concept.
    centre = prototypes.mean(0)
    logits = F.normalize(_embed(encoder, candidates) - centre, dim=-1) @ F.normalize(prototypes - centre, dim=-1).T
    probability = (logits * max(encoder.logit_scale, 10.0)).softmax(-1)[:, 0]
    order = probability.argsort(descending=True).tolist()
    return [candidates[i] for i in order[:limit] if probability[i] >= share]


def _embed(encoder: TextEncoder, words: list[str]) -> Tensor:
    """Normalised embeddings (n, d) of bare words."""
    chunks = []
    for start in range(0, len(words), 256):
        ids = encoder.tokenize(words[start : start + 256])
        # Causal attention: what comes after the longest word changes nothing, so it is not computed.
        ids = ids[:, : int(encoder.end_of_text(ids).max()) + 1]
        pooled = encoder.pooled(encoder.hidden(ids), ids)
        chunks.append(F.normalize(encoder.project(pooled) if encoder.projection is not None else pooled, dim=-1))
    return torch.cat(chunks)
