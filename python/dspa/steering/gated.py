"""What acts on the tokens of a call from where its prompt ends: the keywords that carry that, and given responses."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from dspa.errors import ModelError
from dspa.models.attachment import Attachable
from dspa.models.prompts import Prompts
from dspa.models.reading import READING
from dspa.steering.calls import SteeredCall
from dspa.steering.gates import first_steered, response_columns, token_gate, whole_sequences


class Gated(Attachable):
    """An `Attachable` that acts on the tokens which `positions` names, from the end of each prompt on.

    A subclass has `positions`, and calls `_name_keywords()` when it is attached. One that needs more per prompt than
    its end adds `plan_names` and `_plan()`.
    """

    # Names of the tensors of a plan.
    plan_names: ClassVar[tuple[str, ...]] = ()
    _serial = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self._keys: dict[str, str] = {}

    @property
    @abstractmethod
    def positions(self) -> str:
        """Tokens that are changed, as in `SteeringConfig.positions`."""

    def _plan(self, prompts: Prompts, call: SteeredCall) -> dict[str, Tensor]:
        """Return the plans of prompts, tensors with one row per prompt, by `plan_names`."""
        return {}

    def _name_keywords(self) -> None:
        # A graph compiled for an earlier one must not be found again.
        serial = next(self._serial)
        names = (*self.plan_names, "start", "call", "rows", "tokens")
        self._keys = {name: f"dspa_{serial}_{name}" for name in names}

    @contextmanager
    def responses(self, starts: Sequence[int] | Tensor) -> Iterator[None]:
        """Steer plain forward passes over given responses (teacher forcing), within a `with` block.

        Each pass gets whole sequences, prompt and response, with an attention_mask if they are padded, and no cache.

        Args:
            starts: column of each row's first response token [B], whole numbers.

        Raises:
            ModelError: this is not attached, or nothing was steered.
        """
        if self._attachment is None:
            raise ModelError(f"This {type(self).__name__} is not attached: call attach(model) first.")
        columns = response_columns(starts)
        if not self.enabled:
            yield
            return
        with self.checked_call():
            call = self._innermost(SteeredCall)
            assert call is not None
            call.starts = columns
            yield

    def _new_call(self) -> SteeredCall:
        return SteeredCall(self)

    @property
    def keywords(self) -> tuple[str, ...]:
        """Names of the keywords that hold the plan in `generate()`, and the call that it belongs to."""
        return tuple(self._keys[name] for name in (*self.plan_names, "start", "call"))

    def call_keywords(self, prompts: Prompts | None) -> dict[str, Any]:
        """Return the plan of each prompt as keyword tensors, one row per prompt, and the call."""
        if not self.keywords:
            return {}
        call = self._innermost(SteeredCall)
        if prompts is None or call is None:
            return {self._keys["call"]: SteeredCall(self, enabled=False)}
        start = first_steered(prompts.last_position, self.positions)
        return self._named({**self._plan(prompts, call), "start": start, "call": call})

    def _named(self, values: dict[str, Any]) -> dict[str, Any]:
        return {self._keys[name]: value for name, value in values.items()}

    def pass_keywords(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], read: dict[tuple[int, ...], dict[int, Tensor]]
    ) -> dict[str, Any]:
        """Return the plan of a pass over given responses, and its tokens where its edits are recorded."""
        if not self.keywords or not self._acts_on(kwargs):
            return {}
        call: SteeredCall | None = kwargs.get(self._keys["call"])
        added: dict[str, Any] = {}
        if call is None:
            call = self._innermost(SteeredCall)
            if call is None or call.starts is None:
                raise ModelError(
                    "This model is steered and was called outside of generate(), or by it for another text (as with "
                    "guidance_scale), so it is not known where the response begins. Pass it, `with "
                    "steering.responses(starts): model(...)`, or call dspa.detach(model) first."
                )
            prompts, rows = whole_sequences(args, kwargs, call.starts, self.positions)
            prompts = replace(prompts, residuals=read.setdefault(tuple(call.starts.tolist()), {}))
            added = {**self._plan(prompts, call), "rows": rows, "call": call}
        if call.traces:
            added["tokens"] = kwargs.get("input_ids", args[0] if args else None)
        return self._named(added)

    def _acts_on(self, kwargs: dict[str, Any]) -> bool:
        call = kwargs.get(self._keys["call"])
        return self.enabled if call is None else bool(call.enabled)

    def _gate(self, h: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Return the positions of a pass's tokens [B, T] and their `token_gate`, or None for a pass that only reads.

        Args:
            h: residual [B, T, d_in].
            kwargs: keywords that the layer was called with.
        """
        if kwargs.get(READING) is not None:
            return None
        if kwargs.get(self._keys["call"]) is None or kwargs.get("position_ids") is None:
            raise ModelError(
                "This model is steered, and its layers were called without a plan or position_ids: directly, by a "
                "serving loop, or because this architecture keeps them from its layers and cannot be steered. Call "
                "the model itself, or call dspa.detach(model) first."
            )
        positions = kwargs["position_ids"].expand(*h.shape[:2]).to(h.device)
        return positions, token_gate(positions, kwargs.get(self._keys["start"]), kwargs.get(self._keys["rows"]))
