"""Ablation of given latents in every answer, without a map: a fixed set per row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dspa.errors import ModelError, listed, refusal
from dspa.models.attachment import Attachment
from dspa.models.layers import CausalLM, check_model_name, device_of, loaded_name
from dspa.models.prompts import Prompts
from dspa.models.scopes import Scope
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import check_sae, required_layer
from dspa.schemas import NonNegative, check
from dspa.steering.calls import SteeredCall
from dspa.steering.decisions import Gate
from dspa.steering.gated import Gated
from dspa.steering.plans import check_device
from dspa_kernels import MapWeights, SteeringPlan, steer


@dataclass(eq=False)
class Assigned(Scope):
    """A block in which the rows of each call have these sets, None for no set."""

    names: tuple[str | None, ...]


class Ablation(Gated):
    """Ablation of latents of one SAE in all that a model generates while attached: `f_j' = max(0, f_j - alpha M)`.

    M is the largest latent of a token, so that `alpha=1` sets every latent of the set to 0 where it is active, and a
    smaller alpha is that of DSPA. Every token that predicts a response token is edited, as by a `Steering`.

    ```python
    with Ablation(sae, {"plain": [17, 4]}).attach(model):
        model.generate(**inputs)
    with Ablation(sae, {"plain": [17, 4], "curt": [5]}).attach(model) as ablation, ablation.rows(["curt", None]):
        model.generate(**two_prompts)
    ```

    A `Steering` at the same layer leaves the latents of a row's set to the ablation, whether it would ablate or augment
    them, so that none is edited twice. What was attached last edits first, and the other what it leaves.

    Args:
        sae: the SAE.
        sets: latents by the names of the sets. A single set is that of all rows outside of `rows()`.
        alpha: strength, >= 0.
        model_name: name of the model that the sets were chosen with, empty if that is not known.
        model_digest: `dspa.models.sources.model_digest` of that model, likewise. A model of other weights is refused.
        gate: which tokens of an answer are edited; None for all.

    Raises:
        SAEError: an SAE of another place than the output of a decoder layer.
        ValueError: no set, a set with one latent twice or with one that the SAE does not have, or an invalid alpha.
    """

    plan_names = ("slots", "signs")

    def __init__(
        self,
        sae: FrozenSAE,
        sets: Mapping[str, Sequence[int]],
        alpha: float = 1.0,
        *,
        model_name: str = "",
        model_digest: str = "",
        gate: Gate | None = None,
    ) -> None:
        super().__init__(gate)
        self.sae, self._layer = sae, required_layer(sae)
        self.alpha: float = check(NonNegative, alpha, ValueError, "`alpha`")
        self.sets = {name: tuple(latents) for name, latents in sets.items()}
        self.model_name, self._model_digest = model_name, model_digest
        if not self.sets:
            raise refusal(ValueError, "`sets`", "empty", "one set of latents or more, by their names")
        for name, latents in self.sets.items():
            if len(set(latents)) < len(latents) or not all(0 <= latent < sae.d_sae for latent in latents):
                accepted = f"different latents of the SAE, 0 to {sae.d_sae - 1}"
                raise refusal(ValueError, f"The set {name!r}", listed(latents), accepted)
        columns = sorted({latent for latents in self.sets.values() for latent in latents})
        self._columns = torch.tensor(columns, dtype=torch.int32)
        self._slots = {latent: slot for slot, latent in enumerate(columns)}
        self._weights = self._gathered()

    def _gathered(self) -> MapWeights:
        # The values of a map choose latents, which nothing does here.
        return MapWeights.gather(self._columns, torch.zeros(1, len(self._columns)), self.sae.weights)

    @property
    def layer(self) -> int:
        """Layer of the SAE."""
        return self._layer

    @property
    def model_digest(self) -> str:
        """Digest of the weights that the sets were chosen with, empty if that is not known."""
        return self._model_digest

    @property
    def positions(self) -> str:
        """Tokens that may be edited: those that predict a response token."""
        return "response"

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Give each row of the calls that this thread or asyncio task begins within a `with` block a set of its own.

        Args:
            names: name of the set of each prompt of a batch, None for a prompt without one.

        Raises:
            ValueError: a name of no set.
        """
        if unknown := sorted({name for name in names if name is not None} - self.sets.keys()):
            raise refusal(ValueError, "`names`", f"with {unknown[0]!r}", f"names of sets: {listed(self.sets)}, or None")
        with self._opened(Assigned(self, tuple(names))):
            yield

    def _prepare(self, model: CausalLM, stack: nn.ModuleList, model_name: str | None) -> None:
        check_sae("sae", self.sae, model, len(stack), model_name)
        check_model_name("The latents were chosen with", self.model_name, model_name or loaded_name(model))
        self.sae = self.sae.to(device_of(stack[self.layer]))
        self._weights = self._gathered()
        self._name_keywords()

    def latents(self, n_rows: int) -> list[tuple[int, ...]]:
        """Return the latents that are ablated in each row of a call that begins now.

        Raises:
            ModelError: another number of rows than `rows()` has names, or several sets without `rows()`.
        """
        if not self.enabled:
            return [()] * n_rows
        if (assigned := self._innermost(Assigned)) is None:
            if len(self.sets) > 1:
                got, accepted = "not known", "a name per row, `with ablation.rows(names): ...`"
                raise refusal(ModelError, f"Which of {len(self.sets)} sets each row has", got, accepted)
            return [*self.sets.values()] * n_rows
        if len(assigned.names) != n_rows:
            raise refusal(ModelError, "`rows()`", f"of {len(assigned.names)} names", f"{n_rows}, one per prompt")
        return [() if name is None else self.sets[name] for name in assigned.names]

    def _plan(self, prompts: Prompts, call: SteeredCall) -> dict[str, Tensor]:
        """Return the plan of each prompt: its set, of which all are ablated."""
        rows = self.latents(len(prompts.mask))
        slots = torch.full((len(rows), max(map(len, self.sets.values())) or 1), -1, dtype=torch.int32)
        for n, latents in enumerate(rows):
            slots[n, : len(latents)] = torch.tensor([self._slots[latent] for latent in latents])
        slots = slots.to(self.sae.device)
        return {"slots": slots, "signs": -(slots >= 0).to(torch.int8)}

    def _edit(self, h: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        gated = self._gated(h, kwargs)
        if gated is None:
            return None
        check_device("sae", self.sae, h)
        plan = SteeringPlan(*(kwargs[self._keys[name]].to(h.device) for name in self.plan_names))
        settings: dict[str, Any] = {"alpha": self.alpha, **gated[1]}
        edited: Tensor = steer(h.flatten(0, 1), self.sae.weights, self._weights, plan, **settings)
        return edited.view_as(h)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {len(latents)}" for name, latents in self.sets.items())
        return f"Ablation(layer={self.layer}, alpha={self.alpha:g}, latents of {sizes})"


def left_to_ablations(plan: SteeringPlan, columns: Tensor, attachment: Attachment, layer: int) -> SteeringPlan:
    """Return the plan of a map without the latents of each row that an attached ablation at the same layer has.

    Args:
        plan: the plan, one row per prompt.
        columns: latents of the map [C].
        attachment: all that is attached to the model.
        layer: layer that the plan is for.
    """
    ablations = [other for other in attachment.attached if isinstance(other, Ablation) and other.layer == layer]
    if not ablations:
        return plan
    slots = plan.slots.clone()
    latents = plan.latents(columns)
    for ablation in ablations:
        for row, taken in enumerate(ablation.latents(len(slots))):
            slots[row][torch.isin(latents[row], torch.tensor(taken, device=latents.device, dtype=latents.dtype))] = -1
    return SteeringPlan(slots, torch.where(slots < 0, 0, plan.signs))
