"""Worlds of the tutorials: a model with two SAEs and preference triples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dspa.data.triples import Triple, load_triples
from dspa.demo.load import N_TRIPLES, World
from dspa.demo.smollm2 import world as smollm2
from dspa.demo.smollm2.preferences import REGISTER
from dspa.errors import refusal
from dspa.saes.frozen import FrozenSAE


@dataclass(frozen=True)
class TutorialWorld:
    """A model with its SAEs and preferences.

    Attributes:
        name: name of the model.
        preference: what is preferred, in a sentence.
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        sae_in: the SAE that gates.
        sae_out: the SAE whose latents are edited.
        triples: preference triples to make a map from.
        held_out: other triples, to measure with.
    """

    name: str
    preference: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    sae_in: FrozenSAE
    sae_out: FrozenSAE
    triples: list[Triple]
    held_out: list[Triple]


def load_world(name: str) -> TutorialWorld:
    """Load a world of the tutorials.

    Args:
        name: "tiny", the model of `dspa demo`, or "smollm2", that of `dspa demo smollm2`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in WORLDS:
        raise refusal(ValueError, "The world of a tutorial", repr(name), ", ".join(WORLDS))
    return WORLDS[name]()


def _tiny() -> TutorialWorld:
    world = World()
    triples = list(load_triples(world.triples))
    return TutorialWorld(
        "the demo's model of 0.5 M parameters",
        "A letter is formal or casual, and its answer should be in the same register.",
        world.model,
        world.tokenizer,
        world.sae_in,
        world.sae_out,
        triples[:N_TRIPLES],
        triples[N_TRIPLES:],
    )


def _smollm2() -> TutorialWorld:
    world = smollm2.World.load()
    return TutorialWorld(
        "SmolLM2-135M-Instruct",
        REGISTER.wish,
        world.model,
        world.tokenizer,
        world.sae_in,
        world.sae_out,
        list(load_triples(REGISTER.path("map"))),
        smollm2.held_out_triples(REGISTER),
    )


WORLDS: dict[str, Callable[[], TutorialWorld]] = {"tiny": _tiny, "smollm2": _smollm2}
