"""Chosen latents as a method of a comparison, and their control."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dspa.evaluate.compare.methods import CONTROLS, Method, controls_of
from dspa.steering.latent_sets import LatentSet
from dspa.steering.latents import LatentSteering
from dspa.testing import D_SAE_OUT, L_OUT

STRENGTHS = {3: 4.0, 40: -2.0, 77: None}


def test_settings_are_all_that_it_does(sae_out: Any, sae_in: Any) -> None:
    method = Method.latents(sae_out, STRENGTHS)
    assert method.name == "latents 3+4, 40-2, 77 removed" and method.settings["layers"] == [L_OUT]
    others = [
        Method.latents(sae_in, STRENGTHS),
        Method.latents(sae_out, STRENGTHS, "all"),
        Method.latents(sae_out, STRENGTHS | {3: 4.5}),
        Method.latents(sae_out, LatentSet(STRENGTHS, "clamp")),
        Method.latents(sae_out, LatentSet(STRENGTHS, when="always")),
    ]
    assert len({method.digest, *(other.digest for other in others)}) == 6
    assert method.digest == Method.latents(sae_out, dict(reversed(STRENGTHS.items()))).digest
    with pytest.raises(ValueError, match="128; accepted"):
        Method.latents(sae_out, [128])


def test_control_gives_the_strengths_to_latents_of_similar_density(model: Any, sae_out: Any) -> None:
    method = Method.latents(sae_out, LatentSet(STRENGTHS, "clamp"), "generated")
    densities = torch.arange(D_SAE_OUT) / D_SAE_OUT
    (control,) = controls_of(method, CONTROLS, model, None, lambda _: densities, "origin")
    assert (control.kind, control.control_of, control.drawn) == ("control", method.name, True)
    assert control.name == f"{method.name}: random latents" and control.attachable is not None
    drawn = [control.attachable(seed) for seed in (1, 2, 1)]
    sets = list[dict[int, float | None]]()
    for steering in drawn:
        assert isinstance(steering, LatentSteering) and steering.positions == "generated"
        (chosen,) = steering.sets.values()
        assert (chosen.mode, chosen.when) == ("clamp", "active")
        sets.append(chosen.strengths)
    assert sets[0] == sets[2] != sets[1]
    for (latent, s), (other, same) in zip(STRENGTHS.items(), sets[0].items(), strict=True):
        assert s == same and 0 < abs(latent - other) <= 8
