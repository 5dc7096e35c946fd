"""Counters and axes of style, on texts that were counted by hand."""

from __future__ import annotations

import json
from importlib.resources import files
from math import tanh
from pathlib import Path

import pytest

from dspa.evaluate.style import TYPOGRAPHIC, style_axes, style_counters

LETTER = """Dear Sir,

thank you for your well-written letter. However, I don't think that it's finished! Could you perhaps send the rest?

1. The table
2. John's map, e.g. of Rome

**Summary**
Thanks!!"""
# 3 words in a sentence without "Dear Sir"; the lines: Dear Sir, (2) / thank you for your well-written letter. (6)
# However, I don't think that it's finished! (7) Could you perhaps send the rest? (6) / The table (2 and the number 1)
# / John's map, e.g. (3 and the letter g, and the number 2) of Rome (2) / Summary (1) / Thanks!! (1)
WORDS = 2 + 6 + 7 + 6 + 3 + 5 + 2 + 1 + 1
COUNTS = {
    "words": WORDS,
    # The abbreviation ends one.
    "sentences": 9,
    "paragraphs": 4,
    "words per sentence": WORDS / 9,
    "list items": 2,
    "headings": 1,
    "bold": 1,
    "exclamations": 100 * 2 / WORDS,
    "questions": 100 * 1 / WORDS,
    "emoji": 0,
    # don't, it's
    "contractions": 100 * 2 / WORDS,
    "first person": 100 * 1 / WORDS,
    # you, your, you
    "second person": 100 * 3 / WORDS,
    # could, perhaps
    "hedges": 100 * 2 / WORDS,
    "boosters": 0,
    # thank you, thanks
    "politeness": 100 * 2 / WORDS,
    # Dear Sir, however
    "formal": 100 * 2 / WORDS,
    "informal": 0,
    "commands": 0,
    # "Dear Sir" is no warmth.
    "feelings": 0,
    "sequence": 0,
    "offers": 0,
    # however
    "caveats": 100 * 1 / WORDS,
    "imagery": 0,
    "numbers": 0,
    "literal": 0,
}


def counts(text: str) -> dict[str, float]:
    return {name: counter("", text) for name, counter in style_counters().items()}


def test_a_letter():
    assert counts(LETTER) == pytest.approx(COUNTS)


def test_a_casual_text():
    text = "Hey guys, that's pretty much it 😀😀 I think we're okay... Of course!".replace("'", TYPOGRAPHIC)
    words = 12
    made = counts(text)
    # hey, guys, pretty much, okay; a typographic apostrophe is one.
    expected = {
        "words": words,
        "sentences": 2,
        "emoji": 2,
        "informal": 400 / words,
        "contractions": 200 / words,
        "hedges": 100 / words,
        "boosters": 100 / words,
        # I, we're
        "first person": 200 / words,
        "formal": 0,
    }
    assert {name: made[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", " \n\n ", "...", "😀"])
def test_texts_without_words_have_no_rates(text: str):
    made = counts(text)
    assert made["words"] == made["sentences"] == made["words per sentence"] == made["hedges"] == 0


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", 4),
        ("She said: “No.” He left.", 2),
        ("In 2020.\nPi is 3.14 today", 2),
        ("# Title\n\n1. First. Second.\n2) Third", 4),
        ("- a\n- b", 2),
    ],
)
def test_sentences(text: str, sentences: int):
    assert counts(text)["sentences"] == sentences


@pytest.mark.parametrize("text", ["a " * 20000, "-" * 40000, "**" * 20000, "\n \n" * 10000, "a!" * 20000])
def test_long_texts_take_no_time(text: str):
    """Each search has one second: it raises beyond."""
    counts(text)


def test_every_counter_says_what_it_counts():
    for counter in style_counters().values():
        assert counter.about.endswith(".") and counter.about[0].isupper()


