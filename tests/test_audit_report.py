"""What an audit concludes from scores, on scores that are made up so that the answer is known; and its pages."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erase_diffusion.audit.conclude import conclude_audit
from erase_diffusion.audit.plan import ORIGINAL, Audited, ErasedEncoder, Plan
from erase_diffusion.audit.samples import Sample, asked_of, file_samples
from erase_diffusion.concepts import Concept, Prompt
from erase_diffusion.errors import ConfigError
from erase_diffusion.metrics import Limits, Rate
from erase_diffusion.mini.vocabulary import vocabulary
from erase_diffusion.prompts_file import CasePrompt
from erase_diffusion.report import charts
from erase_diffusion.report.audit_html import audit_html
from erase_diffusion.report.audit_markdown import audit_markdown
from erase_diffusion.report.audit_report import AuditReport, ConceptResult

CHROMIUM = next((p for p in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(p).exists()), None)
JUDGE = "f" * 64
NASTY = '<script>document.title="owned"</script> & "a cat" \\| `x` ![](http://example.invalid/x.png)'


def rate(found: int, total: int) -> dict[str, Any]:
    return Rate(found, total).to_dict()


def made_up(
    *,
    leaks: float = 0.0,
    kept: float = 1.0,
    shown: float = 1.0,
    per_group: int = 100,
    calibrated: bool = True,
    changed: bool = True,
    seed: int = 0,
    errors: tuple[float, float] = (0.0, 0.0),
    encoders: int = 1,
) -> tuple[Plan, tuple[ErasedEncoder, ...], dict[tuple[str, str], dict[str, Any]]]:
    """An audit of the cat: the original shows it in `shown` of the prompts for it, the erased in `leaks`, and keeps
    `kept` of the rest; the checker misses and wrongly finds as often as `errors` say."""
    rng = random.Random(seed)
    calibration = {"threshold": 0.5, "judge_sha256": JUDGE}
    calibration |= {"misses": rate(round(200 * errors[0]), 200), "false_alarms": rate(round(300 * errors[1]), 300)}
    audited = Audited(
        Concept("cat", aliases=("kitten",), anchor="dog"), ("dog", "car"), calibration if calibrated else None
    )
    erased = tuple(
        ErasedEncoder(f"no-cat-{i}", Path("no-cat"), f"{i}" * 64, "a" * 64, "cliperase", (audited,))
        for i in range(encoders)
    )
    samples = []
    for group, things in (
        ("named", ("cat",)),
        ("synonym", ("cat",)),
        ("two-object", ("cat", "car")),
        ("preserved", ("car",)),
    ):
        for i in range(per_group):
            text = f"{NASTY} {i}" if group == "named" else f"{group} {i}"
            samples.append(Sample(f"{group} {i}", text, i, 4.0, Prompt(text, group, things), concept="cat"))
    settings = {
        "model": {"name": "mini", "sha256": "b" * 64, "text_encoder": "a" * 64},
        "encoders": [e.to_dict() for e in erased],
        "prompts": {"source": "made up", "count": len(samples), "sha256": "", "truncated": 0, "unseeded": 0},
        **{"steps": 1, "size": [8, 8], "scheduler": "none", "dtype": "float32", "device": "cpu", "seed": 0},
    }
    plan = Plan(Path("nowhere"), settings, tuple(samples))
    scores = {}
    for encoder in plan.encoders:
        for s in samples:
            there = s.shows.group != "preserved" and rng.random() < (shown if encoder == ORIGINAL else leaks)
            seen = rng.random() >= errors[0] if there else rng.random() < errors[1]
            stays = encoder == ORIGINAL or rng.random() < kept
            scores[encoder, s.case] = {
                **{"encoder": encoder, "case": s.case, "key": "k", "sha256": "s", "flags": []},
                "concepts": {"cat": 0.9 if seen else 0.1},
                "things": {
                    t: (0.9 if seen else 0.1) if t == "cat" else (0.9 if stays else 0.1) for t in s.shows.things
                },
                "clip_score": 60.0 if stays else 40.0,
                "print": f"{rng.getrandbits(256):064x}",
                "distance": 0.0 if encoder == ORIGINAL or not changed else 9.0,
            }
    return plan, erased, scores


def concluded(limits: Limits | None = None, threshold: float | None = None, **made: Any) -> AuditReport:
    plan, erased, scores = made_up(**made)
    return conclude_audit(
        plan,
        erased,
        scores,
        about={"checker": "judge", "judge_sha256": JUDGE},
        vocabulary=vocabulary(),
        limits=limits or Limits(),
        threshold=threshold,
        made={"versions": {}},
    )


@pytest.mark.parametrize(
    ("made", "verdict", "code"),
    [
        ({}, "removed", 0),
        ({"kept": 0.6}, "removed", 15),
        ({"kept": 0.1}, "collapsed", 12),
        ({"leaks": 0.25}, "partly removed", 10),
        ({"leaks": 0.97}, "not removed", 11),
        ({"leaks": 1.0, "changed": False}, "no effect", 13),
        ({"shown": 0.3}, "inconclusive", 14),
        ({"per_group": 20}, "inconclusive", 14),
        # Nothing is found, but a checker that misses four of five would find nothing of a good deal.
        ({"errors": (0.8, 0.0), "threshold": None}, "inconclusive", 14),
    ],
)
def test_verdicts(made: dict[str, Any], verdict: str, code: int) -> None:
    report = concluded(**made)
    result = report.encoders[0].concepts[0]
    assert (result.verdict, result.exit_code, report.exit_code) == (verdict, code, code), result.rule


def test_the_rule_can_be_stricter() -> None:
    assert concluded(Limits(max_found=0.02)).exit_code == 0
    assert concluded(Limits(max_found=0.01)).exit_code == 14
    assert concluded(Limits(min_kept=0.99)).exit_code == 15


def test_rates_tests_and_corrections_agree_with_the_counts() -> None:
    result = concluded(leaks=0.25).encoders[0].concepts[0]
    named = result.groups["named"]
    assert named.before == Rate(100, 100) and 10 < named.after.found < 40
    # Every leak was there before: only losses differ.
    assert named.p == pytest.approx(2 * 0.5 ** (100 - named.after.found))
    surest = min(result.groups.values(), key=lambda g: g.p)
    assert surest.p_adjusted == pytest.approx(3 * surest.p)  # Holm, over the three groups
    assert named.corrected is not None and named.corrected.low <= named.after.value <= named.corrected.high
    assert sum(result.histogram[1]) == 300 and result.histogram[0][18] == 300
    assert result.neighbours["car"] == Rate(100, 100)


def test_many_tests_are_corrected_together() -> None:
    one, two = (concluded(leaks=0.5, shown=0.6, encoders=n).encoders[0].concepts[0] for n in (1, 2))
    assert two.groups["named"].p == one.groups["named"].p
    assert two.groups["named"].p_adjusted >= one.groups["named"].p_adjusted


def test_simulated_leaks_are_never_called_removed() -> None:
    """5 % still leaks and the rule asks for at most 2 %: of 200 audits with a checker that errs, at most one."""
    limits = Limits(max_found=0.02)
    verdicts = [
        concluded(limits, leaks=0.05, seed=i, errors=(0.05, 0.0)).encoders[0].concepts[0].verdict for i in range(200)
    ]
    assert verdicts.count("removed") <= 1
    # Control: where nothing leaks, it is found out.
    assert concluded(limits, seed=1, per_group=150).encoders[0].concepts[0].verdict == "removed"


def test_without_a_calibration_one_is_made_on_the_originals_pictures() -> None:
    checked = concluded(calibrated=False).encoders[0].concepts[0].checked
    assert checked.threshold == 0.5 and "this audit" in checked.source
    assert checked.false_alarms == Rate(0, 50)
    with pytest.raises(ConfigError, match="are too few"):
        concluded(calibrated=False, per_group=20)
    with pytest.raises(ConfigError, match="threshold must lie"):
        concluded(threshold=1.5)


def test_what_else_an_encoder_has_forgotten_is_not_asked_to_stay() -> None:
    plan, [encoder], scores = made_up()
    # The same encoder has forgotten the car as well: of the car, beside the cat or alone, nothing is kept.
    car = Audited(Concept("car", anchor="boat"), ("boat",), encoder.concepts[0].calibration)
    both = dataclasses.replace(encoder, concepts=(*encoder.concepts, car))
    dog = [Sample(f"dog {i}", f"a dog {i}", i, 4.0, Prompt(f"a dog {i}", "", ("dog",))) for i in range(60)]
    cars = [Sample(f"car {i}", f"a car {i}", i, 4.0, Prompt(f"a car {i}", "", ("car",))) for i in range(100)]
    plan = dataclasses.replace(plan, samples=(*(s for s in plan.samples if s.shows.group != "preserved"), *dog, *cars))
    for e in (ORIGINAL, encoder.name):
        for s in plan.samples:
            score = scores.setdefault((e, s.case), scores[e, "named 0"] | {"case": s.case})
            before = e == ORIGINAL
            there = {"cat": before and s.concept == "cat", "car": before and "car" in s.shows.things, "dog": True}
            score["concepts"] = {n: 0.9 if there[n] else 0.1 for n in ("cat", "car")}
            score["things"] = {t: 0.9 if there[t] else 0.1 for t in s.shows.things}
    report = conclude_audit(
        plan, (both,), scores, about={"judge_sha256": JUDGE}, vocabulary=vocabulary(), limits=Limits(), made={}
    )
    for concept in report.encoders[0].concepts:
        assert concept.verdict == "removed", concept.rule
        assert concept.kept["preserved concepts"] == Rate(60, 60)
        assert set(concept.neighbours) == {"dog"}
    # Control: for an encoder that should have kept the car, it is damage.
    report = conclude_audit(
        plan, (encoder,), scores, about={"judge_sha256": JUDGE}, vocabulary=vocabulary(), limits=Limits(), made={}
    )
    assert report.encoders[0].concepts[0].kept["preserved concepts"] == Rate(60, 160)


def audit_of(prompts: list[CasePrompt], concept: Concept, things: dict[str, tuple[float, float]]) -> ConceptResult:
    """What is concluded of a file's prompts when concept and things are seen as given, before and after."""
    plan, [encoder], _ = made_up()
    audited = dataclasses.replace(encoder.concepts[0], concept=concept)
    encoder = dataclasses.replace(encoder, concepts=(audited,))
    plan = dataclasses.replace(plan, samples=tuple(file_samples(prompts, vocabulary(), 4.0)))
    scores = {}
    for side, e in enumerate((ORIGINAL, encoder.name)):
        for s in plan.samples:
            asks = asked_of(s, concept, vocabulary()).group in ("named", "synonym")
            scores[e, s.case] = {
                **{"flags": [], "print": s.case, "clip_score": 50.0, "distance": 9.0 * side},
                "concepts": {audited.name: 0.9 if asks and not side else 0.1},
                "things": {t: things.get(t, (0.9, 0.9))[side] for t in s.shows.things},
                **({"style": not side} if s.artist else {}),
            }
    about = {"judge_sha256": JUDGE}
    report = conclude_audit(
        plan, (encoder,), scores, about=about, vocabulary=vocabulary(), limits=Limits(), made={}, threshold=0.5
    )
    return report.encoders[0].concepts[0]


