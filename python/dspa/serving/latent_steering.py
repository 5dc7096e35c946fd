"""Sets of latents of the requests of an engine: one of them edits the residuals of a request."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dspa.errors import SAEError
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import required_layer
from dspa.serving.batch import Batch
from dspa.serving.requests import SteeringRequest
from dspa.serving.settings import Place, ServingSettings
from dspa.steering.latent_sets import LatentSet, plans_of
from dspa_kernels import MapWeights, SteeringPlan, steer_


class ChosenLatents:
    """The sets of latents of an engine, and for each of its R requests the plan of its set, and from where it acts.

    Args:
        settings: settings of the engine.
        batch: the tokens of its steps.
        load_sae: returns the SAE at a place, on the device of the residuals.

    Attributes:
        reads: empty.
        writes: `edit` of the layer of the SAE, by that layer.

    Raises:
        SAEError: a file that is another one now, or is damaged.
    """

    def __init__(self, settings: ServingSettings, batch: Batch, load_sae: Callable[[Place], FrozenSAE]) -> None:
        assert settings.sae_latents is not None
        self.batch = batch
        self.sae = load_sae(settings.sae_latents)
        self.names = list(settings.latents)
        columns, plans = plans_of([_load(place) for place in settings.latents.values()])
        self.weights = MapWeights.gather(columns, torch.zeros(1, len(columns)), self.sae.weights)
        self.plans = plans.to(batch.device)
        # The last row of the plans is that of no set.
        self.plan = SteeringPlan(*(tensor[-1:].repeat(batch.n_requests, 1) for tensor in self._tensors(self.plans)))
        self.first_edited = torch.zeros(batch.n_requests, dtype=torch.int64, device=batch.device)
        self.reads: dict[int, Callable[[Tensor], None]] = {}
        self.writes: dict[int, Callable[[Tensor, Tensor | None], None]] = {required_layer(self.sae): self.edit}

    def begin(self, row: int, request: SteeringRequest | None) -> None:
        """Give a row to a request, None for one that is not steered."""
        chosen = None if request is None else request.dspa_latents
        number = -1 if chosen is None else self.names.index(chosen)
        for held, made in zip(self._tensors(self.plan), self._tensors(self.plans), strict=True):
            held[row] = made[number]
        if chosen is not None and request is not None:
            self.first_edited[row] = request.first_edited

    @staticmethod
    def _tensors(plan: SteeringPlan) -> tuple[Tensor, Tensor, Tensor]:
        assert plan.strengths is not None
        return plan.slots, plan.signs, plan.strengths

    def edit(self, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit the residuals of a step `hidden + residual`, [n_tokens, d_in], after the layer of the SAE, in place."""
        row, position = self.batch.tokens(len(hidden))
        steer_(
            hidden,
            self.sae.weights,
            self.weights,
            self.plan,
            row,
            residual=residual,
            positions=position,
            start=self.first_edited,
        )


def _load(place: Place) -> LatentSet:
    place.check_unchanged(SAEError)
    return LatentSet.read(place.path)
