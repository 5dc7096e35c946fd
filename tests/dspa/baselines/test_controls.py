"""Controls: what is replaced, and what stays as it was."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dspa.baselines.matching import BLOCK, matched_permutation
from dspa.baselines.random_change import random_change
from dspa.baselines.random_set import random_set_map, response_densities
from dspa.baselines.random_vector import random_vector
from dspa.baselines.shuffled_map import shuffled_map
from dspa.baselines.static_sae import static_map
from dspa.baselines.wrong_layer import at_layer, wrong_layer
from dspa.config import SteeringConfig
from dspa.evaluate.compare.methods import CONTROLS, Method, controls_of
from dspa.evaluate.compare.run import weights_replaced
from dspa.evaluate.responses import Response
from dspa.fsrl import FSRLAdapter
from dspa.maps.stability import selected_latents
from dspa.models.reading import read_layers
from dspa.steering.dspa import Steering
from dspa.steering.vector import SteeringVector
from dspa.testing import (
    D_SAE_IN,
    D_SAE_OUT,
    L_OUT,
    first_prompts,
    gate_tensors,
    make_model,
    make_sae,
    with_tensors,
)

BOTH = SteeringConfig(mode="both", k_prompt=4, k_diff=3)


def prompt_counts(n: int = 20) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    return torch.randint(0, 6, (n, D_SAE_IN), generator=g, dtype=torch.int32)


@pytest.mark.parametrize("n", [2, 5, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_a_permutation_moves_everything_a_few_ranks(n):
    values = torch.rand(n, generator=torch.Generator().manual_seed(n))
    replacement = matched_permutation(values, seed=0)
    assert sorted(replacement.tolist()) == list(range(n))
    assert not bool((replacement == torch.arange(n)).any())
    ranks = values.argsort().argsort()
    assert int((ranks - ranks[replacement]).abs().max()) <= BLOCK
    assert torch.equal(replacement, matched_permutation(values, seed=0))
    assert n < 5 or not torch.equal(replacement, matched_permutation(values, seed=1))


def test_permutations_of_nothing_and_of_one():
    assert matched_permutation(torch.zeros(0), 0).tolist() == []
    assert matched_permutation(torch.zeros(1), 0).tolist() == [0]


def test_ties_are_replaced_from_all_over():
    """Equal values have no order: latents far apart by index can replace each other."""
    replacement = matched_permutation(torch.zeros(400), seed=0)
    assert int((replacement - torch.arange(400)).abs().max()) > 100


def test_a_random_set_has_the_size_and_the_overlap_of_the_selected_one(cdmap):
    densities = torch.rand(D_SAE_OUT, generator=torch.Generator().manual_seed(1)).double()
    counts = prompt_counts()
    selected = selected_latents(cdmap, counts, BOTH)
    drawn = selected_latents(random_set_map(cdmap, densities, seed=3), counts, BOTH)
    assert [Counter(latent >= 0 for latent in one) for one in drawn] == [
        Counter(latent >= 0 for latent in one) for one in selected
    ]
    # One latent stands for another wherever that is selected.
    pairs = [[len(one & other) for other in selected] for one in selected]
    assert [[len(one & other) for other in drawn] for one in drawn] == pairs
    index = lambda latent: latent if latent >= 0 else -1 - latent  # noqa: E731
    used = sorted({index(latent) for one in selected for latent in one})
    replacement = matched_permutation(densities, seed=3)
    assert sorted({index(latent) for one in drawn for latent in one}) == sorted(replacement[used].tolist())
    ranks = densities.argsort().argsort()
    assert all(abs(int(ranks[latent] - ranks[replacement[latent]])) < BLOCK for latent in used)


def test_densities_are_those_of_the_tokens_that_predict(gemma, sae_out):
    responses = [Response([1, 5, 9], [7, 8, 3, 4]), Response([1, 6], [11]), Response([1, 9, 9, 4, 5], [3, 12])]
    active, tokens = torch.zeros(D_SAE_OUT), 0
    for response in responses:
        h = read_layers(gemma, [sae_out.layer], input_ids=torch.tensor([response.prompt + response.ids]))
        first = len(response.prompt) - 1
        rows = h[sae_out.layer][0, first : first + len(response.ids)]
        active += (sae_out.encode(rows) > 0).sum(dim=0)
        tokens += len(response.ids)
    densities = response_densities(gemma, sae_out, responses, batch_tokens=16)
    assert torch.equal(densities, active.double() / tokens) and len(densities.unique()) > 5


def test_a_shuffled_map_holds_rows_of_gates_that_are_open_as_often(cdmap):
    n_open = torch.arange(D_SAE_IN, dtype=torch.int32) % 4 * 10
    n_open[n_open == 30] = cdmap.meta.n_triples
    cdmap = with_tensors(cdmap, **gate_tensors(first_prompts(n_open, cdmap.meta.n_triples)))
    shuffled = shuffled_map(cdmap, seed=0)
    origin = (shuffled.values[:, None] == cdmap.values[None]).all(dim=2).int().argmax(dim=1)
    closed = n_open == 0
    assert torch.equal(shuffled.values[closed], cdmap.values[closed])
    assert not bool((origin == torch.arange(D_SAE_IN))[~closed].any())
    assert sorted(origin.tolist()) == list(range(D_SAE_IN))
    # 24 gates of each number, in runs of 8: at most one run holds gates of two numbers, and another of the next two.
    same = n_open[origin] == n_open
    assert float(same[~closed].double().mean()) > 0.5
    assert torch.equal(shuffled.columns, cdmap.columns) and torch.equal(shuffled.n_open, n_open)
    assert not torch.equal(shuffled.values, shuffled_map(cdmap, seed=1).values)


@pytest.mark.parametrize(
    ("layer_in", "layer_out", "n_layers", "expected"),
    [(7, 24, 26, 16), (8, 20, 30, 12), (9, 18, 36, 10), (1, 4, 5, 2), (1, 2, 4, 3), (2, 3, 30, 11), (2, 3, 4, None)],
)
def test_wrong_layer(layer_in, layer_out, n_layers, expected):
    assert wrong_layer(layer_in, layer_out, n_layers) == expected


def test_edits_at_another_layer(gemma, sae_in, sae_out, cdmap):
    moved, elsewhere = at_layer(sae_out, cdmap, 3)
    assert (moved.layer, elsewhere.meta.layer_out, sae_out.layer, cdmap.meta.layer_out) == (3, 3, 2, 2)
    prompt, strong = torch.tensor([[1, 5, 9, 12]]), SteeringConfig(alpha=1.0, mode="both")
    with Steering(sae_in, sae_out, cdmap, strong).attach(gemma) as steering:
        gemma.generate(prompt, max_new_tokens=1, do_sample=False)
        plan = steering.plan
    with Steering(sae_in, moved, elsewhere, strong, record=True).attach(gemma) as steering:
        gemma.generate(prompt, max_new_tokens=1, do_sample=False)
        assert torch.equal(steering.plan.slots, plan.slots) and len(steering.trace) == 1
        edit = next(iter(steering.trace))
    # The latents before the edit are those of the residual at that layer.
    f = sae_out.encode(read_layers(gemma, [3], input_ids=prompt)[3][0, -1:])[0]
    assert edit.before == pytest.approx(f[edit.latents].tolist(), rel=1e-4)


def test_a_static_map_is_the_sum_of_rows(cdmap):
    static = static_map(cdmap)
    expected = cdmap.values.double().sum(dim=0)
    assert all(torch.allclose(row.double(), expected, rtol=1e-6) for row in static.values)
    one = selected_latents(static, prompt_counts(), SteeringConfig(k_prompt=1))
    assert one[0] and all(latents == one[0] for latents in one)


def test_a_random_vector_is_as_long_and_points_elsewhere():
    vector = SteeringVector(torch.arange(1.0, 65.0), layer=3, scale=2.0, positions="response", model_name="m")
    drawn = [random_vector(vector, seed) for seed in (0, 1, 0)]
    for one in drawn:
        assert float(one.vector.norm()) == pytest.approx(float(vector.vector.norm()), rel=1e-6)
        kept = (one.layer, one.scale, one.positions, one.model_name)
        assert kept == (vector.layer, vector.scale, vector.positions, vector.model_name)
        # A cosine of random directions in 64 dimensions is about 1/8.
        assert abs(float(torch.cosine_similarity(one.vector, vector.vector, dim=0))) < 0.6
    assert abs(float(torch.cosine_similarity(drawn[0].vector, drawn[1].vector, dim=0))) < 0.6
    assert torch.equal(drawn[0].vector, drawn[2].vector)


@pytest.mark.parametrize("shape", [(7,), (5, 9)])
def test_a_random_change_has_the_size_of_the_change(shape):
    g = torch.Generator().manual_seed(0)
    change = torch.randn(*shape, generator=g) if len(shape) == 1 else torch.randn(5, 2, generator=g) @ torch.randn(2, 9)
    one, other, again = (random_change(change, torch.Generator().manual_seed(seed)) for seed in (0, 1, 0))
    assert one.shape == change.shape and torch.equal(one, again)
    assert not torch.allclose(one, other) and not torch.allclose(one, change)
    assert torch.allclose(one.abs().flatten().sort().values, change.abs().flatten().sort().values)
    if len(shape) == 2:
        assert torch.allclose(torch.linalg.svdvals(one), torch.linalg.svdvals(change), atol=1e-5)
        assert int(torch.linalg.matrix_rank(one)) == 2


def test_random_latents_move_as_much():
    sae = make_sae(L_OUT, D_SAE_OUT, seed=2)
    adapter = FSRLAdapter(sae)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        adapter.W_a.copy_(torch.randn(adapter.W_a.shape, generator=g))
        adapter.threshold.copy_(torch.rand(adapter.threshold.shape, generator=g))
    adapter.mask, adapter.fraction = torch.arange(D_SAE_OUT) % 3 > 0, 0.5
    replacement = torch.randperm(D_SAE_OUT, generator=g)
    moved = adapter.permuted(replacement)
    h = torch.randn(4, sae.d_in, generator=g)
    assert torch.equal(moved.steering_vector(h)[:, replacement], adapter.steering_vector(h))
    assert torch.equal(moved.mask[replacement], adapter.mask) and moved.fraction == 0.5
    assert not any(parameter.requires_grad for parameter in moved.parameters()) and moved.sae is sae


def test_weights_of_a_control_are_changed_as_much_by_every_draw():
    model, tuned = make_model("gemma2"), make_model("gemma2", seed=0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "q_proj" in name or "norm" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    method = Method.tuned(tuned)
    (control,) = controls_of(method, CONTROLS, model, None, lambda _sae: torch.empty(0), "")
    assert control.name == "tuned: random change" and control.drawn and control.digest != method.digest
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    seen = []
    for seed in (0, 1, 0):
        with weights_replaced(model, control, seed):
            seen.append({name: parameter.clone() - before[name] for name, parameter in model.named_parameters()})
    for name, parameter in tuned.named_parameters():
        change = parameter - before[name]
        assert float(seen[0][name].norm()) == pytest.approx(float(change.norm()), rel=1e-3, abs=1e-9), name
        assert torch.equal(seen[0][name], seen[2][name])
        if "q_proj" in name:
            assert not torch.allclose(seen[0][name], change) and not torch.allclose(seen[0][name], seen[1][name])
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
