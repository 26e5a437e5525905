"""What to erase, what to keep, and the prompts that say so: forget pairs, retain prompts, test prompts.

A forget prompt is always paired with its *anchor prompt*: the same sentence with the concept replaced by
what it becomes. The eraser learns from the training templates; the verification asks with held-out ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from erase_diffusion.errors import ConfigError

Kind = Literal["object", "style", "character", "attribute"]
KINDS: tuple[Kind, ...] = ("object", "style", "character", "attribute")
MAX_CONCEPT_LENGTH = 60


@dataclass(frozen=True)
class Concept:
    """A concept to erase.

    name: the word itself, at most 60 characters.
    kind: object, style, character or attribute; it decides which sentences the concept stands in.
    aliases: words removed with it.
    anchor: the word it becomes; None lets `resolve_anchor` choose.
    within: for an attribute or a style, the thing on which alone it is erased: red, within cat, leaves other cats and
    other red things as they are.

    Raises ConfigError for an empty or over-long word, an unknown kind, or an anchor that is the concept.
    """

    name: str
    kind: Kind = "object"
    aliases: tuple[str, ...] = ()
    anchor: str | None = None
    within: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for label, word in [("concept", self.name), *(("alias", a) for a in self.aliases)]:
            check_word(label, word)
        if self.anchor is not None:
            check_word("anchor", self.anchor)
            if normalise(self.anchor) in {normalise(w) for w in self.words}:
                raise ConfigError(f"the anchor {self.anchor!r} is the concept itself; choose what it should become")
        if self.within is not None:
            check_word("thing within which to erase", self.within)
            if self.kind not in ("attribute", "style"):
                raise ConfigError(
                    f"only an attribute or a style can be erased within {self.within!r}, {self.name!r} is "
                    f"{article(self.kind)}; pass --kind"
                )

    @property
    def words(self) -> tuple[str, ...]:
        """The name and its aliases, each once."""
        return tuple(dict.fromkeys((self.name, *self.aliases)))


def check_word(label: str, word: str) -> None:
    """Raise ConfigError unless `word` is a printable, non-empty word or phrase of at most 60 characters."""
    if not word.strip():
        raise ConfigError(f"the {label} is empty; name what to erase, for example “cat”")
    if len(word) > MAX_CONCEPT_LENGTH:
        raise ConfigError(
            f"the {label} has {len(word)} characters, at most {MAX_CONCEPT_LENGTH} are allowed: {word[:40]!r}…"
        )
    if not word.isprintable() or not any(c.isalnum() for c in word):
        raise ConfigError(f"the {label} {word!r} must be printable text with at least one letter or digit")


def normalise(word: str) -> str:
    """Lower case and single spaces: how words are compared."""
    return re.sub(r"\s+", " ", word.strip().lower())


@dataclass(frozen=True)
class Vocabulary:
    """The words around a concept: what else a model draws, and how prompts are built.

    objects, characters, styles: canonical name → words that mean it, the name first. A style's words are
    whole phrases that go before “of …”; the first style is the neutral look.
    places: name → phrases with their preposition.  alone: name → phrases for the place with nothing in it.
    descriptions: name → ways to say an object without its word; asked by the verification, never trained on.
    templates / held_out_templates: {s} subject, {p} place, {y} style phrase.
    is_held_out: whether an (object, attribute, place) combination is kept for the verification.
    """

    objects: Mapping[str, tuple[str, ...]]
    attributes: tuple[str, ...]
    places: Mapping[str, tuple[str, ...]]
    alone: Mapping[str, tuple[str, ...]]
    styles: Mapping[str, tuple[str, ...]]
    templates: tuple[str, ...]
    held_out_templates: tuple[str, ...]
    characters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    style_suffixes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    descriptions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    empty_templates: tuple[str, ...] = ("{a}",)
    held_out_empty_templates: tuple[str, ...] = ("{a}",)
    relations: tuple[str, ...] = ("{a} to the left of {b}", "{a} above {b}", "{a} next to {b}")
    is_held_out: Callable[[str, str, str], bool] | None = None

    @property
    def neutral_style(self) -> str:
        return next(iter(self.styles))

    def of_kind(self, kind: Kind) -> dict[str, tuple[str, ...]]:
        """Name → words of everything the vocabulary holds of a kind, the neutral style left out."""
        if kind == "object":
            return dict(self.objects)
        if kind == "character":
            return dict(self.characters)
        if kind == "style":
            return {name: words for name, words in self.styles.items() if name != self.neutral_style}
        return {name: (name,) for name in self.attributes}

    def find(self, word: str) -> tuple[Kind, str] | None:
        """The kind and canonical name of a word, or None for a word the vocabulary doesn't hold.

        A word of two kinds (orange, the fruit and the colour) is found as the first of KINDS.
        """
        for kind in KINDS:
            for name, words in self.of_kind(kind).items():
                if normalise(word) in {normalise(w) for w in (name, *words)}:
                    return kind, name
        return None


@dataclass(frozen=True)
class Prompt:
    """A prompt and what a true picture of it shows: `things` by canonical name, the rest where it is said."""

    text: str
    group: str
    things: tuple[str, ...] = ()
    attribute: str | None = None
    place: str | None = None
    style: str | None = None


@dataclass(frozen=True)
class PromptSets:
    """What an eraser works on.

    forget: (prompt, anchor prompt) pairs.  retain: prompts that must keep their meaning, the empty one first.
    forget_held_out, retain_held_out: the same, of other sentences, for early stopping.
    words: the words to forget, each with what it becomes.  plain: the words in every template, with nothing else said.
    forget_classes: one plain phrase a concept (“a cat”), retain_classes: one for each of its kind that stays; the
    classes of CLIP's zero-shot classification.
    near: whether retain prompts say the very words that are forgotten: of a look within a thing, of a word with two
    meanings.
    """

    forget: tuple[tuple[str, str], ...]
    retain: tuple[str, ...]
    forget_held_out: tuple[tuple[str, str], ...] = ()
    retain_held_out: tuple[str, ...] = ()
    words: tuple[tuple[str, str], ...] = ()
    plain: tuple[str, ...] = ()
    forget_classes: tuple[str, ...] = ()
    retain_classes: tuple[str, ...] = ()
    near: bool = False

    def __post_init__(self) -> None:
        if not self.forget or not self.retain:
            raise ConfigError(
                f"an erasure needs forget and retain prompts, got {len(self.forget)} and {len(self.retain)}"
            )


def article(phrase: str) -> str:
    """The phrase with “a” or “an”, unless it brings its own determiner or is a name."""
    if phrase.split()[0] in {"a", "an", "the", "what", "something"} or phrase[0].isupper():
        return phrase
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def subject(word: str, attribute: str | None) -> str:
    """“a red cat”, “Zibby”, “a pet that purrs coloured red”."""
    if attribute is None or word[0].isupper() or word.startswith("the "):
        return article(word)
    if word == "something":
        return f"something {attribute}"
    if len(word.split()) > 2:
        return f"{article(word)} coloured {attribute}"
    return article(f"{attribute} {word}")


def sentence(template: str, *, s: str = "", p: str = "", a: str = "", style: str = "", suffix: str = "") -> str:
    """Fill a template; a style that the template has no slot for is said at the end as `suffix`."""
    text = template.format(s=s, p=f" {p}" if p else "", y=style, a=a)
    return text if "{y}" in template or not suffix else f"{text} {suffix}"


def misspell(word: str, rng: random.Random) -> str:
    """One slip of the finger: a letter dropped, doubled, or swapped with the next."""
    if len(word) < 3:
        return word
    i = rng.randrange(1, len(word) - 1)
    return rng.choice(
        (word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:], word[:i] + word[i + 1] + word[i] + word[i + 2 :])
    )


def says(phrase: str, word: str) -> bool:
    """Whether a phrase says the word, as a word of its own or its plural ("drawn with crayons")."""
    return re.search(rf"\b{re.escape(normalise(word))}s?\b", normalise(phrase)) is not None


def asks_for(phrase: str, concept: Concept) -> bool:
    """Whether a phrase names a concept; one within a thing only beside that thing."""
    return (concept.within is None or says(phrase, concept.within)) and any(says(phrase, w) for w in concept.words)


def default_kind(word: str, within: str | None, vocabulary: Vocabulary) -> Kind:
    """The kind of a concept that was given none: object, or within a thing the look that the word is known as."""
    if within is None:
        return "object"
    styles = {normalise(w) for name, words in vocabulary.of_kind("style").items() for w in (name, *words)}
    return "style" if normalise(word) in styles else "attribute"


def resolve_concept(concept: Concept, vocabulary: Vocabulary) -> Concept:
    """Add the aliases that the vocabulary knows, and spell a known word as it does ("Cat" is no proper name).

    Raises ConfigError for a word that it knows only as another kind: erased as an object, a style would stay.
    """
    if concept.within is not None:
        kind, thing = vocabulary.find(concept.within) or ("object", concept.within)
        if kind not in ("object", "character"):
            raise ConfigError(f"{concept.within!r} is known as {article(kind)}, not as a thing to erase within")
        concept = replace(concept, within=thing)
    known = vocabulary.of_kind(concept.kind)
    for name, words in known.items():
        spelt = {normalise(w): w for w in (*words, name)}
        if normalise(concept.name) in spelt:
            concept = replace(concept, name=spelt[normalise(concept.name)])
            extra = tuple(w for w in (name, *words) if normalise(w) != normalise(concept.name))
            if concept.kind == "style":
                # “A crayon drawing” is no synonym of crayon: it says the word.
                extra = tuple(w for w in extra if not says(w, concept.name))
            return replace(concept, aliases=tuple(dict.fromkeys((*concept.aliases, *extra))))
    other = vocabulary.find(concept.name)
    if other:
        raise ConfigError(
            f"{concept.name!r} is known as {article(other[0])}, not {article(concept.kind)}; pass --kind {other[0]}"
        )
    if concept.within is not None:
        # The other looks of the thing are what must stay: they have to be known.
        raise ConfigError(
            f"{concept.name!r} is no {concept.kind} that the model's vocabulary holds, so it cannot be erased within "
            f"{concept.within!r}; it holds {', '.join(vocabulary.of_kind(concept.kind)) or 'none'}"
        )
    return concept


def canonical(concept: Concept, vocabulary: Vocabulary) -> str:
    """The vocabulary's own name for the concept, or the concept's name when it holds none."""
    for name, words in vocabulary.of_kind(concept.kind).items():
        if normalise(concept.name) in {normalise(w) for w in (name, *words)}:
            return name
    return concept.name


def preserved(
    concept: Concept, vocabulary: Vocabulary, chosen: Sequence[str] = (), erased: Sequence[str] = ()
) -> dict[str, tuple[str, ...]]:
    """Objects and characters that must stay (name → words): the chosen ones, else all the vocabulary holds.

    chosen: the user's words, found in the vocabulary where it knows them; its styles and attributes are held in any
    case, by being what the prompts around the things are made of.
    erased: words of other concepts erased together with this one.

    Raises ConfigError when a chosen word is empty, the concept, or one of its aliases.
    """
    gone = {normalise(w) for w in (*concept.words, *erased)}
    everything = {
        name: words
        for name, words in {**vocabulary.objects, **vocabulary.characters}.items()
        if not gone & {normalise(w) for w in (name, *words)}
        or (
            concept.kind in ("style", "attribute")
            and not {normalise(w) for w in erased} & {normalise(w) for w in words}
        )
    }
    picked: dict[str, tuple[str, ...]] = {}
    for word in chosen:
        check_word("preserved word", word)
        if normalise(word) in gone:
            raise ConfigError(f"{word!r} is both a concept to erase and one to preserve; take it out of one of them")
        kind, name = vocabulary.find(word) or ("object", word)
        if kind in ("object", "character"):
            picked[name] = everything.get(name, (name,))
    return picked or everything


class PromptWriter:
    """Writes the prompts of one concept from a vocabulary; deterministic in its seed."""

    def __init__(
        self,
        concept: Concept,
        vocabulary: Vocabulary,
        preserve: Mapping[str, tuple[str, ...]],
        seed: int = 0,
        erased_with: Sequence[Concept] = (),
    ):
        """`erased_with`: concepts that go at the same time, whose styles and attributes no prompt asks to keep."""
        if concept.anchor is None:
            raise ConfigError(f"the concept {concept.name!r} has no anchor yet; resolve it first")
        if not preserve:
            raise ConfigError("nothing is left to preserve; name at least one concept with --preserve")
        self.concept, self.vocabulary, self.preserve, self.seed = concept, vocabulary, dict(preserve), seed
        self.name = canonical(concept, vocabulary)
        self.with_others = bool(erased_with)
        together = (concept, *erased_with)
        self._gone = {(c.kind, canonical(c, vocabulary)) for c in together if c.within is None}
        self._gone_within = {(c.within, c.kind, canonical(c, vocabulary)) for c in together if c.within is not None}
        if concept.within is not None and concept.within not in self.preserve:
            raise ConfigError(f"{concept.within!r} must stay, to erase {concept.name!r} within it; preserve it too")

    def _forgotten(self, thing: str, attribute: str | None = None, style: str | None = None) -> bool:
        """Whether this look of this thing is erased within it."""
        return bool({(thing, "attribute", attribute), (thing, "style", style)} & self._gone_within)

    def _style(self, rng: random.Random, name: str | None) -> tuple[str, str]:
        """The phrase before “of” and the suffix for a style, None being the neutral one unsaid."""
        phrases = self.vocabulary.styles[name or self.vocabulary.neutral_style]
        suffixes = self.vocabulary.style_suffixes.get(name or "", ())
        return rng.choice(phrases), rng.choice(suffixes) if suffixes and name else ""

    def _concept_style(self, rng: random.Random, word: str) -> tuple[str, str]:
        """How a style that is to be erased is said: as the vocabulary says it, or in the usual phrases."""
        own, suffixes = (
            [phrase for phrase in table.get(self.name, ()) if says(phrase, self.name) == (word == self.concept.name)]
            for table in (self.vocabulary.styles, self.vocabulary.style_suffixes)
        )
        if own and (word in own or word == self.concept.name):
            return rng.choice(own), rng.choice(suffixes or [f"in the style of {word}"])
        before = rng.choice((f"a {word} picture", f"a {word} drawing", f"a picture in the style of {word}"))
        return before, rng.choice((f"in the style of {word}", f"in {word} style", f"by {word}"))

    def _context(self, rng: random.Random, thing: str, held_out: bool) -> tuple[str | None, str | None, str | None]:
        """An attribute, a place and a style, each said or not; said together, of the right side of the split."""
        v = self.vocabulary
        styles = [
            s
            for s in v.styles
            if s != v.neutral_style and ("style", s) not in self._gone and not self._forgotten(thing, style=s)
        ]
        attributes = [
            a for a in v.attributes if ("attribute", a) not in self._gone and not self._forgotten(thing, attribute=a)
        ]
        attribute = rng.choice(attributes) if attributes and rng.random() < 0.6 else None
        place = rng.choice(list(v.places)) if v.places and rng.random() < 0.6 else None
        style = rng.choice(styles) if styles and rng.random() < 0.4 else None
        if attribute and place and v.is_held_out:
            cells = [(a, p) for a in attributes for p in v.places if v.is_held_out(thing, a, p) == held_out]
            if not cells:
                return attribute, None, style
            attribute, place = rng.choice(cells)
        return attribute, place, style

    def _attribute(self, rng: random.Random, thing: str) -> str | None:
        """An attribute for the other thing of a pair, said or not."""
        return self._context(rng, thing if self.concept.within else "", False)[0]

    def _forget(self, rng: random.Random, word: str, *, held_out: bool, pairs: bool) -> tuple[Prompt, str]:
        """One prompt that asks for the concept by `word`, and the same prompt asking for the anchor.

        held_out: of the verification's templates and combinations.  pairs: now and then beside something else.
        """
        v, kind = self.vocabulary, self.concept.kind
        anchor = self.concept.anchor
        assert anchor is not None
        template = rng.choice(v.held_out_templates if held_out else v.templates)
        thing = self.name
        if self.concept.within is not None:
            thing = self.concept.within
        elif kind == "style":
            thing = rng.choice(list(self.preserve))
        elif kind == "attribute":
            thing = rng.choice([n for n in self.preserve if n in v.objects] or list(self.preserve))
        attribute, place, style = self._context(rng, thing, held_out)
        there = rng.choice(v.places[place]) if place else ""
        phrase, suffix = self._style(rng, style)
        if kind == "style":
            coloured = attribute if thing in v.objects else None
            said = subject(rng.choice(self.preserve[thing]), coloured)
            phrase, suffix = self._concept_style(rng, word)
            if anchor in v.styles:
                neutral, anchor_suffix = self._style(rng, anchor if anchor != v.neutral_style else None)
            else:
                neutral, anchor_suffix = article(anchor), f"in {anchor} style"
            text = sentence(template, s=said, p=there, style=phrase, suffix=suffix)
            other = sentence(template, s=said, p=there, style=neutral, suffix=anchor_suffix)
            # What is erased is no part of what must stay.
            return Prompt(text, "named", (thing,), coloured, place), other
        if kind == "attribute":
            noun = rng.choice((*self.preserve[thing], *([] if self.concept.within else ["something"])))
            text, other = (
                sentence(template, s=subject(noun, w), p=there, style=phrase, suffix=suffix) for w in (word, anchor)
            )
            return Prompt(text, "named", (thing,) if noun != "something" else (), None, place, style), other
        if kind == "character":
            attribute = None  # a character has its own look
        said, replaced = subject(word, attribute), subject(anchor, attribute)
        things: tuple[str, ...] = (self.name,)
        if pairs and rng.random() < 0.3:
            neighbour = rng.choice([n for n in self.preserve if n != anchor] or list(self.preserve))
            relation, places = self._beside(rng, neighbour)
            said, replaced = relation.format(said), relation.format(replaced)
            things = places
            attribute = None  # whose would be anybody's guess
        text, other = (sentence(template, s=s, p=there, style=phrase, suffix=suffix) for s in (said, replaced))
        return Prompt(text, "named", things, attribute, place, style), other

    def _beside(self, rng: random.Random, neighbour: str) -> tuple[str, tuple[str, ...]]:
        """“{} to the left of a red car” or the other way round, and the two things' names."""
        second = subject(rng.choice(self.preserve[neighbour]), self._attribute(rng, neighbour))
        second = second.replace("{", "").replace("}", "")
        first, last = ("{}", second) if rng.random() < 0.5 else (second, "{}")
        return rng.choice(self.vocabulary.relations).format(a=first, b=last), (self.name, neighbour)

    def _retain(self, rng: random.Random, *, held_out: bool) -> Prompt:
        """One prompt that does not ask for the concept."""
        v = self.vocabulary
        templates = v.held_out_templates if held_out else v.templates
        if self.concept.within is not None and rng.random() < 0.5:
            return self._near(rng, rng.choice(("same thing", "same look")), held_out=held_out)
        thing = rng.choice(list(self.preserve))
        attribute, place, style = self._context(rng, thing, held_out)
        there = rng.choice(v.places[place]) if place else ""
        phrase, suffix = self._style(rng, style)
        roll = rng.random()
        if roll < 0.08 and v.alone:
            where = rng.choice(list(v.alone))
            empty = v.held_out_empty_templates if held_out else v.empty_templates
            text = sentence(rng.choice(empty), a=rng.choice(v.alone[where]), style=phrase, suffix=suffix)
            return Prompt(text, "empty", (), None, where, style)
        if roll < 0.14:
            said = subject("something", attribute) if attribute else "a thing"
            text = sentence(rng.choice(templates), s=said, p=there, style=phrase, suffix=suffix)
            return Prompt(text, "vague", (), attribute, place, style)
        said = subject(rng.choice(self.preserve[thing]), attribute)
        things: tuple[str, ...] = (thing,)
        if roll > 0.7 and len(self.preserve) > 1:
            other = rng.choice([n for n in self.preserve if n != thing and not self._forgotten(n, style=style)])
            second = subject(rng.choice(self.preserve[other]), self._attribute(rng, other))
            said, things = rng.choice(v.relations).format(a=said, b=second), (thing, other)
        coloured = attribute if thing in v.objects and len(things) == 1 else None
        text = sentence(rng.choice(templates), s=said, p=there, style=phrase, suffix=suffix)
        return Prompt(text, "preserved", things, coloured, place, style)

    def _near(self, rng: random.Random, group: str, *, held_out: bool) -> Prompt:
        """The nearest of what must stay of a concept that is erased within a thing.

        group: "same thing", in another look, or "same look", on another thing.
        """
        v, within, kind = self.vocabulary, self.concept.within, self.concept.kind
        assert within is not None
        same_thing = group == "same thing"
        # Only a drawn object has attributes; a style is on everything.
        look = {"attribute": self.name} if kind == "attribute" else {"style": self.name}
        others = [
            n
            for n in self.preserve
            if n != within and (kind == "style" or n in v.objects) and not self._forgotten(n, **look)
        ]
        thing = within if same_thing or not others else rng.choice(others)
        attribute, place, style = self._context(rng, thing, held_out)
        if kind == "attribute":
            looks = [self.name]
            if same_thing:
                looks = [a for a in v.attributes if not self._forgotten(thing, attribute=a)]
            cells = [
                (a, p) for a in looks for p in v.places if not v.is_held_out or v.is_held_out(thing, a, p) == held_out
            ]
            attribute, place = rng.choice(cells) if cells and place else (rng.choice(looks), None)
            phrase, suffix = self._style(rng, style)
        elif same_thing:
            kept = [s for s in v.styles if s != v.neutral_style and not self._forgotten(thing, style=s)]
            style = rng.choice([None, *kept])
            phrase, suffix = self._style(rng, style)
        else:
            style = self.name
            phrase, suffix = self._concept_style(rng, rng.choice(self.concept.words))
        there = rng.choice(v.places[place]) if place else ""
        said = subject(rng.choice(self.preserve[thing]), attribute)
        template = rng.choice(v.held_out_templates if held_out else v.templates)
        coloured = attribute if thing in v.objects else None
        text = sentence(template, s=said, p=there, style=phrase, suffix=suffix)
        return Prompt(text, group, (thing,), coloured, place, style)

    def training_sets(self, n_forget: int, n_retain: int, triggers: Sequence[str] = ()) -> PromptSets:
        """Forget pairs over all the concept's words (and mined `triggers`), retain prompts, and a held-out fifth."""
        # Each of several concepts writes retain prompts of its own.
        rng = random.Random(f"train {self.seed}" + (f" {self.name}" if self.with_others else ""))
        assert self.concept.anchor is not None
        becomes = tuple((word, self.concept.anchor) for word in self.concept.words)
        # The bare words come first: the shortest prompts are the most common ones.
        forget: dict[str, str] = {}
        if self.concept.kind in ("object", "character"):
            for word, anchor in becomes:
                forget[word] = anchor
                forget[article(word)] = article(anchor)
        words = list(self.concept.words)
        for _ in range(20 * n_forget):
            if len(forget) >= n_forget:
                break
            if triggers and rng.random() < 0.4:
                word = " ".join(rng.sample(list(triggers), min(len(triggers), rng.choice((1, 1, 2, 3)))))
            else:
                word = rng.choice(words)
            prompt, other = self._forget(rng, word, held_out=False, pairs=True)
            forget[prompt.text] = other
        retain: dict[str, None] = {"": None}
        for _ in range(20 * n_retain):
            if len(retain) >= n_retain:
                break
            retain[self._retain(rng, held_out=False).text] = None
        pairs, kept = list(forget.items()), list(retain)
        a, b = max(1, len(pairs) * 4 // 5), max(1, len(kept) * 4 // 5)
        return PromptSets(
            tuple(pairs[:a]),
            tuple(kept[:b]),
            tuple(pairs[a:]),
            tuple(kept[b:]),
            becomes,
            self._plain(),
            *self._classes(),
            near=any(says(p, w) for p in kept for w in self.concept.words),
        )

    def _classes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The concept as a class, and the classes of its kind that stay; within a thing, looks of things."""
        v, kind, within = self.vocabulary, self.concept.kind, self.concept.within

        def look(name: str, thing: str) -> str:
            style = (*v.styles.get(name, ()), f"a {name} picture")[0]
            return subject(thing, name) if kind == "attribute" else f"{style} of {article(thing)}"

        if kind in ("object", "character"):
            return (article(self.concept.name),), tuple(article(n) for n in self.preserve)
        looks = [n for n in v.of_kind(kind) if n != self.name and (kind, n) not in self._gone]
        looks += [v.neutral_style] if kind == "style" else []
        things = [within] if within else ["something" if kind == "attribute" else "a thing"]
        others = [n for n in self.preserve if n in v.objects and n != within] if within else []
        kept = [look(n, t) for t in things for n in looks] + [look(self.name, n) for n in others]
        return tuple(look(self.name, t) for t in things), tuple(kept)

    def _plain(self) -> tuple[str, ...]:
        """Each of the concept's words in every training template, with no attribute, place or style of its own."""
        v, kind = self.vocabulary, self.concept.kind
        neutral = v.styles[v.neutral_style]
        things = [self.concept.within] if self.concept.within else list(self.preserve)
        said: dict[str, None] = {}
        for template in v.templates:
            for word in self.concept.words:
                style, suffix = neutral[0], ""
                subjects = [article(word)]
                if kind == "style":
                    style, suffix = self._concept_style(random.Random(template), word)
                    subjects = [article(n) for n in things]
                elif kind == "attribute":
                    subjects = [subject(n, word) for n in things if n in v.objects] or [f"something {word}"]
                said |= dict.fromkeys(sentence(template, s=s, style=style, suffix=suffix) for s in subjects)
        return tuple(said)

    def calibration_prompts(self, count: int) -> tuple[list[str], list[str], list[str]]:
        """`count` prompts each that name the concept, that name other things, and of empty scenes."""
        rng = random.Random(f"calibrate {self.seed}")
        named = [self._forget(rng, self.concept.name, held_out=True, pairs=True)[0].text for _ in range(count)]
        wanted: dict[str, list[str]] = {"preserved": [], "empty": []}
        for _ in range(400 * count):
            prompt = self._retain(rng, held_out=True)
            # A thing whose attribute is not said may well have the one that is erased.
            if self.concept.kind == "attribute" and prompt.things and prompt.attribute is None:
                continue
            # Of two things the judge cannot tell which has the look.
            if self.concept.within is not None and len(prompt.things) > 1:
                continue
            bucket = wanted.get("preserved" if prompt.group.startswith("same") else prompt.group)
            if bucket is not None and len(bucket) < count:
                bucket.append(prompt.text)
            if all(len(b) >= count for b in wanted.values()):
                break
        return named, wanted["preserved"], wanted["empty"]

    def verification_prompts(self, per_group: int) -> list[Prompt]:
        """Prompts of the held-out templates and combinations: `per_group` of each group that can be filled.

        Groups: named, synonym, described, two-object (the concept beside a kept object), preserved; for a
        concept within a thing also that thing in other looks and that look on other things. Without an alias the
        named prompts are twice as many, so that the verdict rests on as many pictures.
        """
        rng = random.Random(f"verify {self.seed}")
        v, kind = self.vocabulary, self.concept.kind
        aliases = [w for w in self.concept.words if w != self.concept.name]
        described = v.descriptions.get(self.name, ()) if kind in ("object", "character") else ()
        asked: list[tuple[str, str]] = [("named", self.concept.name)] * (per_group if aliases else 2 * per_group)
        for group, words in (("synonym", aliases), ("described", described)):
            asked += [(group, words[i % len(words)]) for i in range(per_group if words else 0)]
        prompts = [
            replace(self._forget(rng, word, held_out=True, pairs=False)[0], group=group) for group, word in asked
        ]
        if kind in ("object", "character"):
            neighbours = [n for n in self.preserve if n != self.concept.anchor] or list(self.preserve)
            for i in range(per_group):
                relation, things = self._beside(rng, neighbours[i % len(neighbours)])
                attribute, place, style = self._context(rng, self.name, True)
                said = relation.format(subject(self.concept.name, attribute if kind == "object" else None))
                prompts.append(self._held_out(rng, "two-object", said, things, None, place, style))
        if self.concept.within is not None:
            for group in ("same thing", "same look"):
                prompts += [self._near(rng, group, held_out=True) for _ in range(per_group)]
        names = list(self.preserve)
        for i in range(per_group):
            # Every preserved concept in turn, so that none is left to chance.
            thing = names[i % len(names)]
            attribute, place, style = self._context(rng, thing, True)
            said = subject(rng.choice(self.preserve[thing]), attribute)
            coloured = attribute if thing in v.objects else None
            prompts.append(self._held_out(rng, "preserved", said, (thing,), coloured, place, style))
        return prompts

    def leak_prompts(self, per_group: int, neighbours: Sequence[str] = ()) -> list[Prompt]:
        """Held-out prompts of what a verdict does not rest on, but a table of methods shows.

        neighbours: names of the nearest things (of a style or an attribute: the nearest of its kind) that must stay.
        Groups: misspelt; for a word of two meanings (orange, the fruit and the colour) ambiguous, which says both, and
        other meaning, which must stay; neighbour thing, style or attribute.
        """
        rng = random.Random(f"leaks {self.seed}")
        v, kind = self.vocabulary, self.concept.kind
        prompts: list[Prompt] = []
        slips = [s for s in (misspell(self.concept.name, rng) for _ in range(per_group)) if s != self.concept.name]
        for slip in slips:
            prompts.append(replace(self._forget(rng, slip, held_out=True, pairs=False)[0], group="misspelt"))
        if kind == "object" and self.name in v.attributes:
            for i in range(per_group):
                _, place, style = self._context(rng, self.name, True)
                said = subject(self.concept.name, self.name)
                prompts.append(self._held_out(rng, "ambiguous", said, (self.name,), self.name, place, style))
                things = [n for n in self.preserve if n in v.objects] or list(self.preserve)
                thing = things[i % len(things)]
                said = subject(rng.choice(self.preserve[thing]), self.name)
                _, place, style = self._context(rng, thing, True)
                prompts.append(self._held_out(rng, "other meaning", said, (thing,), self.name, place, style))
        for i in range(per_group if neighbours else 0):
            near = neighbours[i % len(neighbours)]
            thing = near if near in self.preserve else rng.choice([n for n in self.preserve if n in v.objects])
            attribute, place, style = self._context(rng, thing, True)
            attribute, style = (near if kind == "attribute" else attribute), (near if kind == "style" else style)
            said = subject(rng.choice(self.preserve[thing]), attribute)
            coloured = attribute if thing in v.objects else None
            group = f"neighbour {kind if kind in ('style', 'attribute') else 'thing'}"
            prompts.append(self._held_out(rng, group, said, (thing,), coloured, place, style))
        return prompts

    def style_prompts(self, per_group: int) -> list[Prompt]:
        """Held-out prompts of what must stay in each style that must stay, group "styles"."""
        rng = random.Random(f"styles {self.seed}")
        v = self.vocabulary
        styles = [s for s in v.styles if s != v.neutral_style and ("style", s) not in self._gone]
        cells = [(n, s) for s in styles for n in self.preserve if not self._forgotten(n, style=s)]
        prompts = []
        for _ in range(per_group if cells else 0):
            thing, style = rng.choice(cells)
            said = article(rng.choice(self.preserve[thing]))
            prompts.append(self._held_out(rng, "styles", said, (thing,), None, None, style))
        return prompts

    def _held_out(
        self,
        rng: random.Random,
        group: str,
        said: str,
        things: tuple[str, ...],
        attribute: str | None,
        place: str | None,
        style: str | None,
    ) -> Prompt:
        """A subject in a held-out sentence."""
        phrase, suffix = self._style(rng, style)
        there = rng.choice(self.vocabulary.places[place]) if place else ""
        template = rng.choice(self.vocabulary.held_out_templates)
        return Prompt(
            sentence(template, s=said, p=there, style=phrase, suffix=suffix), group, things, attribute, place, style
        )
