"""The rule of Sparse Junction Steering, as a processor of logits of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import LogitsProcessor

from dspa.errors import refusal
from dspa.schemas import NonNegative, check
from dspa.steering.decisions import TopK, top_entropy

# Values [R, k] of candidates for the next token [R, k], after the tokens so far [R, T].
Values: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class JunctionProcessor(LogitsProcessor):
    """At a junction, a row where the entropy of the top-k is `threshold` or more: `z'_i = z_i + weight V_i`.

    Only the k candidates stay there, so that the next token is drawn from `softmax(z' / temperature)` over them. Other
    rows are left as they are, bit for bit. The rows are chosen on the host, since the values of others are not needed.

    ```python
    model.generate(**inputs, logits_processor=[JunctionProcessor(ValueModel(head, model))])
    ```

    Make one for each call of `generate()`: it keeps what it did.

    Args:
        value_model: returns the values [R, k] of candidates [R, k] after tokens [R, T].
        k: number of candidates, at least 2. Published: 10.
        threshold: in nats; None for every token. Published: 1.
        weight: factor of the values, >= 0. Published: 1.

    Attributes:
        junctions: True for rows that were junctions [R], for each token so far.

    Raises:
        ValueError: an invalid setting.
    """

    supports_continuous_batching = False

    def __init__(self, value_model: Values, k: int = 10, threshold: float | None = 1.0, weight: float = 1.0) -> None:
        self.value_model = value_model
        self.k: int = check(TopK, k, ValueError, "`k`")
        self.threshold = None if threshold is None else check(NonNegative, threshold, ValueError, "`threshold`")
        self.weight: float = check(NonNegative, weight, ValueError, "`weight`")
        self.junctions: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits [R, V] after the tokens `input_ids` [R, T] of `scores` [R, V].

        Raises:
            ValueError: values that are not one finite number per candidate.
        """
        at = top_entropy(scores, self.k) >= (-math.inf if self.threshold is None else self.threshold)
        self.junctions.append(at)
        rows = at.nonzero().flatten()
        if not len(rows):
            return scores
        top = scores[rows].topk(min(self.k, scores.shape[-1]))
        values = self.value_model(input_ids[rows], top.indices)
        if not isinstance(values, Tensor) or values.shape != top.indices.shape or not bool(values.isfinite().all()):
            got = list(values.shape) if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise refusal(ValueError, "What `value_model` returned", got, f"finite values {list(top.indices.shape)}")
        moved = torch.full_like(scores[rows], -math.inf)
        moved.scatter_(1, top.indices, top.values + self.weight * values.to(scores))
        return scores.index_copy(0, rows, moved)