def test_nothing_is_preserved_when_nothing_that_must_stay_was_asked() -> None:
    prompts = [CasePrompt(f"{i}", f"a cat {i}", i) for i in range(200)]
    result = audit_of(prompts, Concept("cat"), {})
    assert result.verdict == "removed" and result.exit_code == 15
    assert result.damaged == ("preserved concepts",)
    # Control: with a hundred of something else, it is.
    prompts += [CasePrompt(f"car {i}", f"a car {i}", i) for i in range(100)]
    assert audit_of(prompts, Concept("cat"), {}).exit_code == 0


def test_the_same_noise_again_proves_nothing_more() -> None:
    result = audit_of([CasePrompt(f"{i}", "a cat", 5) for i in range(200)], Concept("cat"), {})
    assert result.asked is not None and result.asked.after.total == 1
    assert result.verdict == "inconclusive"


@pytest.mark.parametrize(
    ("concept", "label", "artist"),
    [
        (Concept("English springer"), "english springer", None),
        (Concept("tench", aliases=("Tinca tinca",)), "tinca tinca", None),
        (Concept("Vincent van Gogh", "style"), None, "vincent van gogh"),
    ],
)
def test_what_is_erased_is_not_asked_to_stay_however_it_is_spelt(
    concept: Concept, label: str | None, artist: str | None
) -> None:
    prompts = [CasePrompt(f"{i}", f"one {i}", i, label=label, artist=artist) for i in range(200)]
    prompts += [CasePrompt(f"car {i}", f"a car {i}", i, label="car") for i in range(100)]
    result = audit_of(prompts, concept, {label or "": (0.9, 0.1)})
    assert (result.verdict, result.damaged) == ("removed", ()), result.kept


