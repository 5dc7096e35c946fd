"""`dspa.serving.latent_steering`: the residuals of each request against sums written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dspa
from dspa.errors import SAEError
from dspa.serving.requests import parse
from dspa.serving.settings import Place, ServingSettings
from dspa.serving.state import ServingState
from dspa.testing import D_IN, D_SAE_OUT, L_OUT, make_sae

N_PROMPT, N_TOKENS = 5, 9
SETS: dict[str, dict[str, Any]] = {
    "added": {"strengths": {"3": 2.0, "40": -1.5}, "when": "always"},
    "removed": {"strengths": {str(j): None for j in range(D_SAE_OUT)}},
}
# What a request asks for, and the set and the first token of its edits.
ASKED: list[tuple[dict[str, Any], tuple[str, int] | None]] = [
    ({"dspa": "on"}, ("added", N_PROMPT - 1)),
    ({}, None),
    ({"dspa_latents": "removed"}, ("removed", N_PROMPT - 1)),
    ({"dspa_latents": "removed", "dspa_positions": "all"}, ("removed", 0)),
    ({"dspa_latents": "added", "dspa_positions": "generated", "dspa_start": 2}, ("added", 2)),
]


@pytest.fixture
def sae(tmp_path: Path) -> dspa.FrozenSAE:
    make_sae(L_OUT, D_SAE_OUT, seed=2).save(tmp_path / "sae")
    return dspa.FrozenSAE.load(tmp_path / "sae")


@pytest.fixture
def settings(sae: dspa.FrozenSAE, tmp_path: Path) -> ServingSettings:
    latents = {}
    for name, record in SETS.items():
        (tmp_path / name).write_text(json.dumps(record))
        latents[name] = Place.of_file(tmp_path / name)
    assert sae.source is not None
    place = Place(sae.source.path, sae.source.digest, sae.layer)
    return ServingSettings(model="m", latents=latents, sae_latents=place)


def change(sae: dspa.FrozenSAE, h: Tensor, name: str) -> Tensor:
    if name == "added":
        return 2.0 * sae.W_dec[3] - 1.5 * sae.W_dec[40] + torch.zeros_like(h)
    pre = h @ sae.W_enc + sae.weights.b_enc
    return -torch.where((pre > sae.weights.threshold) & (pre > 0), pre, 0) @ sae.W_dec


def test_steps_of_mixed_requests(sae: dspa.FrozenSAE, settings: ServingSettings) -> None:
    """Rows that are used again, two parts of residuals: each request as by itself, and others bit for bit."""
    torch.manual_seed(0)
    state = ServingState(settings, 3, 32, torch.device("cpu"))
    assert state.reads == set() and state.writes == {L_OUT}
    rows, starts = torch.tensor([2, 0, 1]), torch.tensor([0, N_TOKENS, 2 * N_TOKENS, 3 * N_TOKENS]).int()
    for turn in range(len(ASKED)):
        asked = [ASKED[(turn + n) % len(ASKED)] for n in range(3)]
        for (keys, _), row in zip(asked, rows.tolist(), strict=True):
            request = parse(keys, settings)
            state.begin(row, request and request.of_prompt(N_PROMPT))
        state.batch.place(rows, starts, torch.arange(N_TOKENS).repeat(3))
        hidden, residual = torch.randn(2, 3 * N_TOKENS + 2, D_IN)
        before, h = (hidden.clone(), residual.clone()), hidden + residual
        state.write(L_OUT, hidden, residual)
        edited = hidden + residual
        for n, (_, edit) in enumerate(asked):
            first = N_TOKENS if edit is None else edit[1]
            own = slice(n * N_TOKENS, (n + 1) * N_TOKENS)
            same = torch.arange(own.start, own.start + first)
            assert all(torch.equal(now[same], then[same]) for now, then in zip((hidden, residual), before, strict=True))
            if edit is not None:
                wanted = h[own][first:] + change(sae, h[own][first:], edit[0])
                torch.testing.assert_close(edited[own][first:], wanted, rtol=1e-5, atol=1e-5)
                assert (edited[own][first:] != h[own][first:]).any()
        assert torch.equal(hidden[-2:], before[0][-2:])


def test_a_set_that_was_replaced_is_refused(settings: ServingSettings) -> None:
    Path(settings.latents["added"].path).write_text('{"strengths": {"1": 2}}')
    with pytest.raises(SAEError, match="another file than when the engine was started"):
        ServingState(settings, 1, 1, torch.device("cpu"))
