"""The state of an engine: the tokens of a step, and the methods that steer them."""

from __future__ import annotations

from functools import cache
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dspa.saes.frozen import FrozenSAE
from dspa.serving.adapter_steering import AdapterSteering
from dspa.serving.batch import Batch
from dspa.serving.gates import RequestGates
from dspa.serving.latent_steering import ChosenLatents
from dspa.serving.map_steering import MapSteering, PromptLatents, groups_of, map_methods
from dspa.serving.prefix_cache import CacheSlots
from dspa.serving.requests import SteeringRequest
from dspa.serving.settings import Place, ServingSettings
from dspa.serving.vector_steering import VectorSteering

# States by name, as the ops of a graph find theirs. A state belongs to its engine.
STATES: WeakValueDictionary[str, ServingState] = WeakValueDictionary()


class ServingState:
    """One row for each request that can run at once, and one number for each token of a step.

    A step fills `batch`, then its layers call `read` and `write`.

    Args:
        settings: settings of the engine.
        n_requests: requests that can run at once.
        n_tokens: tokens of a step at most.
        device: device of the residuals.
        dtype: dtype of the residuals.
        n_positions: positions of a sequence at most.
    """

    def __init__(
        self,
        settings: ServingSettings,
        n_requests: int,
        n_tokens: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        n_positions: int = 0,
    ) -> None:
        self.settings, self.groups = settings, groups_of(settings)
        self.batch = Batch(n_requests, n_tokens, len(self.groups), device, dtype)
        self.gates = RequestGates(self.batch, n_positions)

        @cache
        def load_sae(place: Place) -> FrozenSAE:
            return FrozenSAE.from_name(place.path, layer=place.layer, device=device)

        self.methods: list[PromptLatents | MapSteering | AdapterSteering | VectorSteering | ChosenLatents]
        self.methods = [*map_methods(settings, self.batch, load_sae)]
        if settings.adapters:
            self.methods.append(AdapterSteering(settings, self.batch, load_sae))
        if settings.vectors:
            self.methods.append(VectorSteering(settings, self.batch))
        if settings.latents:
            self.methods.append(ChosenLatents(settings, self.batch, load_sae))
        # An order for compilers: what reads also writes it, and what writes reads it.
        self.order = torch.zeros(1, device=device)

    @property
    def reads(self) -> set[int]:
        """Layers after which a method reads the residuals."""
        return {layer for method in self.methods for layer in method.reads}

    @property
    def writes(self) -> set[int]:
        """Layers after which a method edits the residuals."""
        return {layer for method in self.methods for layer in method.writes}

    def begin(self, row: int, request: SteeringRequest | None) -> None:
        """Give a row to a request, None for one that is not steered, which is computed from its first token on."""
        if request is None:
            self.batch.begin(row)
        else:
            self.batch.begin(row, request.n_counted, [self.groups.index(name) for name in request.maps])
        for method in self.methods:
            method.begin(row, request)

    def keep_beside(self, cache: CacheSlots) -> None:
        """Keep what plans need of prompts beside the key/value cache."""
        for method in self.methods:
            if isinstance(method, PromptLatents):
                method.keep_beside(cache)

    def read(self, layer: int, h: Tensor) -> None:
        """Let the methods read the residuals of a step [n_tokens, d_in] after a layer."""
        for method in self.methods:
            if layer in method.reads:
                method.reads[layer](h)

    def write(self, layer: int, hidden: Tensor, residual: Tensor | None = None) -> None:
        """Edit the residuals of a step `hidden + residual`, [n_tokens, d_in], after a layer, in place.

        A row with an edit becomes h' and 0, and any other stays as it is, bit for bit.
        """
        for method in self.methods:
            if layer in method.writes:
                method.writes[layer](hidden, residual)
