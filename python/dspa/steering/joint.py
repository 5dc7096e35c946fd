"""Steerings at several layers of one model, which act together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from dspa.errors import refusal
from dspa.steering.dspa import Steering
from dspa.steering.trace import Trace
from dspa_kernels import SteeringPlan


class JointSteering:
    """Steering of one model at several layers at once: all of its parts are attached, or none.

    ```python
    parts = [dspa.Steering(sae_8, sae_20, cdmap), dspa.Steering(sae_8, sae_8, other_map, config)]
    with dspa.JointSteering(parts).attach(model):
        model.generate(**inputs, max_new_tokens=200)
    ```

    Each prompt is read once, unsteered, up to the highest layer of an input SAE, so that every part has the plan that
    it would have alone. Edits are made at each part's own output layer. A lower one changes the residuals that a higher
    one edits.

    What a Steering has for itself, this has by output layer: `plans`, `paths`, and the traces of `recording()`. Other
    attachables, such as vectors and adapters, can be attached beside it.

    Args:
        parts: Steerings of different output layers, each with settings of its own.

    Raises:
        TypeError: a part that is not a `Steering`.
        ValueError: no parts, or two of one output layer.
    """

    def __init__(self, parts: Iterable[Steering]) -> None:
        self.parts = tuple(parts)
        if not self.parts:
            raise refusal(ValueError, "`parts`", "empty", "one dspa.Steering or more")
        for part in self.parts:
            if not isinstance(part, Steering):
                raise refusal(TypeError, "A part", f"a {type(part).__name__}", "a dspa.Steering")
        check_layers("`parts`", self.layers)

    @property
    def layers(self) -> list[int]:
        """Output layer of each part."""
        return [part.layer for part in self.parts]

    @property
    def plans(self) -> dict[int, SteeringPlan | None]:
        """Plan of the latest call by output layer, one row per prompt."""
        return {part.layer: part.plan for part in self.parts}

    @property
    def paths(self) -> dict[int, dict[str, int]]:
        """`Steering.paths` by output layer."""
        return {part.layer: part.paths for part in self.parts}

    @property
    def enabled(self) -> bool:
        """False within `disabled()`, of this or of a part."""
        return all(part.enabled for part in self.parts)

    def attach(
        self,
        model: nn.Module,
        *,
        layers: str | None = None,
        model_name: str | None = None,
        other_weights: bool = False,
    ) -> JointSteering:
        """Steer `model` by all parts until `detach()`, or until the end of a `with` block.

        Arguments and errors are those of `Steering.attach`. After an error nothing of this is attached.
        """
        with ExitStack() as attached:
            for part in self.parts:
                part.attach(model, layers=layers, model_name=model_name, other_weights=other_weights)
                attached.callback(part.detach)
            attached.pop_all()
        return self

    def detach(self) -> None:
        """Leave the model as it was. Does nothing when not attached."""
        for part in reversed(self.parts):
            part.detach()

    def __enter__(self) -> JointSteering:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def check_attached(self, model: nn.Module) -> None:
        """Raise `ModelError` unless all parts are attached to `model`."""
        for part in self.parts:
            part.check_attached(model)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Leave residuals as they are within a `with` block, as `Steering.disabled` does."""
        with ExitStack() as blocks:
            for part in self.parts:
                blocks.enter_context(part.disabled())
            yield

    @contextmanager
    def responses(self, starts: Sequence[int] | Tensor) -> Iterator[None]:
        """Steer plain forward passes over given responses, as `Steering.responses` does.

        Args:
            starts: column of each row's first response token [B], whole numbers.
        """
        with ExitStack() as blocks:
            for part in self.parts:
                blocks.enter_context(part.responses(starts))
            yield

    @contextmanager
    def checked_call(self) -> Iterator[None]:
        """Raise what `Steering.checked_call` raises, of any part."""
        with ExitStack() as blocks:
            for part in self.parts:
                blocks.enter_context(part.checked_call())
            yield

    @contextmanager
    def recording(self) -> Iterator[dict[int, Trace]]:
        """Record the edits of the calls that this thread or asyncio task begins, as a trace for each output layer."""
        with ExitStack() as blocks:
            yield {part.layer: blocks.enter_context(part.recording()) for part in self.parts}

    def __repr__(self) -> str:
        parts = "\n".join(f"  {part.extra_repr()}" for part in self.parts)
        return f"JointSteering(\n{parts}\n)"


def check_layers(name: str, layers: Iterable[int]) -> None:
    """Raise `ValueError` where two parts have one output layer. `name` is that of the parts in messages."""
    if doubled := [(layer, n_parts) for layer, n_parts in Counter(layers).items() if n_parts > 1]:
        layer, n_parts = doubled[0]
        got, accepted = f"with {n_parts} of layer {layer}", "one for each output layer"
        advice = "Two edits of one residual would undo each other in part: make one map of the triples of both."
        raise refusal(ValueError, name, got, accepted, advice)
