"""Movement of latents by an adapter in texts, against hooks and the formulas of the adapter and its SAE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dspa.audit.edits import TextEdits, summarise
from dspa.audit.moves import AdapterMoves, moved_latents
from dspa.evaluate.responses import Response
from dspa.fsrl import responses_of
from dspa.testing import D_SAE_OUT, L_OUT, make_model

from ..support.adapters import TRIPLES, acting_adapter


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("gemma2")


@pytest.fixture(scope="module")
def texts(model: Any, tokenizer: Any) -> list[Response]:
    return responses_of(model, tokenizer, TRIPLES)[:5]


def residuals(model: Any, response: Response) -> Tensor:
    """Residuals [T, d_in] at the output of the adapter's layer, of a plain pass over one text."""
    kept: list[Tensor] = []

    def keep(_layer: Any, _args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = model.model.layers[L_OUT].register_forward_hook(keep)
    with torch.no_grad():
        model(torch.tensor([response.prompt + response.ids]))
    handle.remove()
    return kept[0][0]


@pytest.mark.parametrize("attached", [True, False])
def test_moves_are_those_of_the_formula(model: Any, tokenizer: Any, texts: list[Response], attached: bool) -> None:
    adapter = acting_adapter(model, texts)
    h = [residuals(model, response) for response in texts]
    if attached:
        adapter.attach(model)
    moves = AdapterMoves(model, adapter, tokenizer)
    batches = [moves.of(texts[:3]), moves.of(texts[3:])]
    adapter.detach()
    edits = {(edit.call, edit.row, edit.position): edit for of_batch, _ in batches for edit in of_batch}
    active, n_moved = torch.zeros(D_SAE_OUT, dtype=torch.bool), 0
    for n, response in enumerate(texts):
        call, row = (0, n) if n < 3 else (1, n - 3)
        ids = response.prompt + response.ids
        for position in range(len(response.prompt) - 1, len(ids) - 1):
            x, sae = h[n][position], adapter.sae
            pre = x @ sae.W_enc + sae.b_enc
            f = torch.where((pre > sae.threshold) & (pre > 0), pre, 0)
            u = adapter.W_a @ x + adapter.b_a
            v = u.sign() * (u.abs() - adapter.threshold.clamp(min=0)).clamp(min=0)
            active |= f != 0
            edit = edits.pop((call, row, position), None)
            assert (edit is not None) == bool((v != 0).any())
            if edit is not None:
                n_moved += 1
                assert edit.latents == v.nonzero().flatten().tolist()
                assert edit.before == pytest.approx(f[edit.latents].tolist(), abs=1e-4)
                assert edit.after == pytest.approx((f + v)[edit.latents].tolist(), abs=1e-4)
                assert edit.token == ids[position] and edit.text is not None
                assert edit.text.strip() == tokenizer.decode([ids[position]])
    assert not edits and n_moved > 20 and torch.equal(moves.active, active)
    lengths = [text.n_tokens for _, lengths in batches for text in lengths]
    assert lengths == [len(response.ids) for response in texts]


def test_groups_are_the_farthest_moved_and_active_others(model: Any, tokenizer: Any, texts: list[Response]) -> None:
    moves = AdapterMoves(model, acting_adapter(model, texts), tokenizer)
    of_batch, lengths = moves.of(texts)
    changes: dict[int, float] = {}
    for edit in of_batch:
        for latent, before, after in zip(edit.latents, edit.before, edit.after, strict=True):
            changes[latent] = changes.get(latent, 0.0) + after - before
    rising = sorted(changes, key=lambda latent: changes[latent])
    edits: TextEdits = summarise(of_batch, lengths)
    groups = moved_latents(edits, moves.active, 6, seed=3)
    assert groups["augment"] == rising[::-1][:6] and groups["ablate"] == rising[:6]
    control = set(groups["control"])
    assert len(control) == 6 and not control & {*groups["augment"], *groups["ablate"]}
    assert all(moves.active[latent] for latent in control)
    assert groups == moved_latents(edits, moves.active, 6, seed=3)
    assert groups != moved_latents(edits, moves.active, 6, seed=4)
    with pytest.raises(ValueError, match="`n` is -1"):
        moved_latents(edits, moves.active, -1)
