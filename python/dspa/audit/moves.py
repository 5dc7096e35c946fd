"""Edits of an adapter: which latents it moves on the tokens that predict a text, and which are active there."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dspa.audit.edits import ABLATE, AUGMENT, CONTROL, TextEdits
from dspa.data.token_texts import token_pieces
from dspa.evaluate.responses import Response, padded
from dspa.fsrl.adapter import FSRLAdapter
from dspa.models.layers import base_model
from dspa.models.reading import read_layers
from dspa.schemas import Count, check
from dspa.steering.edits import Edit, SteeredText


class AdapterMoves:
    """Movement of latents by an adapter in texts that a model wrote with it, read from their residuals before the move.

    A latent's value is that of the SAE, and after the move that plus its v_j. The adapter moves the tokens of prompts,
    too. Here those count that predict a token of the text.

    Args:
        model: the model.
        adapter: the adapter, whose `mask` and `fraction` are not applied.
        tokenizer: the model's tokenizer.
        layers: dotted path of the decoder layers, for an unknown architecture.

    Attributes:
        active: [d_sae] bool, True for latents that were active on any of these tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: FSRLAdapter,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layers: str | None = None,
    ) -> None:
        self.active = torch.zeros(adapter.sae.d_sae, dtype=torch.bool)
        self._model, self._adapter, self._tokenizer = base_model(model), adapter, tokenizer
        self._layers, self._n_calls = layers, 0

    @torch.no_grad()
    def of(self, batch: Sequence[Response]) -> tuple[list[Edit], list[SteeredText]]:
        """Return the moves of a batch of texts, and their lengths."""
        adapter, call, edits = self._adapter, self._n_calls, list[Edit]()
        self._n_calls += 1
        with adapter.disabled():
            h = read_layers(self._model, [adapter.layer], self._layers, **padded(self._model, batch))[adapter.layer]
        for row, response in enumerate(batch):
            first, ids = len(response.prompt) - 1, response.prompt + response.ids
            predicting = h[row, first : len(response) - 1].to(adapter.sae.device)
            f, v = adapter.sae.encode(predicting).float().cpu(), adapter.steering_vector(predicting).cpu()
            self.active |= (f != 0).any(dim=0)
            pieces = token_pieces(self._tokenizer, ids)
            for position, (before, move) in enumerate(zip(f, v, strict=True), start=first):
                latents = move.nonzero().flatten()
                if len(latents):
                    edits.append(
                        Edit(
                            *(call, row, position, float(before.max()), latents.tolist()),
                            *(before[latents].tolist(), (before + move)[latents].tolist()),
                            token=ids[position],
                            text=pieces[position],
                        )
                    )
        return edits, [SteeredText(call, row, len(response.ids), "") for row, response in enumerate(batch)]


def moved_latents(edits: TextEdits, active: Tensor, n: int = 50, *, seed: int = 0) -> dict[str, list[int]]:
    """Return the latents to audit: those that an adapter raises and lowers most, and a control.

    Args:
        edits: its edits.
        active: [d_sae] bool, True for latents that were active on the same tokens.
        n: number of latents per group; fewer where fewer are moved that way.
        seed: seed of the control, random active latents that are in neither group.

    Raises:
        ValueError: a negative `n`.
    """
    check(Count, n, ValueError, "`n`")
    augment, ablate = (list(edits.with_sign(sign))[:n] for sign in (1, -1))
    others = sorted({*active.nonzero().flatten().tolist()} - {*augment, *ablate})
    return {AUGMENT: augment, ABLATE: ablate, CONTROL: random.Random(seed).sample(others, min(n, len(others)))}
