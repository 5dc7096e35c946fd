"""FSRL adapters of the requests of an engine: the latents of every token of a request moved by one of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dspa.errors import AdapterError
from dspa.fsrl.adapter import FSRLAdapter
from dspa.saes.frozen import FrozenSAE
from dspa.serving.batch import Batch, put_rows
from dspa.serving.requests import SteeringRequest
from dspa.serving.settings import AdapterPlace, Place, ServingSettings
from dspa_kernels import FSRLOutput, fsrl_residual


class AdapterSteering:
    """The adapters of an engine, and which of them moves the latents of each of its R requests.

    An adapter acts on all tokens of a request, also on those of its prompt, as `FSRLAdapter` does.

    Args:
        settings: settings of the engine.
        batch: the tokens of its steps.
        load_sae: loads an SAE onto the device of the residuals.

    Attributes:
        reads: empty.
        writes: `move` with the adapters of a layer, by the layer.

    Raises:
        AdapterError: an adapter that is another one now, is damaged, or was trained with another SAE.
        SAEError: a damaged SAE.
    """

    def __init__(self, settings: ServingSettings, batch: Batch, load_sae: Callable[[Place], FrozenSAE]) -> None:
        self.names, self.batch = list(settings.adapters), batch
        adapters = [_load(place, load_sae) for place in settings.adapters.values()]
        # -1 for requests that no adapter steers.
        self.adapter = torch.full((batch.n_requests,), -1, dtype=torch.int32, device=batch.device)
        moves: dict[int, dict[int, Callable[..., FSRLOutput]]] = {}
        for number, adapter in enumerate(adapters):
            moves.setdefault(adapter.layer, {})[number] = _move_by(adapter, batch.dtype)
        self.reads: dict[int, Callable[[Tensor], None]] = {}
        self.writes: dict[int, Callable[[Tensor, Tensor | None], None]] = {
            layer: partial(self.move, here) for layer, here in moves.items()
        }

    def begin(self, row: int, request: SteeringRequest | None) -> None:
        """Give a row to a request, None for one that is not steered."""
        name = None if request is None else request.dspa_adapter
        self.adapter[row] = -1 if name is None else self.names.index(name)

    def move(self, moves: dict[int, Callable[..., FSRLOutput]], hidden: Tensor, residual: Tensor | None) -> None:
        """Move the latents of the residuals of a step `hidden + residual`, [n_tokens, d_in], in place.

        Args:
            moves: what moves them, by the number of its adapter.
            hidden: first part of the residuals.
            residual: second part, None if there is none.
        """
        row, _ = self.batch.tokens(len(hidden))
        h = hidden if residual is None else hidden + residual
        adapter = torch.where(row >= 0, self.adapter[row.clamp(min=0).long()], -1)
        for number, move in moves.items():
            own = adapter == number
            put_rows(own, move(h, rows=own).h, hidden, residual)


def _load(place: AdapterPlace, load_sae: Callable[[Place], FrozenSAE]) -> FSRLAdapter:
    place.record.check_unchanged(AdapterError)
    return FSRLAdapter.load(Path(place.record.path).parent, load_sae(place.sae))


def _move_by(adapter: FSRLAdapter, dtype: torch.dtype) -> Callable[..., FSRLOutput]:
    """Return the op of an adapter, with W_a in the dtype of residuals, as `FSRLAdapter` multiplies it."""
    return partial(
        fsrl_residual,
        sae=adapter.sae.weights,
        W_a=adapter.W_a.detach().to(dtype),
        b_a=adapter.b_a.detach(),
        threshold=None if adapter.thresholds is None else adapter.thresholds.detach(),
        activation=adapter.config.activation,
    )
