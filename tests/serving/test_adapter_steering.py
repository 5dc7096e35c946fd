"""`dspa.serving.adapter_steering` against `FSRLAdapter` called once for each request."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import dspa
from dspa.errors import AdapterError
from dspa.fsrl import FSRLAdapter
from dspa.fsrl.adapter import RECORD
from dspa.serving.requests import parse
from dspa.serving.settings import AdapterPlace, Place, ServingSettings
from dspa.serving.state import ServingState
from dspa.testing import D_IN, D_SAE_IN, D_SAE_OUT, L_IN, L_OUT, make_sae
from tests.dspa.support.adapters import make_adapter

# By the name of an adapter, its layer and its activation.
ADAPTERS = {"early": (L_IN, "soft_threshold"), "late": (L_OUT, "jumprelu"), "other": (L_OUT, "relu")}


@pytest.fixture
def settings(tmp_path: Path) -> ServingSettings:
    places = {}
    for layer, d_sae in ((L_IN, D_SAE_IN), (L_OUT, D_SAE_OUT)):
        sae = make_sae(layer, d_sae, seed=layer)
        sae.save(tmp_path / f"sae{layer}")
        places[layer] = Place(str(tmp_path / f"sae{layer}"), sae.fingerprint, layer)
    adapters = {}
    for seed, (name, (layer, activation)) in enumerate(ADAPTERS.items()):
        make_adapter(dspa.FrozenSAE.load(places[layer].path), activation, seed=seed).save(tmp_path / name)
        adapters[name] = AdapterPlace(Place.of_file(tmp_path / name / RECORD), places[layer])
    return ServingSettings(model="m", adapters=adapters)


def load(settings: ServingSettings, name: str) -> FSRLAdapter:
    place = settings.adapters[name]
    return FSRLAdapter.load(Path(place.record.path).parent, dspa.FrozenSAE.load(place.sae.path))


def begin(state: ServingState, row: int, name: str | None, n_prompt: int) -> None:
    request = parse({} if name is None else {"dspa_adapter": name}, state.settings)
    state.begin(row, request and request.of_prompt(n_prompt))


def edited(state: ServingState, h: dict[int, Tensor]) -> dict[int, Tensor]:
    """Residuals of a step after each layer, with the edits."""
    edits = {layer: of_step.clone() for layer, of_step in h.items()}
    for layer, of_step in edits.items():
        state.write(layer, of_step)
    return edits


def test_steps_of_mixed_requests(settings: ServingSettings) -> None:
    """Chunks of prompts beside decoding, rows that are used again: each request as by itself, from its first token."""
    torch.manual_seed(0)
    state = ServingState(settings, 4, 40, torch.device("cpu"))
    assert state.reads == set() and state.writes == {L_IN, L_OUT}
    names = ["early", None, "late", "other"]
    n_tokens, prompts = 14, [5, 9, 12, 3]
    for turn in range(3):
        asked = [names[(turn + n) % 4] for n in range(4)]
        h = {layer: torch.randn(4, n_tokens, D_IN) for layer in (L_IN, L_OUT)}
        rows = torch.tensor([2, 0, 3, 1])
        for n, row in enumerate(rows.tolist()):
            begin(state, row, asked[n], prompts[n])
        out: dict[int, list[list[Tensor]]] = {layer: [[], [], [], []] for layer in h}
        done = [0] * 4
        for step in range(n_tokens):
            sizes = [
                min(n_tokens - done[n], (1, 4, 3)[(step + n) % 3] if done[n] < prompts[n] else 1) for n in range(4)
            ]
            tokens = [slice(done[n], done[n] + sizes[n]) for n in range(4)]
            starts = torch.tensor([0, *sizes]).cumsum(0).int()
            state.batch.place(rows, starts, torch.cat([torch.arange(n_tokens)[token] for token in tokens]))
            # Padding follows the tokens of a step.
            padding = torch.randn(2, D_IN)
            step_h = {
                layer: torch.cat([*(h[layer][n, token] for n, token in enumerate(tokens)), padding]) for layer in h
            }
            for layer, of_step in edited(state, step_h).items():
                assert torch.equal(of_step[-2:], padding)
                for n in range(4):
                    out[layer][n].append(of_step[starts[n] : starts[n + 1]])
            done = [done[n] + sizes[n] for n in range(4)]
        for n, name in enumerate(asked):
            for layer in h:
                answered = torch.cat(out[layer][n])
                if name is None or ADAPTERS[name][0] != layer:
                    assert torch.equal(answered, h[layer][n]), (turn, n, name, layer)
                    continue
                expected = load(settings, name)(h[layer][n])
                assert (expected != h[layer][n]).any(dim=1).all()
                # Sums of other batches round differently.
                torch.testing.assert_close(answered, expected, rtol=1e-5, atol=1e-4)


def test_sixteen_bits(settings: ServingSettings) -> None:
    """W_a is multiplied in the dtype of residuals, as `FSRLAdapter` does."""
    torch.manual_seed(0)
    state = ServingState(settings, 1, 8, torch.device("cpu"), torch.bfloat16)
    begin(state, 0, "late", 8)
    state.batch.place(torch.tensor([0]), torch.tensor([0, 8]).int(), torch.arange(8))
    h = torch.randn(8, D_IN, dtype=torch.bfloat16)
    expected = load(settings, "late")(h)
    state.write(L_OUT, h)
    assert torch.equal(h, expected)


def test_two_parts_in_place(settings: ServingSettings) -> None:
    """A row with an adapter becomes h' and 0, and any other keeps both parts."""
    torch.manual_seed(0)
    state = ServingState(settings, 2, 8, torch.device("cpu"))
    begin(state, 0, "late", 3)
    begin(state, 1, "early", 3)
    state.batch.place(torch.tensor([0, 1]), torch.tensor([0, 3, 6]).int(), torch.arange(6) % 3)
    hidden, residual = torch.randn(2, 8, D_IN)
    expected, kept = load(settings, "late")(hidden + residual), (hidden[3:].clone(), residual[3:].clone())
    state.write(L_OUT, hidden, residual)
    torch.testing.assert_close(hidden[:3], expected[:3], rtol=1e-5, atol=1e-4)
    assert not residual[:3].any() and torch.equal(hidden[3:], kept[0]) and torch.equal(residual[3:], kept[1])


