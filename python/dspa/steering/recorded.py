"""The base of all that edits latents by a plan per prompt, and can record its edits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dspa.errors import ModelError, refusal
from dspa.models.attachment import LOCK, Attachment
from dspa.models.layers import base_model
from dspa.models.prompts import Prompts
from dspa.steering.calls import Recording, SteeredCall
from dspa.steering.decisions import Gate
from dspa.steering.gated import Gated
from dspa.steering.trace import Trace
from dspa_kernels import MapWeights, SAEWeights, SteeringPlan, steer


def attached_recorders(model: nn.Module) -> list[Recorded]:
    """Return all that is attached to `model` and can record its edits."""
    return [other for other in Attachment.of(base_model(model)).attached if isinstance(other, Recorded)]


class Recorded(Gated):
    """A `Gated` that edits latents of an SAE by a plan. A subclass has a `trace`, made by `_new_trace()`.

    Args:
        gate: which tokens of an answer may be edited; None for all.
        record: keep a record of every edit in `trace`.
    """

    trace: Trace

    def __init__(self, gate: Gate | None, *, record: bool) -> None:
        super().__init__(gate)
        self._record, self._n_plans = record, 0

    @property
    def record(self) -> bool:
        """True if every edit is kept in `trace`."""
        return self._record

    @abstractmethod
    def _new_trace(self) -> Trace:
        """Return an empty trace."""

    @contextmanager
    def recording(self) -> Iterator[Trace]:
        """Record the edits of the calls that this thread or asyncio task begins within a `with` block."""
        with self._opened(Recording(self, self._new_trace())) as scope:
            yield scope.trace

    def _traces(self) -> tuple[Trace, ...]:
        """Return where a call that begins now is recorded."""
        recording = self._innermost(Recording)
        return (*([self.trace] if self.record else []), *([recording.trace] if recording else []))

    def _mark_static(self, *arguments: Mapping[str, Any]) -> None:
        """Mark tensors that stay at their addresses, so that a CUDA graph need not copy them."""
        for tensor in (value for named in arguments for value in named.values() if isinstance(value, Tensor)):
            torch._dynamo.mark_static_address(tensor)

    def _check_cache(self, prompts: Prompts) -> None:
        """Raise `ModelError` if the whole prompt is to be edited, and a cache holds a part of it."""
        if self.positions == "all" and prompts.n_cached:
            raise refusal(
                ModelError,
                "The key/value cache",
                f"of {prompts.n_cached} tokens of the prompt",
                "an empty one, as positions='all' steers the whole prompt",
                "Pass no cache, or steer with positions='response'.",
            )

    def _number(self, call: SteeredCall) -> None:
        """Give a call the number of its new plan."""
        with LOCK:
            call.number = self._n_plans
            self._n_plans += 1

    def _steer(
        self,
        h: Tensor,
        kwargs: dict[str, Any],
        position_ids: Tensor,
        weights: tuple[SAEWeights, MapWeights],
        plan: SteeringPlan,
        **settings: Any,
    ) -> Tensor:
        """Return the edited residual [B, T, d_in] of a pass, and record its edits.

        Args:
            h: residual [B, T, d_in].
            kwargs: keywords that the layer was called with.
            position_ids: positions of the tokens [B, T].
            weights: the SAE, and its latents that a plan can have.
            plan: the plan.
            settings: those of `dspa_kernels.steer`, with the gate of the tokens.
        """
        call, inputs = kwargs[self._keys["call"]], (h.flatten(0, 1), *weights, plan)
        if not call.traces:
            edited: Tensor = steer(*inputs, **settings)
            return edited.view_as(h)
        if torch.compiler.is_compiling():
            kind = type(self).__name__
            raise ModelError(f"A compiled model cannot be recorded: make the {kind} with record=False.")
        edited, edits = steer(*inputs, record=True, **settings)
        tokens = kwargs.get(self._keys["tokens"])
        tokens = None if tokens is None else tokens.flatten()
        latents = plan.latents(weights[1].columns)
        for trace in call.traces:
            trace.add(call.number, settings.get("rows"), position_ids.flatten(), tokens, latents, edits)
        return edited.view_as(h)