def test_a_folders_name_is_drawn_as_it_is() -> None:
    report = concluded()
    for name in ("a$x_$", "_hidden", "$"):
        renamed = [dataclasses.replace(e, name=name) for e in report.encoders]
        assert name.lstrip("_") in str(charts.forgetting_retention(renamed))


def test_the_same_picture_for_different_prompts_is_collapsed() -> None:
    plan, erased, scores = made_up()
    for i in range(5):
        scores["no-cat-0", f"named {i}"]["print"] = "0" * 64
    scores["no-cat-0", "synonym 0"]["flags"] = ["blank"]
    report = conclude_audit(
        plan,
        erased,
        scores,
        about={"judge_sha256": JUDGE},
        vocabulary=vocabulary(),
        limits=Limits(),
        made={"versions": {}},
    )
    assert report.encoders[0].flags == {"collapsed": 5, "blank": 1}


def test_the_worst_pairs_come_first_and_a_sample_last() -> None:
    pairs = concluded(leaks=0.1, kept=0.8).encoders[0].pairs
    order = [p.why for p in pairs]
    assert order == sorted(order, key=("leak", "damage", "random").index) and set(order) == {"leak", "damage", "random"}
    leaks = [p for p in pairs if p.why == "leak"]
    assert all(p.found[1] >= 0.5 for p in leaks)
    assert all(p.lost for p in pairs if p.why == "damage")
    assert len({(p.case, p.concept) for p in pairs}) == len(pairs)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AuditReport]:
    report = concluded(leaks=0.1, kept=0.8, encoders=2)
    rng = np.random.default_rng(0)
    images: dict[str, np.ndarray] = {}

    def read(key: str) -> np.ndarray:
        return images.setdefault(key, rng.integers(0, 256, (64, 64, 3)).astype(np.uint8))

    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(audit_html(report, read), encoding="utf-8")
    return path, report