def test_docs_have_every_counter():
    docs = (Path(__file__).parents[3] / "docs" / "compare.md").read_text()
    for name, rule in json.loads(files("dspa.evaluate").joinpath("style.json").read_text())["counters"].items():
        assert f"| `{name}` | {rule['about'].rstrip('.')} | {rule.get('per', 'answer')} |\n" in docs


def save(path: Path, counters: object, layout: str = "dspa.style.1", **others: object) -> Path:
    path.write_text(json.dumps({"format": layout, "counters": counters, **others}))
    return path


def test_rules_of_a_user(tmp_path: Path):
    rules = {
        "lines": {"about": "Lines.", "pattern": "(?m)^.+$"},
        "ships": {"about": "Ships.", "words": ["ahoy", "ahoy there", "it's"], "per": "10 lines"},
    }
    ships = style_counters(save(tmp_path / "rules.json", rules))["ships"]
    assert ships("ahoy", "Ahoy there! AHOY, ahoyed\nit\N{RIGHT SINGLE QUOTATION MARK}s\n") == 10 * 3 / 2
    assert ships.pattern.endswith(r"per 10 of (?m)^.+$")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"about": "x"}, "`pattern` and `words` is neither; accepted: one of them"),
        ({"about": "x", "pattern": "a", "words": ["b"]}, "`pattern` and `words` is both"),
        ({"about": "x", "words": []}, "words or phrases, none empty"),
        ({"about": "x", "words": [" "]}, "words or phrases, none empty"),
        ({"about": "x", "pattern": "("}, "does not compile"),
        ({"about": "x", "pattern": "a", "per": "100 moons"}, "`per` is '100 moons'; accepted: a rule without `per`"),
        ({"about": "x", "pattern": "a", "per": ""}, "`per` is ''"),
        ({"about": "x", "pattern": "a", "weight": 2}, "weight"),
        ({"pattern": "a"}, "about"),
    ],
)
def test_bad_rules(tmp_path: Path, rule: object, message: str):
    with pytest.raises(ValueError, match=r"rules\.json") as error:
        style_counters(save(tmp_path / "rules.json", {"mine": rule}))
    assert message in str(error.value)


def test_a_file_of_something_else(tmp_path: Path):
    with pytest.raises(ValueError, match=r"`format`: 'x'|`format` is 'x'"):
        style_counters(save(tmp_path / "rules.json", {}, "x"))


# 12 words, 3 sentences. Rates are per 100 words, but for commands, of which one sentence (Wipe) has one.
TASK = "First, wash it. Wipe the chain, my friend! It may help me."
N = 12
AXES = {
    "conciseness": 1.5 - 0.01 * N - 0.02 * N / 3,
    # friend; !
    "friendliness": (0.1 * 100 + 0.1 * 100) / N,
    # Wipe; may
    "directness": 1 / 3 - 0.1 * 100 / N,
    # one paragraph; First
    "structure": -0.5 + 0.1 + 0.05 * 100 / N,
    # Wipe, First, friend; my, me
    "task": 0.5 + 0.5 / 3 + (0.1 * 100 - 0.1 * 100 - 0.05 * 200) / N,
    "proactivity": -0.8 + 0.004 * N,
    # may
    "certainty": 0.3 - 0.1 * 100 / N,
    # !
    "creativity": 0.05 * 100 / N,
}


def test_axes_of_a_text():
    assert {name: axis("", TASK) for name, axis in style_axes().items()} == pytest.approx(
        {name: tanh(value) for name, value in AXES.items()}
    )


def test_axes_of_no_text_are_their_offsets():
    made = {name: axis("", "") for name, axis in style_axes().items()}
    offsets = {"conciseness": 1.5, "structure": -0.5, "task": 0.5, "proactivity": -0.8, "certainty": 0.3}
    assert made == pytest.approx({name: tanh(offsets.get(name, 0)) for name in AXES})


