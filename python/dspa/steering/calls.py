"""The state of one call of a steered model, which is not the `Steering` that threads share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dspa.models.attachment import Call
from dspa.models.scopes import Scope
from dspa.steering.counters import COUNTED
from dspa.steering.decisions import Decisions
from dspa.steering.trace import Trace


@dataclass(eq=False)
class SteeredCall(Call):
    """A call that is steered. It travels with the plan, among the keywords that reach the layers.

    Attributes:
        counters: what the call counts, [6] int64.
        before: what they held when it began.
        enabled: False for a call within `disabled()`.
        number: number of the pass that made the latest plan.
        starts: column of each row's first response token [B], within `responses()`.
        traces: where its edits are recorded.
        decisions: those of its gate; None without one.
    """

    counters: Tensor | None = None
    before: tuple[int, ...] = ()
    enabled: bool = True
    number: int = 0
    starts: Tensor | None = None
    traces: tuple[Trace, ...] = ()
    decisions: Decisions | None = None

    @property
    def observes(self) -> bool:
        """True if its gate reads logits."""
        return self.decisions is not None and self.decisions.gate.reads_logits

    def begin(self, ends: Sequence[int], n_new: int) -> None:
        """Note the tokens that end an answer, and the largest number of its tokens."""
        if self.decisions is not None:
            self.decisions.begin(ends, n_new)

    def observe(self, ids: Tensor, logits: Tensor) -> None:
        """Let the gate read the logits from which the next token is chosen."""
        assert self.decisions is not None
        self.decisions.observe(ids, logits)

    def step_keywords(self, ids: Tensor, n_columns: int, n_total: int) -> dict[str, Tensor]:
        """Return which residuals of the next pass its gate lets be steered, nothing without a gate."""
        if self.decisions is None:
            return {}
        return {self.decisions.keyword: self.decisions.step(ids, n_columns, n_total)}

    def counted(self, name: str) -> int:
        """Return how often something was counted in the call. Waits for the device."""
        index = COUNTED.index(name)
        return 0 if self.counters is None else int(self.counters[index]) - self.before[index]


@dataclass(eq=False)
class Recording(Scope):
    """A block in which the owner records its edits in `trace`."""

    trace: Trace
