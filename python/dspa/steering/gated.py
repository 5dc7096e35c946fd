"""What acts on the tokens of a call from where its prompt ends: the keywords that carry that, and given responses."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dspa.errors import ModelError, refusal
from dspa.models.attachment import Attachable
from dspa.models.prompts import Prompts
from dspa.models.reading import READING
from dspa.steering.calls import SteeredCall
from dspa.steering.decisions import GATES, Decisions, Gate, prompt_key
from dspa.steering.gates import first_steered, response_columns, token_gate, whole_sequences


class Gated(Attachable):
    """An `Attachable` that acts on the tokens which `positions` names, from the end of each prompt on.

    A subclass has `positions`, and calls `_name_keywords()` when it is attached. One that needs more per prompt than
    its end adds `plan_names` and `_plan()`.

    Args:
        gate: which tokens of an answer it acts on; None for all.

    Raises:
        TypeError: a gate of another type.
    """

    # Names of the tensors of a plan.
    plan_names: ClassVar[tuple[str, ...]] = ()
    _serial = itertools.count()

    def __init__(self, gate: Gate | None = None) -> None:
        super().__init__()
        self._keys: dict[str, str] = {}
        self.gate = gate

    @property
    @abstractmethod
    def positions(self) -> str:
        """Tokens that are changed, as in `SteeringConfig.positions`."""

    @property
    def gate(self) -> Gate | None:
        """Which tokens of an answer this acts on, None for all. It can be set while this is not attached."""
        return self._gate

    @gate.setter
    def gate(self, gate: Gate | None) -> None:
        if gate is not None and not isinstance(gate, Gate):
            raise refusal(TypeError, "`gate`", f"a {type(gate).__name__}", f"{GATES}, or None")
        if self._attachment is not None:
            raise ModelError("`gate` cannot be changed while this is attached: detach() it first.")
        self._gate = gate
        self._decisions: Decisions | None = None

    @property
    def decisions(self) -> Decisions | None:
        """The decisions of the gate in the latest call, `decisions.share` among them; None without a gate."""
        return self._decisions

    @property
    def stepwise(self) -> bool:
        """True if the gate reads the logits before each token."""
        return self.gate is not None and self.gate.reads_logits

    @property
    def _acts_everywhere(self) -> bool:
        """True if all tokens are changed alike, for which nothing has to be known about a prompt."""
        return self.positions == "all" and self.gate is None and not self.plan_names

    def _plan(self, prompts: Prompts, call: SteeredCall) -> dict[str, Tensor]:
        """Return the plans of prompts, tensors with one row per prompt, by `plan_names`."""
        return {}

    def _name_keywords(self) -> None:
        # A graph compiled for an earlier one must not be found again.
        serial = next(self._serial)
        names = (*self.plan_names, "start", "call", "rows", "tokens", "opened")
        self._keys = {name: f"dspa_{serial}_{name}" for name in names}

    def responses(self, starts: Sequence[int] | Tensor) -> AbstractContextManager[None]:
        """Steer plain forward passes over given responses (teacher forcing), within a `with` block.

        Each pass gets whole sequences, prompt and response, with an attention_mask if they are padded, and no cache.

        Args:
            starts: column of each row's first response token [B], whole numbers.

        Raises:
            ModelError: this is not attached, its gate reads the logits before each token, or nothing was steered.
        """
        if self._attachment is None:
            raise ModelError(f"This {type(self).__name__} is not attached: call attach(model) first.")
        if self.stepwise and self.enabled:
            raise ModelError(
                f"The gate of this {type(self).__name__}, an {type(self.gate).__name__}, reads the logits before each "
                "token, which a pass over whole sequences does not have. dspa.evaluate.responses.log_probabilities() "
                "reads responses token by token, as generate() writes them."
            )
        return self._teacher_forced(response_columns(starts))

    @contextmanager
    def _teacher_forced(self, columns: Tensor) -> Iterator[None]:
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
        if self._acts_everywhere:
            return ()
        return tuple(self._keys[name] for name in (*self.plan_names, "start", "call"))

    def call_keywords(self, prompts: Prompts | None) -> dict[str, Any]:
        """Return the plan of each prompt as keyword tensors, one row per prompt, and the call."""
        if not self.keywords:
            return {}
        call = self._innermost(SteeredCall)
        if prompts is None or call is None:
            return {self._keys["call"]: SteeredCall(self, enabled=False)}
        start = first_steered(prompts.last_position, self.positions)
        self._decide(prompts, call)
        return self._named({**self._plan(prompts, call), "start": start, "call": call})

    def _decide(self, prompts: Prompts, call: SteeredCall) -> Decisions | None:
        """Begin the decisions of the gate for the prompts of a call, if there is one."""
        if self.gate is not None:
            tokens = prompts.inputs.get("input_ids", torch.zeros_like(prompts.positions))
            key = prompt_key(tokens, prompts.mask)
            call.decisions = Decisions(self.gate, key, prompts.mask.shape[1], self._keys["opened"])
        self._decisions = call.decisions
        return call.decisions

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
            prompts, rows, index = whole_sequences(args, kwargs, call.starts, self.positions)
            prompts = replace(prompts, residuals=read.setdefault(tuple(call.starts.tolist()), {}))
            added = {**self._plan(prompts, call), "rows": rows, "call": call}
            if decisions := self._decide(prompts, call):
                added["opened"] = decisions.teacher_forced(index)
        if call.traces:
            added["tokens"] = kwargs.get("input_ids", args[0] if args else None)
        return self._named(added)

    def _acts_on(self, kwargs: dict[str, Any]) -> bool:
        call = kwargs.get(self._keys["call"])
        return self.enabled if call is None else bool(call.enabled)

    def _gated(self, h: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]] | None:
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
        opened: Tensor | None = kwargs.get(self._keys["opened"])
        if self.gate is not None:
            if opened is None:
                raise ModelError(f"{type(self).__name__} has a gate, which this way of generating does not tell of.")
            opened = opened.to(h.device)
        return positions, token_gate(positions, kwargs.get(self._keys["start"]), kwargs.get(self._keys["rows"]), opened)

    def _steered(self, h: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Return the tokens of a pass that are changed [B, T] bool, None for all. The arguments are those of `_gated`.

        A pass that only reads changes what is changed alike in every pass, or nothing.
        """
        if self.positions == "all" and (self.gate is None or kwargs.get(READING) is not None):
            return None
        gated = self._gated(h, kwargs)
        if gated is None:
            return torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)
        _, gate = gated
        steered = gate["rows"] >= 0 if "rows" in gate else gate["positions"] >= gate["start"]
        return steered.view(h.shape[:2])
