"""Floating-point operations of passes of a model, in closed form from sizes.

Operations are those of matrix products with weights and of attention's two products, a multiplication and an addition
each, as `torch.utils.flop_counter` counts them. Not counted are embeddings (no products), norms, and padding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dspa.models.sizes import ModelSizes


@dataclass(frozen=True)
class Cost:
    """Operations: products with weights, and attention's own."""

    weights: float
    attention: float = 0.0

    @property
    def total(self) -> float:
        """Sum of both."""
        return self.weights + self.attention

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of both."""
        return Cost(self.weights + other.weights, self.attention + other.attention)


def attention(model: ModelSizes, queries: int, keys: int) -> int:
    """Return the operations of one layer's two attention products, all pairs computed."""
    return 4 * model.d_attention * queries * keys


def forward(model: ModelSizes, lengths: Iterable[int], *, layers: slice = slice(None), n_logits: int = 0) -> Cost:
    """Return the cost of passes over whole texts.

    Args:
        model: the model.
        lengths: tokens of each text.
        layers: layers that run.
        n_logits: number of tokens whose logits are computed.
    """
    lengths, weights = list(lengths), model.layers[layers]
    return Cost(
        2 * (sum(weights) * sum(lengths) + model.head * n_logits),
        len(weights) * sum(attention(model, n, n) for n in lengths),
    )


def with_backward(cost: Cost, *, frozen: bool = False) -> Cost:
    """Return the cost of a pass with its way back, given that of the pass alone.

    On the way back, a product with weights costs the same again for the gradient of its input, and once more for that
    of its weights, unless they are frozen. Each of attention's products costs twice as much: both of its factors have a
    gradient.

    Args:
        cost: of the pass alone.
        frozen: True where the weights have no gradients.
    """
    return Cost((2 if frozen else 3) * cost.weights, 3 * cost.attention)
