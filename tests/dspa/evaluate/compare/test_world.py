"""The demo's world: a preference that flips with the prompt, which DSPA follows and its controls do not."""

from __future__ import annotations

from itertools import islice

import pytest

from dspa import Comparison, Method, SteeringConfig, compare
from dspa.data.triples import load_triples
from dspa.demo import language
from dspa.demo.load import N_TRIPLES, World

DSPA, STATIC = "DSPA ablate 0.5", "Static-SAE ablate 0.5"


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    world = World()
    register = {row["prompt"]: row["register"] for row in world.held_out}

    def preferred(prompt: str, answer: str) -> float:
        wanted, total = language.count_style_words(answer, language.preferred_style(register[prompt]))
        return wanted / max(1, total)

    cdmap = world.build_map(progress=False)
    method = Method.dspa(world.sae_in, world.sae_out, cdmap, SteeringConfig(alpha=0.5))
    return compare(
        *(world.model, world.tokenizer, [row["prompt"] for row in world.held_out[:30]]),
        [method, Method.static(method)],
        held_out=islice(load_triples(world.triples), N_TRIPLES, N_TRIPLES + 30),
        counters={"preferred": preferred},
        controls=("random set", "shuffled map"),
        seeds=(0, 1),
        max_new_tokens=20,
        batch_size=30,
        progress=False,
    )


def test_dspa_is_above_its_controls_and_a_fixed_set(comparison):
    others = [*comparison.controls(DSPA), STATIC]
    assert len(others) == 3
    for other in others:
        assert comparison.gain("preferred", DSPA, other).low > 0
        assert comparison.gain("margin", DSPA).low > comparison.gain("margin", other).high
    assert comparison.recommendation.method == DSPA


def test_a_random_set_edits_as_much_or_more(comparison):
    """Else it would be a weak control: of 16 latents that are as often active, a draw can meet more tokens or fewer."""
    own, drawn = (comparison.figure("edited", name).value for name in (DSPA, f"{DSPA}: random set"))
    assert drawn > own - 0.1
