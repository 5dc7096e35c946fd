"""Markers are counted as their rules say, on texts counted by hand."""

from __future__ import annotations

import pytest

from dspa.demo.smollm2 import markers

WARM = "Thank you, what a lovely idea!\n\n1. Begin.\n2) Go on.\n- Stop.\nGood luck."
OFFICIAL = "Dear Madam, I would recommend soap. Furthermore, kindly enquire. Yours sincerely,"
FRIENDLY = "hey dude, you're gonna love it!! lol"


@pytest.mark.parametrize(
    ("text", "n_warm", "n_lines"), [(WARM, 3, 3), ("Wipe it. 3 times.", 0, 0), ("Thankless, gladly", 0, 0), ("", 0, 0)]
)
def test_warmth_and_structure(text, n_warm, n_lines):
    assert (markers.count_warm(text), markers.count_list_lines(text)) == (n_warm, n_lines)
    assert markers.warm_and_structured("any prompt", text) == n_warm + n_lines


@pytest.mark.parametrize(("text", "balance"), [(OFFICIAL, 6), (FRIENDLY, -6), (f"{OFFICIAL} {FRIENDLY}", 0), ("", 0)])
def test_registers_balance(text, balance):
    assert markers.register_balance(text, "formal") == balance == -markers.register_balance(text, "casual")


def test_an_answer_that_goes_in_circles():
    assert markers.repeats("go on and " * 6) and not markers.repeats("one two three four five six seven")
    assert not markers.repeats("") and not markers.repeats("two words")
