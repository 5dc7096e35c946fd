"""Vectors of the requests of an engine: one of them added to the residuals of a request."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dspa.errors import VectorError
from dspa.serving.batch import Batch, put_rows
from dspa.serving.requests import SteeringRequest
from dspa.serving.settings import ServingSettings, VectorPlace
from dspa.steering.vector import SteeringVector


class VectorSteering:
    """The vectors of an engine, and for each of its R requests which of them is added, how many times and from where.

    Args:
        settings: settings of the engine.
        batch: the tokens of its steps.

    Attributes:
        reads: empty.
        writes: `add` of a layer, by the layer.

    Raises:
        VectorError: a vector that is another one now, or is damaged.
    """

    def __init__(self, settings: ServingSettings, batch: Batch) -> None:
        device, n_requests = batch.device, batch.n_requests
        self.names, self.batch = list(settings.vectors), batch
        vectors = [_load(place) for place in settings.vectors.values()]
        self.vectors = torch.stack([vector.vector for vector in vectors]).to(device)
        self.layer = torch.tensor([vector.layer for vector in vectors], device=device)
        # -1 for requests that no vector steers.
        self.vector = torch.full((n_requests,), -1, dtype=torch.int64, device=device)
        self.scale = torch.zeros(n_requests, dtype=torch.float32, device=device)
        self.first_edited = torch.zeros(n_requests, dtype=torch.int64, device=device)
        self.reads: dict[int, Callable[[Tensor], None]] = {}
        self.writes: dict[int, Callable[[Tensor, Tensor | None], None]] = {
            vector.layer: partial(self.add, vector.layer) for vector in vectors
        }

    def begin(self, row: int, request: SteeringRequest | None) -> None:
        """Give a row to a request, None for one that is not steered."""
        self.vector[row] = -1
        if request is None or request.dspa_vector is None:
            return
        self.vector[row] = self.names.index(request.dspa_vector)
        self.scale[row], self.first_edited[row] = request.dspa_alpha, request.first_edited

    def add(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """Add the vectors of a layer to the residuals of a step `hidden + residual`, [n_tokens, d_in], in place."""
        row, position = self.batch.tokens(len(hidden))
        request = row.clamp(min=0).long()
        vector = self.vector[request]
        steered = (row >= 0) & (vector >= 0) & (self.layer[vector] == layer) & (position >= self.first_edited[request])
        added = self.scale[request, None] * self.vectors[vector]
        h = hidden if residual is None else hidden + residual
        put_rows(steered, (h + added).to(h.dtype), hidden, residual)


def _load(place: VectorPlace) -> SteeringVector:
    place.file.check_unchanged(VectorError)
    return SteeringVector.load(place.file.path)
