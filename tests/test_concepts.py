"""Concepts, anchors' sentences, and the separation of training from verification prompts."""

from __future__ import annotations

import dataclasses
import random

import pytest

from erase_diffusion.concepts import (
    Concept,
    Prompt,
    PromptSets,
    PromptWriter,
    article,
    asks_for,
    default_kind,
    misspell,
    normalise,
    preserved,
    resolve_concept,
    says,
)
from erase_diffusion.errors import ConfigError
from erase_diffusion.mini.vocabulary import vocabulary
from erase_diffusion.mini.world import is_held_out
from erase_diffusion.photographs import PHOTOGRAPHS

V = vocabulary()
CONCEPTS = [
    Concept("cat", anchor="dog"),
    Concept("crayon", "style", anchor="plain"),
    Concept("Zibby", "character", anchor="house"),
    Concept("red", "attribute", anchor="blue"),
]


def writer(concept: Concept, vocabulary=V, seed: int = 0) -> PromptWriter:
    resolved = resolve_concept(concept, vocabulary)
    return PromptWriter(resolved, vocabulary, preserved(resolved, vocabulary), seed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "empty"),
        (("   ",), "empty"),
        (("x" * 61,), "61 characters"),
        (("cat\x00",), "printable"),
        (("!!!",), "letter"),
        (("cat", "animal"), "got 'animal'"),
        (("cat", "object", ("",)), "alias is empty"),
        (("cat", "object", ("kitten",), "Kitten"), "is the concept itself"),
    ],
)
def test_bad_concepts_are_refused_with_the_value(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Concept(*arguments)  # type: ignore[arg-type]


def test_known_synonyms_become_aliases() -> None:
    assert set(resolve_concept(Concept("cat"), V).aliases) == {"kitten", "kitty"}
    assert set(resolve_concept(Concept("kitten", aliases=("tabby",)), V).words) == {"kitten", "tabby", "cat", "kitty"}
    assert resolve_concept(Concept("unicorn"), V).aliases == ()


def test_a_word_of_another_kind_says_which() -> None:
    with pytest.raises(ConfigError, match="known as a style, not an object; pass --kind style"):
        resolve_concept(Concept("crayon"), V)
    assert resolve_concept(Concept("orange", "attribute"), V).name == "orange"  # a fruit, and a colour too


def test_a_concept_cannot_be_preserved_as_well() -> None:
    concept = resolve_concept(Concept("cat"), V)
    with pytest.raises(ConfigError, match="'kitty' is both"):
        preserved(concept, V, ["dog", "kitty"])
    assert "cat" not in preserved(concept, V)
    assert "dog" in preserved(concept, V)


@pytest.mark.parametrize("concept", CONCEPTS, ids=lambda c: c.name)
def test_every_forget_prompt_names_the_concept_and_no_retain_prompt_does(concept: Concept) -> None:
    w = writer(concept)
    sets = w.training_sets(200, 300)
    # “An orange cat” names no orange: words are compared as the concept's own phrases.
    words = [normalise(x) for x in w.concept.words] + [normalise(s) for s in V.style_suffixes.get(w.name, ())]
    words += [normalise(s) for s in V.styles.get(w.name, ())]
    for prompt, anchor in (*sets.forget, *sets.forget_held_out):
        assert any(x in normalise(prompt) for x in words), prompt
        assert not any(x in normalise(anchor).split() for x in words), anchor
    for prompt in (*sets.retain, *sets.retain_held_out):
        assert not any(x in normalise(prompt).split() for x in words), prompt
    assert sets.retain[0] == ""
    assert len(sets.forget) > 100
    assert len(sets.retain) > 200


@pytest.mark.parametrize("vocab", [V, PHOTOGRAPHS], ids=["mini", "photographs"])
def test_verification_never_asks_what_was_trained_on(vocab) -> None:
    assert not set(vocab.templates) & set(vocab.held_out_templates)
    w = writer(Concept("cat", anchor="dog"), vocab)
    sets = w.training_sets(320, 640)
    trained = {p for p, _ in (*sets.forget, *sets.forget_held_out)} | set(sets.retain) | set(sets.retain_held_out)
    asked = {p.text for p in w.verification_prompts(48)}
    assert not trained & asked


def test_held_out_prompts_are_not_trained_on() -> None:
    sets = writer(CONCEPTS[0]).training_sets(200, 300)
    assert not {p for p, _ in sets.forget} & {p for p, _ in sets.forget_held_out}
    assert not set(sets.retain) & set(sets.retain_held_out)


def test_the_anchor_prompt_is_the_same_sentence_with_the_word_replaced() -> None:
    w = writer(Concept("cat", anchor="dog"))
    pairs = dict(w.training_sets(200, 50).forget)
    for prompt, anchor in pairs.items():
        replaced = normalise(prompt)
        for word in ("kitten", "kitty", "cat"):
            replaced = replaced.replace(word, "dog")
        assert replaced == normalise(anchor)


def test_verification_groups_say_what_a_true_picture_shows() -> None:
    prompts = writer(Concept("cat", anchor="dog")).verification_prompts(12)
    groups = {p.group for p in prompts}
    assert groups == {"named", "synonym", "described", "two-object", "preserved"}
    for p in prompts:
        if p.group in ("named", "two-object"):
            assert "cat" in p.text
        if p.group == "described":
            assert not {"cat", "kitten", "kitty"} & set(p.text.split())
        if p.group == "two-object":
            assert len(p.things) == 2
        if p.group == "preserved":
            assert "cat" not in p.things
        if p.attribute:
            assert p.attribute in p.text


def test_prompts_are_deterministic_in_the_seed() -> None:
    concept = CONCEPTS[0]
    assert writer(concept).training_sets(50, 50) == writer(concept).training_sets(50, 50)
    assert writer(concept).training_sets(50, 50) != writer(concept, seed=1).training_sets(50, 50)


@pytest.mark.parametrize("concept", CONCEPTS, ids=lambda c: c.name)
def test_calibration_prompts_of_each_sort(concept: Concept) -> None:
    named, others, empty = writer(concept).calibration_prompts(10)
    assert len(named) == len(others) == len(empty) == 10
    assert not any(says(p, concept.name) for p in (*others, *empty))


@pytest.mark.parametrize("concept", CONCEPTS, ids=lambda c: c.name)
def test_what_is_erased_is_not_asked_to_stay(concept: Concept) -> None:
    prompts = writer(concept).verification_prompts(24)
    for p in prompts:
        if p.group != "two-object":
            assert concept.name not in (p.style, p.attribute)
    # Control: what stands around it is.
    assert any(p.attribute for p in prompts)
    assert any(p.place for p in prompts)


def test_what_goes_at_the_same_time_is_not_asked_to_stay_either() -> None:
    crayon, red = Concept("crayon", "style"), Concept("red", "attribute")
    alone = writer(CONCEPTS[0])
    both = PromptWriter(alone.concept, V, alone.preserve, 0, (crayon, red))
    for w, expected in ((alone, True), (both, False)):
        asked = [*w.verification_prompts(48), *(Prompt(p, "") for _, p in w.training_sets(200, 200).forget)]
        said = " ".join(p.text for p in asked)
        assert says(said, "crayon") is expected
        assert says(said, "red") is expected


def test_training_and_verification_use_their_side_of_the_combinations() -> None:
    w = writer(CONCEPTS[0])
    cells = [(p.things[0], p.attribute, p.place) for p in w.verification_prompts(48) if p.attribute and p.place]
    assert len(cells) > 20
    assert all(is_held_out(*cell) for cell in cells)
    for prompt, _ in w.training_sets(200, 10).forget:
        for colour in V.attributes:
            for place, phrases in V.places.items():
                if f"{colour} cat" in prompt and any(prompt.endswith(x) for x in phrases) and "left" not in prompt:
                    assert not is_held_out("cat", colour, place) or " and " in prompt or "next" in prompt, prompt


def test_a_concept_without_alias_is_asked_twice_as_often() -> None:
    def asked(concept: Concept) -> int:
        return sum(p.group in ("named", "synonym") for p in writer(concept).verification_prompts(24))

    assert asked(Concept("apple", anchor="orange")) == asked(Concept("cat", anchor="dog")) == 48


def test_preserved_words_are_found_in_the_vocabulary() -> None:
    concept = resolve_concept(Concept("cat"), V)
    assert preserved(concept, V, ["Automobile", "dog"]) == {"car": V.objects["car"], "dog": V.objects["dog"]}
    assert "car" in preserved(concept, V, ["watercolour"])  # a style is held in any case
    assert preserved(concept, V, ["unicorn"]) == {"unicorn": ("unicorn",)}
    assert "dog" not in preserved(concept, V, (), ["dog"])
    with pytest.raises(ConfigError, match="empty"):
        preserved(concept, V, [""])


def test_a_known_word_is_spelt_as_the_vocabulary_does() -> None:
    assert resolve_concept(Concept("CAT"), V).name == "cat"
    assert resolve_concept(Concept("zibby", "character"), V).name == "Zibby"
    assert resolve_concept(Concept("Godzilla", "character"), V).name == "Godzilla"


def test_sets_must_not_be_empty() -> None:
    with pytest.raises(ConfigError, match="got 0 and 1"):
        PromptSets((), ("",))
    with pytest.raises(ConfigError, match="no anchor"):
        PromptWriter(Concept("cat"), V, {"dog": ("dog",)})
    with pytest.raises(ConfigError, match="nothing is left"):
        PromptWriter(dataclasses.replace(Concept("cat"), anchor="dog"), V, {})


def test_article() -> None:
    assert [article(w) for w in ("cat", "apple", "Zibby", "the moon wizard")] == [
        "a cat",
        "an apple",
        "Zibby",
        "the moon wizard",
    ]


RED_CAT = dataclasses.replace(Concept("red", "attribute", anchor="pink"), within="cat")
CRAYON_CAT = dataclasses.replace(Concept("crayon", "style", anchor="plain"), within="cat")


@pytest.mark.parametrize("concept", [RED_CAT, CRAYON_CAT], ids=["red cats", "crayon cats"])
def test_within_a_thing_only_that_look_of_that_thing_is_forgotten(concept: Concept) -> None:
    w = writer(concept)
    sets = w.training_sets(80, 400)
    cats = V.objects["cat"]
    look = "red" if concept is RED_CAT else "crayon"
    assert all(any(says(p, c) for c in cats) for p, _ in sets.forget)
    assert all(look in p or concept is CRAYON_CAT for p, _ in sets.forget)
    assert asks_for(f"a {look} cat", w.concept)
    assert not asks_for(f"a {look} car", w.concept)
    same_look = [p for p in sets.retain if says(p, look)]
    same_thing = [p for p in sets.retain if any(says(p, c) for c in cats)]
    assert len(same_look) > 20
    assert len(same_thing) > 20
    for p in same_look:
        for c in cats:
            assert f"{look} {c}" not in p
            assert look == "red" or not says(p, c), p
    groups = {p.group for p in w.verification_prompts(20)}
    assert {"named", "same thing", "same look", "preserved"} <= groups
    for p in w.verification_prompts(20):
        if p.group == "same look":
            assert "cat" not in p.things
            assert look in (p.attribute, p.style)
        if p.group == "same thing":
            assert p.things == ("cat",)
            assert look not in (p.attribute, p.style)


def test_only_a_look_can_be_erased_within_a_thing() -> None:
    with pytest.raises(ConfigError, match=r"only an attribute or a style.*'dog' is an object"):
        Concept("dog", within="cat")
    with pytest.raises(ConfigError, match=r"'crayon' is known as a style"):
        resolve_concept(Concept("red", "attribute", within="crayon"), V)
    assert resolve_concept(Concept("red", "attribute", within="kitten"), V).within == "cat"


def test_an_unknown_look_cannot_be_erased_within_a_thing() -> None:
    with pytest.raises(ConfigError, match=r"'oil' is no style that the model's vocabulary holds.*crayon, blueprint"):
        resolve_concept(Concept("oil", "style", within="cat"), V)
    with pytest.raises(ConfigError, match="'crayon' is known as a style, not an attribute; pass --kind style"):
        resolve_concept(Concept("crayon", "attribute", within="cat"), V)
    assert default_kind("crayon", "cat", V) == "style"
    assert default_kind("red", "cat", V) == "attribute"
    assert default_kind("crayon", None, V) == "object"


def test_leaks_are_asked_beside_the_verdict() -> None:
    prompts = writer(Concept("cat", anchor="dog")).leak_prompts(20, ["dog", "rabbit"])
    groups: dict[str, list[Prompt]] = {}
    for p in prompts:
        groups.setdefault(p.group, []).append(p)
    assert set(groups) == {"misspelt", "neighbour thing"}
    assert all(not says(p.text, "cat") and p.things == ("cat",) for p in groups["misspelt"])
    assert {t for p in groups["neighbour thing"] for t in p.things} == {"dog", "rabbit"}
    # “orange” is a fruit and a colour: the one is asked for beside the other, which must stay.
    prompts = writer(Concept("orange", anchor="apple")).leak_prompts(20, ["apple"])
    ambiguous = [p for p in prompts if p.group == "ambiguous"]
    other = [p for p in prompts if p.group == "other meaning"]
    assert len(ambiguous) == len(other) == 20
    assert all("orange orange" in p.text and p.things == ("orange",) for p in ambiguous)
    assert all(says(p.text, "orange") and p.attribute == "orange" and "orange" not in p.things for p in other)
    styles = writer(Concept("crayon", "style", anchor="plain")).leak_prompts(10, ["blueprint"])
    assert {p.style for p in styles if p.group == "neighbour style"} == {"blueprint"}


@pytest.mark.parametrize("word", ["cat", "umbrella", "dog"])
def test_a_misspelt_word_is_one_slip_away(word: str) -> None:
    rng = random.Random(0)
    slips = {misspell(word, rng) for _ in range(50)} - {word}
    assert slips
    assert all(sorted(s) == sorted(word) or abs(len(s) - len(word)) == 1 for s in slips)
    assert misspell("ox", rng) == "ox"


def test_classes_are_the_concept_and_what_stays_of_its_kind() -> None:
    cat = writer(Concept("cat", anchor="dog")).training_sets(20, 20)
    assert cat.forget_classes == ("a cat",)
    assert "a dog" in cat.retain_classes and "a cat" not in cat.retain_classes
    assert not cat.near
    red = writer(Concept("red", "attribute", anchor="blue", within="cat")).training_sets(20, 20)
    assert red.forget_classes == ("a red cat",)
    assert {"a blue cat", "a red dog"} <= set(red.retain_classes)
    assert red.near
