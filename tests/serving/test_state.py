"""`dspa.serving.state` against the ops called once for each request."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dspa
from dspa.config import MODES
from dspa.errors import MapError
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.serving.map_steering import MapSteering
from dspa.serving.prefix_cache import CacheSlots
from dspa.serving.requests import parse
from dspa.serving.settings import MapPlace, Place, ServingSettings
from dspa.serving.state import ServingState
from dspa.testing import D_IN, D_SAE_IN, D_SAE_OUT, L_IN, L_OUT, make_map, make_sae
from dspa_kernels import MapWeights, activation_counts, steer


@pytest.fixture
def settings(tmp_path: Path) -> ServingSettings:
    """Two maps of one pair of SAEs, one of the same input SAE, and one that reads where the first two edit."""
    saes = {
        "sae_in": make_sae(L_IN, D_SAE_IN),
        "sae_out": make_sae(L_OUT, D_SAE_OUT, seed=1),
        "middle": make_sae(L_IN, 80, seed=2),
        "top": make_sae(L_OUT + 1, 72, seed=3),
    }
    places = {}
    for name, sae in saes.items():
        sae.save(tmp_path / name)
        places[name] = Place(str(tmp_path / name), sae.fingerprint, sae.layer)
    maps = {}
    for seed, (name, pair) in enumerate(PAIRS.items()):
        path = tmp_path / f"{name}.safetensors"
        cdmap = make_map(*(saes[sae] for sae in pair), n_columns=30 + seed, seed=seed)
        # The first has a calibration, by which the encoder is read.
        hot = {"hot": torch.arange(9, -1, -1).int(), "hot_counts": torch.arange(10, 0, -1), "mean": torch.zeros(D_IN)}
        cdmap.replaced(**({} if seed else hot)).save(path)
        file = Place(str(path), dspa.files.file_sha256(path))
        maps[name] = MapPlace(file, *(places[sae] for sae in pair), saes[pair[0]].d_sae)
    return ServingSettings(model="m", maps=maps, config=dspa.SteeringConfig(k_prompt=8, k_diff=4))


PAIRS = {
    "polite": ("sae_in", "sae_out"),
    "below": ("sae_in", "middle"),
    "above": ("sae_out", "top"),
    "terse": ("sae_in", "sae_out"),
}


def alone(
    settings: ServingSettings, keys: dict[str, object], h_in: Tensor, h_out: Tensor, n_prompt: int, layer: int = L_OUT
) -> Tensor:
    """Residuals of one sequence at a layer, with the edits that the ops make of it by itself.

    A map that edits another layer leaves them.
    """
    asked = parse(keys, settings)
    if asked is None:
        return h_out
    asked = asked.of_prompt(n_prompt)
    for name in asked.maps:
        place = settings.maps[name]
        if place.layers[1] != layer:
            continue
        sae_in, sae_out = (dspa.FrozenSAE.load(sae.path) for sae in (place.sae_in, place.sae_out))
        cdmap = ConditionalDifferenceMap.load(place.file.path)
        counted = asked.n_counted
        counts = activation_counts(h_in[:counted], sae_in.weights, torch.zeros(counted, dtype=torch.int32), 1)
        plan = cdmap.select(counts, dspa.SteeringConfig(k_prompt=8, k_diff=4, mode=asked.dspa_mode))
        rows = torch.where(torch.arange(len(h_out)) >= asked.first_edited, 0, -1).int()
        weights = MapWeights.gather(cdmap.columns, cdmap.values, sae_out.weights)
        h_out = steer(h_out, sae_out.weights, weights, plan, rows, alpha=asked.dspa_alpha)
    return h_out


class Cache:
    """Blocks of 4 slots, some for each request, and what a step writes where."""

    def __init__(self, n_requests: int, n_tokens: int) -> None:
        n_blocks = 8 * n_requests
        blocks = torch.randperm(n_blocks, generator=torch.Generator().manual_seed(0)).int().view(n_requests, 8)
        self.slots = CacheSlots(4 * n_blocks, 4, torch.full((n_tokens,), -1), blocks)

    def place(self, rows: Tensor, starts: Tensor, positions: Tensor) -> None:
        self.slots.slots.fill_(-1)
        row = rows.repeat_interleave(starts.diff())
        self.slots.slots[: len(positions)] = self.slots.blocks[row, positions // 4].long() * 4 + positions % 4


def start(settings: ServingSettings, n_requests: int, n_tokens: int) -> tuple[ServingState, Cache]:
    state, cache = ServingState(settings, n_requests, n_tokens, torch.device("cpu")), Cache(n_requests, n_tokens)
    state.keep_beside(cache.slots)
    return state, cache


def steering_of(state: ServingState, name: str) -> MapSteering:
    """The steering by a map."""
    (steering,) = (m for m in state.methods if isinstance(m, MapSteering) and name in m.names)
    return steering


def test_steps_of_mixed_requests(settings: ServingSettings) -> None:
    """Prompts in chunks of any size beside decoding, rows that are used again: each request as by itself."""
    torch.manual_seed(0)
    state, cache = start(settings, 3, 40)
    assert steering_of(state, "polite").stream.n_large == 10
    asked: list[dict[str, object]] = [
        {},
        *({"dspa_alpha": 0.3 + n, "dspa_mode": mode} for n, mode in enumerate(MODES)),
        {"dspa_map": "terse", "dspa_mode": "both", "dspa_positions": "generated"},
        {"dspa_start": 3, "dspa_alpha": 1.0},
    ]
    changed = 0
    for turn in range(4):
        keys = [asked[(turn + n) % len(asked)] for n in range(3)]
        prompts = [5, 9, 14]
        h = torch.randn(2, 3, 20, D_IN) * D_IN**0.5 / 3
        # The second layer's residuals come in two parts.
        parts = torch.stack([h[1], torch.randn(3, 20, D_IN)])
        h[1] = parts[0] + parts[1]
        expected = [alone(settings, keys[n], h[0, n], h[1, n], prompts[n]) for n in range(3)]
        changed += sum(not torch.equal(expected[n], h[1, n]) for n in range(3))
        # Row of each request, whose order differs from that in the batch.
        rows = torch.tensor([2, 0, 1])
        for n, row in enumerate(rows.tolist()):
            request = parse(keys[n], settings)
            state.begin(row, request and request.of_prompt(prompts[n]))
        out: list[list[Tensor]] = [[], [], []]
        done = [0, 0, 0]
        for step in range(40):
            sizes = [min(20 - done[n], (1, 2, 7, 3)[(step + n) % 4] if done[n] < prompts[n] else 1) for n in range(3)]
            tokens = [slice(done[n], done[n] + sizes[n]) for n in range(3)]
            starts = torch.tensor([0, *sizes]).cumsum(0).int()
            positions = torch.cat([torch.arange(20)[token] for token in tokens])
            cache.place(rows, starts, positions)
            state.batch.place(rows, starts, positions, cache.slots.slots)
            # Padding follows the tokens of a step.
            padding = torch.randn(2, D_IN)
            state.read(L_IN, torch.cat([*(h[0, n, token] for n, token in enumerate(tokens)), padding]))
            hidden, residual = (
                torch.cat([*(part[n, token] for n, token in enumerate(tokens)), padding]) for part in parts
            )
            before = hidden.clone(), residual.clone()
            state.write(L_OUT, hidden, residual)
            kept = torch.equal(hidden[-2:], padding) and torch.equal(residual[-2:], padding)
            assert kept and ((hidden == before[0]) & (residual == before[1]) | (residual == 0)).all()
            for n in range(3):
                out[n].append((hidden + residual)[starts[n] : starts[n + 1]])
                done[n] += sizes[n]
        for n in range(3):
            answered, unsteered = torch.cat(out[n]), h[1, n]
            # Sums of other batches round differently; what is not edited has the same bits.
            torch.testing.assert_close(answered, expected[n])
            assert torch.equal((answered != unsteered).any(1), (expected[n] != unsteered).any(1)), (turn, keys[n])
    assert changed >= 9


def test_requests_with_maps_of_several_layers(settings: ServingSettings) -> None:
    """Beside others in a batch: each map reads and edits at its own layers, and the rest is left alone."""
    torch.manual_seed(2)
    state, cache = start(settings, 4, 80)
    layers = (L_IN, L_OUT, L_OUT + 1)
    assert state.reads == {L_IN, L_OUT} and state.writes == set(layers)
    joint: list[dict[str, object]] = [
        {"dspa_map": "polite+below", "dspa_alpha": 1.0, "dspa_mode": "both"},
        {"dspa_map": "below+above+terse", "dspa_positions": "generated", "dspa_mode": "augment", "dspa_alpha": 2.0},
        {"dspa_map": "terse", "dspa_alpha": 1.0},
        {"dspa": "off"},
    ]
    for keys in (joint, joint[::-1]):
        h = torch.randn(3, 4, 20, D_IN) * D_IN**0.5 / 3
        prompts, rows = [5, 9, 14, 7], torch.tensor([2, 0, 3, 1])
        for n, row in enumerate(rows.tolist()):
            request = parse(keys[n], settings)
            state.begin(row, request and request.of_prompt(prompts[n]))
        out = torch.empty_like(h)
        for tokens in (slice(0, 4), slice(4, 12), slice(12, 13), slice(13, 20)):
            size = tokens.stop - tokens.start
            starts = torch.arange(5).int() * size
            positions = torch.arange(20)[tokens].repeat(4)
            cache.place(rows, starts, positions)
            state.batch.place(rows, starts, positions, cache.slots.slots)
            for n_layer, layer in enumerate(layers):
                now = h[n_layer, :, tokens].reshape(4 * size, D_IN)
                state.read(layer, now)
                edited = now.clone()
                state.write(layer, edited)
                out[n_layer, :, tokens] = edited.view(4, size, D_IN)
        n_changed = 0
        for n_layer, layer in enumerate(layers):
            for n in range(4):
                # "above" reads where the others edit.
                wanted = alone(settings, keys[n], h[int(layer > L_OUT), n], h[n_layer, n], prompts[n], layer)
                torch.testing.assert_close(out[n_layer, n], wanted)
                assert torch.equal((out[n_layer, n] != h[n_layer, n]).any(1), (wanted != h[n_layer, n]).any(1))
                n_changed += not torch.equal(wanted, h[n_layer, n])
        assert n_changed == 6


@pytest.mark.parametrize("together", [True, False])
def test_prompts_from_the_cache(together: bool, settings: ServingSettings) -> None:
    """Tokens that another request computed, before or in the same step, count as those of the prompt itself."""
    torch.manual_seed(1)
    state, cache = start(settings, 3, 44)
    keys: list[dict[str, object]] = [
        {"dspa_alpha": 1.0, "dspa_mode": "both"},
        {"dspa_alpha": 0.5, "dspa_map": "terse"},
        # All of what is counted is in the cache.
        {"dspa_alpha": 2.0, "dspa_mode": "augment", "dspa_start": 7},
    ]
    h = torch.randn(2, 3, 20, D_IN) * D_IN**0.5 / 3
    h[:, 1:, :8] = h[:, :1, :8]
    expected = [alone(settings, keys[n], h[0, n], h[1, n], 20) for n in range(3)]
    cache.slots.blocks[1:, :2] = cache.slots.blocks[:1, :2]
    for n in range(3):
        request = parse(keys[n], settings)
        assert request is not None
        state.begin(n, request.of_prompt(20))

    def step(rows: list[int]) -> list[Tensor]:
        tokens = [slice(8 * (row > 0), 20) for row in rows]
        starts = torch.tensor([0, *(token.stop - token.start for token in tokens)]).cumsum(0).int()
        positions = torch.cat([torch.arange(20)[token] for token in tokens])
        cache.place(torch.tensor(rows), starts, positions)
        state.batch.place(torch.tensor(rows), starts, positions, cache.slots.slots)
        state.read(L_IN, torch.cat([h[0, row, token] for row, token in zip(rows, tokens, strict=True)]))
        edited = torch.cat([h[1, row, token] for row, token in zip(rows, tokens, strict=True)])
        state.write(L_OUT, edited)
        return list(edited.split(starts.diff().tolist()))

    edited = step([2, 0, 1]) if together else [*step([0]), *step([2, 1])]
    for n, rows in zip((2, 0, 1) if together else (0, 2, 1), edited, strict=True):
        answered = expected[n][8 * (n > 0) :]
        torch.testing.assert_close(rows, answered)
        assert not torch.equal(answered, h[1, n, 8 * (n > 0) :])


def test_a_dummy_step_changes_nothing(settings: ServingSettings) -> None:
    state, _ = start(settings, 2, 8)
    request = parse({"dspa_alpha": 1.0}, settings)
    assert request is not None
    state.begin(0, request.of_prompt(4))
    state.batch.place_nothing()
    h = torch.randn(8, D_IN)
    state.read(L_IN, h)
    edited = h.clone()
    state.write(L_OUT, edited)
    assert torch.equal(edited, h) and not steering_of(state, "polite").latents.bits.any()


def test_a_map_that_was_replaced_is_refused(settings: ServingSettings) -> None:
    place = settings.maps["terse"]
    sae_in, sae_out = (dspa.FrozenSAE.load(sae.path) for sae in (place.sae_in, place.sae_out))
    make_map(sae_in, sae_out, seed=7).save(place.file.path)
    with pytest.raises(MapError, match="another file than when the engine was started"):
        ServingState(settings, 1, 1, torch.device("cpu"))


def test_residuals_that_are_not_finite_are_reported(settings: ServingSettings) -> None:
    """At the next request, of steered tokens alone, and in words that are shown once."""
    torch.manual_seed(0)
    state, cache = start(settings, 2, 8)
    steered = parse({"dspa": "on"}, settings)
    assert steered is not None

    def step(row: int, bad: float) -> None:
        state.batch.place(torch.tensor([row]), torch.tensor([0, 4]).int(), torch.arange(4), cache.slots.slots)
        state.read(L_IN, torch.randn(4, D_IN))
        h = torch.randn(4, D_IN)
        h[3, 0] = bad
        state.write(L_OUT, h)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for row, bad in ((0, 1.0), (1, math.nan)):
            state.begin(0, steered.of_prompt(4))
            state.begin(1, None)
            step(row, bad)
        state.begin(0, steered.of_prompt(4))
        state.begin(0, steered.of_prompt(4))
    step(0, math.inf)
    with pytest.warns(UserWarning, match=f"after layer {L_OUT} were NaN or infinite"):
        for _ in range(2):
            state.begin(1, None)
