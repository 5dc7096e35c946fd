"""The specification of `bit_counts`, in plain PyTorch."""

import torch
from torch import Tensor

from dspa_kernels.formulas import WORD, row_blocks


def bit_counts(bits: Tensor, blocks: Tensor, block_size: int, n_tokens: Tensor, rows: Tensor, counts: Tensor) -> None:
    """counts[r, j] = number of the first n_tokens[r] tokens t of r with bit j of bits[slot(r, t)], for r in rows."""
    d_sae = counts.shape[1]
    bit = torch.arange(WORD, device=bits.device)
    for row in rows[rows >= 0].tolist():
        token = torch.arange(int(n_tokens[row]), device=bits.device)
        slots = blocks[row, token // block_size].long() * block_size + token % block_size
        counts[row] = 0
        for part in row_blocks(len(slots), d_sae):
            active = (bits[slots[part], :, None] >> bit) & 1
            counts[row] += active.flatten(1)[:, :d_sae].sum(dim=0, dtype=torch.int32)