def test_adapters_share_an_sae(settings: ServingSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    original = dspa.FrozenSAE.load
    monkeypatch.setattr(dspa.FrozenSAE, "load", lambda path, **others: loaded.append(path) or original(path, **others))
    ServingState(settings, 1, 1, torch.device("cpu"))
    assert sorted(loaded) == sorted({place.sae.path for place in settings.adapters.values()})


def test_a_dummy_step_changes_nothing(settings: ServingSettings) -> None:
    state = ServingState(settings, 2, 8, torch.device("cpu"))
    begin(state, 0, "late", 4)
    state.batch.place_nothing()
    h = torch.randn(8, D_IN)
    assert torch.equal(edited(state, {L_OUT: h})[L_OUT], h)


def test_an_adapter_that_was_replaced_is_refused(settings: ServingSettings) -> None:
    place = settings.adapters["late"]
    make_adapter(dspa.FrozenSAE.load(place.sae.path), "jumprelu", seed=7).save(Path(place.record.path).parent)
    with pytest.raises(AdapterError, match="another file than when the engine was started"):
        ServingState(settings, 1, 1, torch.device("cpu"))


def test_an_sae_that_was_replaced_is_refused(settings: ServingSettings) -> None:
    make_sae(L_OUT, D_SAE_OUT, seed=7).save(settings.adapters["late"].sae.path)
    with pytest.raises(AdapterError, match="fingerprint"):
        ServingState(settings, 1, 1, torch.device("cpu"))
