"""`dspa.serving.vector_steering` against a sum written out here for each request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dspa
from dspa.errors import VectorError
from dspa.serving.requests import parse
from dspa.serving.settings import Place, ServingSettings, VectorPlace
from dspa.serving.state import ServingState
from dspa.testing import D_IN, L_IN, L_OUT

# By the name of a vector, its layer, scale and positions.
VECTORS = {"early": (L_IN, 2.0, "all"), "late": (L_OUT, 3.0, "response"), "other": (L_OUT, 0.5, "generated")}
N_PROMPT, N_TOKENS = 5, 9


@pytest.fixture
def settings(tmp_path: Path) -> ServingSettings:
    vectors = {}
    for seed, (name, (layer, scale, positions)) in enumerate(VECTORS.items()):
        numbers = torch.randn(D_IN, generator=torch.Generator().manual_seed(seed))
        dspa.SteeringVector(numbers, layer, scale, positions).save(tmp_path / name)
        vectors[name] = VectorPlace(Place.of_file(tmp_path / name), scale, positions)
    return ServingSettings(model="m", vectors=vectors)


# What a request asks for, and the layer, scale and first token of its edit.
ASKED: list[tuple[dict[str, Any], tuple[str, float, int] | None]] = [
    ({"dspa_vector": "early"}, ("early", 2.0, 0)),
    ({}, None),
    ({"dspa_vector": "late"}, ("late", 3.0, N_PROMPT - 1)),
    ({"dspa_vector": "other"}, ("other", 0.5, N_PROMPT)),
    ({"dspa_vector": "late", "dspa_alpha": 7, "dspa_positions": "all"}, ("late", 7.0, 0)),
    ({"dspa_vector": "early", "dspa_positions": "generated", "dspa_start": 2}, ("early", 2.0, 2)),
    ({"dspa_vector": "other", "dspa_alpha": 0}, ("other", 0.0, N_TOKENS)),
]


def numbers(settings: ServingSettings, name: str) -> Tensor:
    return dspa.SteeringVector.load(settings.vectors[name].file.path).vector


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_mixed_requests(settings: ServingSettings, dtype: torch.dtype) -> None:
    """Chunks beside decoding, rows that are used again: each request as by itself, and others bit for bit."""
    torch.manual_seed(0)
    state = ServingState(settings, 3, 32, torch.device("cpu"), dtype)
    assert state.reads == set() and state.writes == {L_IN, L_OUT}
    for turn in range(len(ASKED)):
        asked = [ASKED[(turn + n) % len(ASKED)] for n in range(3)]
        # Residuals come in two parts.
        parts = {layer: torch.randn(2, 3, N_TOKENS, D_IN).to(dtype) for layer in (L_IN, L_OUT)}
        h = {layer: part[0] + part[1] for layer, part in parts.items()}
        rows = torch.tensor([2, 0, 1])
        for (keys, _), row in zip(asked, rows.tolist(), strict=True):
            request = parse(keys, settings)
            state.begin(row, request and request.of_prompt(N_PROMPT))
        out: dict[int, list[list[Tensor]]] = {layer: [[], [], []] for layer in h}
        done = [0] * 3
        for step in range(N_TOKENS):
            sizes = [min(N_TOKENS - done[n], (1, 4, 2)[(step + n) % 3]) for n in range(3)]
            tokens = [slice(done[n], done[n] + sizes[n]) for n in range(3)]
            starts = torch.tensor([0, *sizes]).cumsum(0).int()
            state.batch.place(rows, starts, torch.cat([torch.arange(N_TOKENS)[token] for token in tokens]))
            for layer in h:
                padding = torch.randn(2, D_IN).to(dtype)
                hidden, residual = (
                    torch.cat([*(part[n, t] for n, t in enumerate(tokens)), padding]) for part in parts[layer]
                )
                before = hidden.clone(), residual.clone()
                state.write(layer, hidden, residual)
                assert torch.equal(hidden[-2:], padding)
                assert ((hidden == before[0]) & (residual == before[1]) | (residual == 0)).all()
                for n in range(3):
                    out[layer][n].append((hidden + residual)[starts[n] : starts[n + 1]])
            done = [done[n] + sizes[n] for n in range(3)]
        for n, (keys, edit) in enumerate(asked):
            for layer in h:
                expected = h[layer][n].clone()
                if edit is not None and VECTORS[edit[0]][0] == layer:
                    name, scale, first = edit
                    expected[first:] = (expected[first:].float() + scale * numbers(settings, name)).to(dtype)
                assert torch.equal(torch.cat(out[layer][n]), expected), (turn, keys, layer)


def test_a_dummy_step_changes_nothing(settings: ServingSettings) -> None:
    state = ServingState(settings, 2, 8, torch.device("cpu"))
    request = parse({"dspa_vector": "late", "dspa_positions": "all"}, settings)
    assert request is not None
    state.begin(0, request.of_prompt(4))
    state.batch.place_nothing()
    h = torch.randn(8, D_IN)
    edited = h.clone()
    state.write(L_OUT, edited)
    assert torch.equal(edited, h)


def test_a_vector_that_was_replaced_is_refused(settings: ServingSettings) -> None:
    dspa.SteeringVector(torch.ones(D_IN), L_OUT).save(settings.vectors["late"].file.path)
    with pytest.raises(VectorError, match="another file than when the engine was started"):
        ServingState(settings, 1, 1, torch.device("cpu"))
