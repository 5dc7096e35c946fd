"""Rows of outlying norm: the first token of a text, in models without a BOS token, and other attention sinks."""

from __future__ import annotations

import torch
from torch import Tensor


def typical_rows(rows: Tensor, max_norm_ratio: float) -> Tensor:
    """Return a mask of the rows whose norm is at most `max_norm_ratio` times the median norm of all of them.

    As dictionary_learning leaves rows out for its SAEs of Qwen models, with a ratio of 10. At least half of the rows
    are kept, and all of them where the median is 0.

    Args:
        rows: residuals [N, d_in], of any float dtype.
        max_norm_ratio: 1 or more, or 0 to keep all rows.

    Returns:
        [N] bool.
    """
    if not max_norm_ratio or not len(rows):
        return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))
    median = norms.median()
    return (norms <= max_norm_ratio * median) | (median == 0)
