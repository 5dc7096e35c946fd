"""Steering by sets of latents that are chosen by hand, without a map: one for all prompts, or another for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dspa.config import POSITIONS
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
from dspa.steering.latent_sets import LatentSet, plans_of
from dspa.steering.plans import check_device
from dspa.steering.recorded import Recorded
from dspa.steering.trace import Trace
from dspa_kernels import MapWeights, SteeringPlan


@dataclass(eq=False)
class Assigned(Scope):
    """A block in which the rows of each call have these sets, None for no set."""

    names: tuple[str | None, ...]


class LatentSteering(Recorded):
    """Edits of latents of one SAE that are chosen by hand, in all that a model generates while attached.

    ```python
    with dspa.Steering.of_latents(sae, {971: 4.0, 77: -2.0}).attach(model):
        model.generate(**inputs)
    sets = {"formal": LatentSet({971: 4.0}), "plain": LatentSet.of([17, 4])}
    with LatentSteering(sae, sets).attach(model) as steering, steering.rows(["formal", None, "plain"]):
        model.generate(**three_prompts)
    ```

    `LatentSet` says what a set does. A `Steering` at the same layer leaves the latents of a row's set to it, so that
    none is edited twice. What was attached last edits first, and the other what it leaves.

    With `record=True`, `trace` holds every edit. Recording reads no more of the SAE, but waits for the device.

    Args:
        sae: the SAE.
        sets: sets by name. A single one is that of all rows outside of `rows()`.
        alpha: in place of the strengths, ablate all latents of the sets as DSPA does, `max(f - alpha M, 0)` with M the
            largest latent of the token. None for the strengths.
        positions: "response", from the last token of each prompt on; "generated", from the first of the answer on; or
            "all".
        record: keep a record of every edit in `trace`.
        gate: which tokens of an answer may be edited; None for all.
        model_name: name of the model that the sets were chosen with, empty if that is not known.
        model_digest: `dspa.models.sources.model_digest` of that model, likewise. A model of other weights is refused.

    Raises:
        SAEError: an SAE of another place than the output of a decoder layer.
        ValueError: no set, a set with a latent that the SAE does not have, or an invalid `alpha` or `positions`.
    """

    plan_names = ("slots", "signs", "strengths")

    def __init__(
        self,
        sae: FrozenSAE,
        sets: Mapping[str, LatentSet],
        *,
        alpha: float | None = None,
        positions: str = "response",
        record: bool = False,
        gate: Gate | None = None,
        model_name: str = "",
        model_digest: str = "",
    ) -> None:
        super().__init__(gate, record=record)
        self.sae, self._layer = sae, required_layer(sae)
        self.alpha: float | None = None if alpha is None else check(NonNegative, alpha, ValueError, "`alpha`")
        self._positions = positions
        self.sets = dict(sets)
        self.model_name, self._model_digest = model_name, model_digest
        self.trace = self._new_trace()
        if positions not in POSITIONS:
            raise refusal(ValueError, "`positions`", repr(positions), ", ".join(POSITIONS))
        if not self.sets:
            raise refusal(ValueError, "`sets`", "empty", "one set of latents or more, by their names")
        self._columns, self._plans = plans_of(self.sets.values())
        if len(self._columns) and self._columns[-1] >= sae.d_sae:
            accepted = f"latents of the SAE, 0 to {sae.d_sae - 1}"
            raise refusal(ValueError, "A set of latents", f"with {self._columns[-1]}", accepted)
        self._weights = self._gathered()

    def _gathered(self) -> MapWeights:
        # The values of a map choose latents, which nothing does here.
        return MapWeights.gather(self._columns, torch.zeros(1, len(self._columns)), self.sae.weights)

    def _new_trace(self) -> Trace:
        return Trace()

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
        """Tokens that may be edited."""
        return self._positions

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
        self._mark_static(self.sae.weights.encoder(), self._weights.latents())
        self._name_keywords()

    def _names(self, n_rows: int) -> list[str | None]:
        """Return the name of the set of each row of a call that begins now.

        Raises:
            ModelError: another number of rows than `rows()` has names, or several sets without `rows()`.
        """
        if not self.enabled:
            return [None] * n_rows
        if (assigned := self._innermost(Assigned)) is None:
            if len(self.sets) > 1:
                got, accepted = "not known", "a name per row, `with steering.rows(names): ...`"
                raise refusal(ModelError, f"Which of {len(self.sets)} sets each row has", got, accepted)
            return [*self.sets] * n_rows
        if len(assigned.names) != n_rows:
            raise refusal(ModelError, "`rows()`", f"of {len(assigned.names)} names", f"{n_rows}, one per prompt")
        return [*assigned.names]

    def latents(self, n_rows: int) -> list[tuple[int, ...]]:
        """Return the latents of the set of each row of a call that begins now.

        Raises:
            ModelError: another number of rows than `rows()` has names, or several sets without `rows()`.
        """
        return [() if name is None else tuple(self.sets[name].strengths) for name in self._names(n_rows)]

    def _new_call(self) -> SteeredCall:
        return SteeredCall(self, traces=self._traces())

    def _plan(self, prompts: Prompts, call: SteeredCall) -> dict[str, Tensor]:
        """Return the plan of each prompt: its set."""
        self._check_cache(prompts)
        self._number(call)
        numbers = {name: n for n, name in enumerate(self.sets)}
        # The last row of the plans is that of no set.
        rows = [-1 if name is None else numbers[name] for name in self._names(len(prompts.mask))]
        plan = {name: getattr(self._plans, name)[rows] for name in self.plan_names}
        if self.alpha is not None:
            plan["signs"] = SteeringPlan.ABLATE * (plan["slots"] >= 0).to(torch.int8)
        return {name: tensor.to(self.sae.device) for name, tensor in plan.items()}

    def _edit(self, h: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        gated = self._gated(h, kwargs)
        if gated is None:
            return None
        check_device("sae", self.sae, h)
        positions, gate = gated
        slots, signs, strengths = (kwargs[self._keys[name]].to(h.device) for name in self.plan_names)
        plan = SteeringPlan(slots, signs, strengths if self.alpha is None else None)
        settings: dict[str, Any] = gate if self.alpha is None else {**gate, "alpha": self.alpha}
        return self._steer(h, kwargs, positions, (self.sae.weights, self._weights), plan, **settings)

    def __repr__(self) -> str:
        what = "; ".join(
            f"{name}: {chosen}" if len(self.sets) > 1 else str(chosen) for name, chosen in self.sets.items()
        )
        alpha = "" if self.alpha is None else f", alpha={self.alpha:g}"
        return f"LatentSteering(layer={self.layer}{alpha}, {what})"


def left_to_latent_sets(plan: SteeringPlan, columns: Tensor, attachment: Attachment, layer: int) -> SteeringPlan:
    """Return the plan of a map without the latents of each row that an attached `LatentSteering` at its layer has.

    Args:
        plan: the plan, one row per prompt.
        columns: latents of the map [C].
        attachment: all that is attached to the model.
        layer: layer that the plan is for.
    """
    others = [other for other in attachment.attached if isinstance(other, LatentSteering) and other.layer == layer]
    if not others:
        return plan
    slots = plan.slots.clone()
    latents = plan.latents(columns)
    for other in others:
        for row, taken in enumerate(other.latents(len(slots))):
            slots[row][torch.isin(latents[row], torch.tensor(taken, device=latents.device, dtype=latents.dtype))] = -1
    return SteeringPlan(slots, torch.where(slots < 0, 0, plan.signs))
