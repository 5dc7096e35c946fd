"""`bit_counts`: the number of a row's tokens on which each latent is active, from the bits that were kept of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspa_kernels.backends import choose, define_op
from dspa_kernels.checks import check_buffers, check_device, check_dtype, check_shape, check_whole, refuse
from dspa_kernels.formulas import n_words


def bit_counts(
    bits: Tensor,
    blocks: Tensor,
    block_size: int,
    n_tokens: Tensor,
    rows: Tensor,
    out: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Count the active latents of prompts whose tokens lie in the blocks of a cache, see `activation_bits`.

    Token t of row r lies in slot `blocks[r, t // block_size] * block_size + t % block_size`. Nothing is read on the
    host, so that a captured graph can serve steps with and without rows to count. Kernels check neither rows nor
    blocks, and read other memory if one is out of range.

    Args:
        bits: [n_slots, n_words(d_sae)] int32, the active latents of the token in each slot. Latent j is bit `j % 32`
            of word `j // 32`.
        blocks: [R, n_blocks] int32, the blocks of each row, in the order of its tokens; each row contiguous.
        block_size: slots of a block, >= 1.
        n_tokens: [R] int64, how many tokens of each row are counted, from the first.
        rows: [n] int32, the rows to count in this call, -1 for none, no row twice.
        out: [R, d_sae] int32, contiguous, the counts. Those of rows that are not named stay as they are.
        backend: "auto", "reference" or "triton".

    Returns:
        out. Not differentiable.

    Raises:
        InputError: an invalid shape, dtype, device or number.
        BackendError: the named backend cannot run.
    """
    n_rows = len(n_tokens)
    check_whole("block_size", block_size, 1)
    buffers: dict[str, tuple[Tensor, torch.dtype, Sequence[int | str]]] = {
        "out": (out, torch.int32, (n_rows, "d_sae")),
        "bits": (bits, torch.int32, ("n_slots", n_words(out.shape[-1]))),
        "n_tokens": (n_tokens, torch.int64, ("R",)),
        "rows": (rows, torch.int32, ("n",)),
    }
    check_buffers(buffers, bits, "bits")
    check_shape("blocks", blocks, (n_rows, "n_blocks"))
    check_dtype("blocks", blocks, (torch.int32,))
    check_device("blocks", blocks, bits, "bits")
    if blocks.shape[1] > 1 and blocks.stride(1) != 1:
        raise refuse("blocks", f"with a stride of {blocks.stride(1)} in its rows", "contiguous rows")
    _bit_counts(
        bits=bits,
        blocks=blocks,
        block_size=block_size,
        n_tokens=n_tokens,
        rows=rows,
        counts=out,
        backend=choose("bit_counts", bits.device, backend),
    )
    return out


def _fake(**_: object) -> None:
    return None


_bit_counts = define_op(
    "bit_counts",
    "(Tensor bits, Tensor blocks, int block_size, Tensor n_tokens, Tensor rows, Tensor(a!) counts) -> ()",
    _fake,
    mutates=("counts",),
)
