"""The state of one call of a steered model, which is not the `Steering` that threads share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dspa.models.attachment import Call
from dspa.models.scopes import Scope
from dspa.steering.counters import COUNTED
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
    """

    counters: Tensor | None = None
    before: tuple[int, ...] = ()
    enabled: bool = True
    number: int = 0
    starts: Tensor | None = None
    traces: tuple[Trace, ...] = ()

    def counted(self, name: str) -> int:
        """Return how often something was counted in the call. Waits for the device."""
        index = COUNTED.index(name)
        return 0 if self.counters is None else int(self.counters[index]) - self.before[index]


@dataclass(eq=False)
class Recording(Scope):
    """A block in which the owner records its edits in `trace`."""

    trace: Trace