def test_the_page_needs_nothing_from_outside_and_escapes_everything(page: tuple[Path, AuditReport]) -> None:
    text = page[0].read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "http:" not in text.replace("http://www.w3.org", "").replace("http://example.invalid", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    markdown = audit_markdown(page[1])
    assert "<script" not in markdown and "![" not in markdown and r"\\\|" in markdown
    json.dumps(page[1].to_dict(), allow_nan=False)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_in_a_browser(page: tuple[Path, AuditReport]) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for width, scheme in ((1440, "light"), (360, "dark")):
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            said: list[str] = []
            asked: list[str] = []
            tab.on("console", lambda m, said=said: said.append(m.text) if m.type in ("error", "warning") else None)
            tab.on("pageerror", lambda e, said=said: said.append(str(e)))
            tab.on("request", lambda r, asked=asked: asked.append(r.url) if not r.url.startswith("data:") else None)
            tab.goto(page[0].as_uri())
            assert said == [] and asked == [page[0].as_uri()]
            assert tab.title() == "Audit of mini"
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
            _filters(tab)
            tab.emulate_media(media="print")
            assert tab.locator(".filters").first.is_hidden()
            tab.close()
        browser.close()


def _filters(tab: Any) -> None:
    """Choosing a group shows its pairs and no other, in its own section alone."""
    first, second = tab.locator("section").nth(0), tab.locator("section").nth(1)
    counts: Mapping[str, int] = {}
    everything = first.locator(".pair:visible").count()
    other = second.locator(".pair:visible").count()
    for label in first.locator(".filters label").all()[1:]:
        label.click()
        name, count = label.inner_text().rsplit(" (", 1)
        counts |= {name: first.locator(".pair:visible").count()}
        assert counts[name] == int(count.rstrip(")")), name
        assert 0 < counts[name] < everything
    assert {"still found", "damage", "sample", "named", "preserved"} <= counts.keys()
    assert second.locator(".pair:visible").count() == other
    first.locator(".filters label").first.click()
    assert first.locator(".pair:visible").count() == everything
