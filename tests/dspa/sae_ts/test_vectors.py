"""Vectors of a target: the anchor of a two-dimensional world, and what each variant promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dspa.config import SteeringConfig
from dspa.errors import VectorError
from dspa.sae_ts import EffectApproximator, map_target, prompts_target, targeted_vector
from dspa.sae_ts.approximator import ApproximatorRecord
from dspa.sae_ts.settings import FitSettings
from dspa.saes.frozen import FrozenSAE
from dspa.testing import make_map, make_model, make_sae


def approximator(M: Tensor, b: Tensor, sae: str = "s") -> EffectApproximator:
    scores = {"r2": 0.5, "r2_shuffled": 0.0, "mean_alone": 0.5}
    record = ApproximatorRecord(sae, 2, 3.0, 8, 9, 1, FitSettings(), 0.0, **scores, model_name="m", model_digest="d")
    return EffectApproximator(record, M, b)


ANCHOR = approximator(torch.tensor([[3.0, 0.0], [4.0, 1.0]]), torch.tensor([0.5, -1.0]))


def test_the_published_formula() -> None:
    vector = targeted_vector(ANCHOR, {0: 1.0}, scale=7.0, positions="response")
    # M t / 5 = (0.6, 0.8) less (1.5, 1.0) / |(1.5, 1.0)| is (-0.232050, 0.245300).
    torch.testing.assert_close(vector.vector, torch.tensor([-0.687215, 0.726454]), rtol=0, atol=1e-6)
    assert (vector.layer, vector.scale, vector.positions) == (2, 7.0, "response")
    assert (vector.model_name, vector.model_digest) == ("m", "d")
    without = targeted_vector(ANCHOR, {0: 1.0}, side_effects=0.0)
    torch.testing.assert_close(without.vector, torch.tensor([0.6, 0.8]))


def test_weights_of_several_latents() -> None:
    vector = targeted_vector(ANCHOR, {0: 1.0, 1: -4.0}, side_effects=0.0)
    torch.testing.assert_close(vector.vector, torch.tensor([1.0, 0.0]))


def test_the_pseudo_inverse_has_the_nearest_effect() -> None:
    g = torch.Generator().manual_seed(0)
    M, b = torch.randn(4, 9, generator=g), torch.randn(9, generator=g)
    vector = targeted_vector(approximator(M, b), {3: 2.0}, variant="pseudo-inverse").vector.numpy()
    t = np.eye(9)[3] * 2
    wanted = (t - b.numpy()) @ np.linalg.pinv(M.numpy().astype(np.float64))
    np.testing.assert_allclose(vector, wanted / np.linalg.norm(wanted), atol=1e-5)


def test_the_rotation_of_a_rotated_decoder_is_found() -> None:
    """Where the columns of M are the decoder's rows in other coordinates, the vector is the column of the target."""
    sae = make_sae(2, 40, d_in=8, seed=1)
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(8, 8, generator=g)).Q
    M = (sae.W_dec @ Q).T * (1 + torch.rand(40, generator=g))
    made = approximator(M, torch.ones(40), sae.fingerprint)
    vector = targeted_vector(made, {5: 1.0}, variant="rotation", side_effects=0.0, sae=sae).vector
    torch.testing.assert_close(vector, torch.nn.functional.normalize(M[:, 5], dim=0), rtol=0, atol=1e-5)
    away = targeted_vector(made, {5: 1.0}, variant="rotation", sae=sae).vector
    wanted = torch.nn.functional.normalize(vector - torch.nn.functional.normalize(M.sum(dim=1), dim=0), dim=0)
    torch.testing.assert_close(away, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ({}, {}, "`target` is empty or 0"),
        ({0: 0.0}, {}, "`target` is empty or 0"),
        ({2: 1.0}, {}, "A latent of `target` is 2; accepted: 0 to 1"),
        ({-1: 1.0}, {}, "`target`"),
        ({0: float("nan")}, {}, "finite"),
        ({0: 1.0}, {"variant": "pinv"}, "`variant` is 'pinv'; accepted: targeted, pseudo-inverse, rotation"),
        ({0: 1.0}, {"variant": "rotation"}, "`sae`, for rotation, is missing"),
        ({0: 1.0}, {"variant": "rotation", "sae": make_sae(2, 2, d_in=2)}, "an SAE of fingerprint"),
        ({0: 1.0}, {"side_effects": -1.0}, "`side_effects`"),
        ({0: 1.0}, {"scale": -1.0}, "`scale`"),
    ],
)
def test_bad_input(target: Any, options: Any, message: str) -> None:
    with pytest.raises(VectorError, match=message):
        targeted_vector(ANCHOR, target, **options)


def test_a_latent_that_nothing_moves() -> None:
    silent = approximator(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.ones(2))
    with pytest.raises(VectorError, match="effect on the target is 0"):
        targeted_vector(silent, {1: 1.0})


@pytest.mark.parametrize("mode", ["ablate", "augment", "both"])
def test_the_target_of_a_map(sae_in: FrozenSAE, sae_out: FrozenSAE, mode: str) -> None:
    cdmap = make_map(sae_in, sae_out)
    sums = dict(zip(cdmap.columns.tolist(), cdmap.values.double().sum(dim=0).tolist(), strict=True))
    ordered = sorted(sums, key=lambda latent: sums[latent])
    low, high = [j for j in ordered[:3] if sums[j] < 0], [j for j in ordered[-3:] if sums[j] > 0]
    wanted = {"ablate": low, "augment": high, "both": low + high}[mode]
    target = map_target(cdmap, SteeringConfig(k_diff=3, mode=mode))
    assert target.keys() == set(wanted) and all(target[j] == pytest.approx(sums[j]) for j in wanted)


def test_the_target_of_prompts(sae_in: FrozenSAE, sae_out: FrozenSAE) -> None:
    model, cdmap = make_model("qwen3"), make_map(sae_in, sae_out)
    config = SteeringConfig(k_diff=3, mode="both")
    prompts = [[3, 4, 5, 6], [9, 8, 7], [20, 21]]
    target = prompts_target(model, prompts, sae_in, cdmap, config)
    wanted: dict[int, float] = {}
    for ids in prompts:
        h = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
        plan = cdmap.select((sae_in.encode(h) > 0).sum(dim=0, dtype=torch.int32)[None], config)
        for slot, sign in zip(plan.slots[0].tolist(), plan.signs[0].tolist(), strict=True):
            if slot >= 0:
                latent = int(cdmap.columns[slot])
                wanted[latent] = wanted.get(latent, 0) + sign / 3
    assert target.keys() == {j for j, weight in wanted.items() if weight}
    assert all(weight == pytest.approx(wanted[j]) for j, weight in target.items())
    assert {weight > 0 for weight in target.values()} == {True, False}
    with pytest.raises(VectorError, match="`prompts` is empty"):
        prompts_target(model, [], sae_in, cdmap, config)
    zero = cdmap.replaced(values=torch.zeros_like(cdmap.values))
    with pytest.raises(VectorError, match="3 prompts that select nothing"):
        prompts_target(model, prompts, sae_in, zero, config)
    with pytest.raises(VectorError, match="`mode` is ablate"):
        map_target(zero, replace(config, mode="ablate"))
