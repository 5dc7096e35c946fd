"""Control "random vector": another direction at the same layer, as long as the vector."""

from __future__ import annotations

import torch

from dspa.steering.vector import SteeringVector


def random_vector(vector: SteeringVector, seed: int) -> SteeringVector:
    """Return a vector of the same norm, layer, scale and positions, whose direction is uniform on the sphere.

    Args:
        vector: the vector.
        seed: of the draw.
    """
    numbers = vector.vector
    drawn = torch.randn(len(numbers), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn *= torch.linalg.vector_norm(numbers.double()).cpu() / torch.linalg.vector_norm(drawn)
    return vector.replaced(vector=drawn.to(numbers))