@pytest.mark.parametrize(
    ("axis", "first", "second"),
    [
        ("conciseness", "Wipe the chain. Oil it.", "I will say a few more words about the chain than you asked. " * 20),
        (
            "friendliness",
            "Hey, great idea! I'm so happy to help, have fun!!",
            "Furthermore, the applicant is advised to proceed in accordance with the regulations.",
        ),
        ("directness", "Use a dry cloth. Never use water.", "Perhaps you could possibly consider a dry cloth, please."),
        ("structure", "# Plan\n\n1. **Wipe** it.\n2. Then oil it.\n3. Ride.", "You wipe it and off you go."),
        ("task", "First, clean the wall. Next, cut the wood.", "I'm so sorry, my friend. I feel with you."),
        ("proactivity", "Here are some tips. You can also oil it. Would you like another?", "Wipe it."),
        ("certainty", "It is certainly safe. It always works.", "It may work, but it depends, and I am not sure."),
        (
            "creativity",
            "Imagine a moon like a lantern over a secret sea.",
            "The data of 2 studies show 30 percent, according to the facts.",
        ),
    ],
)
def test_poles_of_axes(axis: str, first: str, second: str):
    measured = style_axes()[axis]
    assert 1 >= measured("", first) > 0.4 + measured("", second) >= -0.6


@pytest.mark.parametrize("text", ["1. Wipe it", "- **Use** water", "Well: add salt", "Please take one", "No. Don't!"])
def test_commands_begin_sentences(text: str):
    assert style_counters()["commands"]("", text) > 0


@pytest.mark.parametrize("text", ["I use it", "1. Usefulness", "a ... user"])
def test_other_verbs_are_no_commands(text: str):
    assert style_counters()["commands"]("", text) == 0


def test_numbers():
    text = "1. It takes 2.5 or 3,000 steps of H2O\n2) and 4."
    words = style_counters()["words"]("", text)
    assert style_counters()["numbers"]("", text) == pytest.approx(100 * 3 / words)


def test_docs_have_every_axis():
    docs = (Path(__file__).parents[3] / "docs" / "compare.md").read_text()
    for name, rule in json.loads(files("dspa.evaluate").joinpath("style.json").read_text())["axes"].items():
        terms = [f"{weight:+g} `{counter}`" for counter, weight in rule["weights"].items()]
        offset = [f"{rule['offset']:g}"] if "offset" in rule else []
        written = " ".join([*offset, *terms]).removeprefix("+").replace(" +", " + ").replace(" -", " - ")
        assert f"| `{name}` | {rule['about'].rstrip('.')} | {written} |\n" in docs


def test_axes_of_a_user(tmp_path: Path):
    rules = {"lines": {"about": "Lines.", "pattern": "(?m)^.+$"}}
    axes = {"tall": {"about": "Tall.", "weights": {"lines": 0.25}, "offset": -1}}
    path = save(tmp_path / "rules.json", rules, axes=axes)
    assert style_axes(path)["tall"]("", "a\nb") == pytest.approx(tanh(-0.5))
    assert [*style_counters(path)] == ["lines"]
    assert style_axes(save(tmp_path / "none.json", rules)) == {}
    assert style_axes(path)["tall"].pattern == "tanh(-1 +0.25 * ((?m)^.+$))"


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"lines": {"about": "x", "weights": {"lines": 1}}}, "`axes` is with 'lines', as a counter is"),
        ({"tall": {"about": "x", "weights": {}}}, "tall: `weights` is empty; accepted: weights of lines"),
        (
            {"tall": {"about": "x", "weights": {"moons": 1}}},
            "tall: `weights` is of 'moons'; accepted: weights of lines",
        ),
        ({"tall": {"about": "x", "weights": {"lines": "1"}}}, "a finite number"),
        ({"tall": {"weights": {"lines": 1}}}, "about"),
    ],
)
def test_bad_axes(tmp_path: Path, axes: object, message: str):
    path = save(tmp_path / "rules.json", {"lines": {"about": "Lines.", "pattern": "(?m)^.+$"}}, axes=axes)
    with pytest.raises(ValueError, match=r"rules\.json") as error:
        style_axes(path)
    assert message in str(error.value)
