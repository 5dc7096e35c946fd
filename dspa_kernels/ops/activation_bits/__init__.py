"""`activation_bits`: which latents are active on each row, kept as bits in the slots of a cache."""

import torch
from torch import Tensor

from dspa_kernels.backends import choose, define_op
from dspa_kernels.checks import check_contiguous, check_device, check_dtype, check_shape
from dspa_kernels.formulas import compute_dtype, n_words
from dspa_kernels.weights import ENCODER, FLOATS, SAEWeights


def activation_bits(h: Tensor, sae: SAEWeights, slots: Tensor, out: Tensor, *, backend: str = "auto") -> Tensor:
    """Keep the active latents of rows, for `bit_counts` to count them later.

    Nothing is read on the host, and Triton skips tiles of rows without a slot, so that a captured graph can serve steps
    with and without rows to keep.

    Args:
        h: residual rows [N, d_in], any floating dtype; N may be 0.
        sae: the SAE that reads them.
        slots: [N] int64, the slot of each row, below n_slots, none twice; -1 for a row that is not kept. Kernels do not
            check that, and write other memory if one is out of range.
        out: [n_slots, n_words(d_sae)] int32, contiguous. Latent j is bit `j % 32` of word `j // 32`, and unused bits
            are 0. The words of the named slots are overwritten, and others stay as they are.
        backend: "auto", "reference" or "triton".

    Returns:
        out. Not differentiable.

    Raises:
        InputError: an invalid shape, dtype or device.
        BackendError: the named backend cannot run.
    """
    check_shape("h", h, ("N", sae.d_in), "Flatten batch and sequence into one dimension.")
    check_dtype("h", h, FLOATS)
    check_device("sae", sae.encoder_rows, h, "h")
    check_shape("slots", slots, (h.shape[0],))
    check_dtype("slots", slots, (torch.int64,))
    check_device("slots", slots, h, "h")
    check_shape("out", out, ("n_slots", n_words(sae.d_sae)), "A row holds one bit per latent.")
    check_dtype("out", out, (torch.int32,))
    check_device("out", out, h, "h")
    check_contiguous("out", out, "Pass a tensor of its own.")
    chosen = choose("activation_bits", h.device, backend, compute_dtype(h, sae.encoder_rows))
    _activation_bits(h=h, **sae.encoder(), slots=slots, bits=out, backend=chosen)
    return out


def _fake(**_: object) -> None:
    return None


_activation_bits = define_op(
    "activation_bits",
    f"(Tensor h, {ENCODER}, Tensor slots, Tensor(a!) bits) -> ()",
    _fake,
    mutates=("bits",),
)
