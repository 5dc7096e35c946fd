"""Modules over the ops: an SAE for inference that can replace one of SAELens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from dspa_kernels import eager
from dspa_kernels.backends import is_intercepted, is_plain
from dspa_kernels.checks import check_device, check_dtype, check_shape, refuse
from dspa_kernels.formulas import compute_dtype, product, row_blocks
from dspa_kernels.ops.sparse_decode import sparse_decode
from dspa_kernels.ops.sparse_encode import sparse_encode
from dspa_kernels.weights import FLOATS, SAEWeights, SparseLatents, check_k


class FusedSAE(nn.Module):
    """An SAE whose `encode`, `decode` and call return the same as those of a `sae_lens.SAE`, in the SAE's dtype.

    `x [..., d_in]` may have any leading dimensions. If the number of active latents is bounded, by k of a top-k SAE or
    by `capacity`, a call uses sparse latents and makes no dense `[..., d_sae]`. Inputs are rounded to the SAE's dtype,
    as in SAELens. Sums are in fp32. Not differentiable.

    Args:
        weights: the SAE, for instance `dspa.FrozenSAE.weights`, where everything is folded. It is copied.
        b_dec: [d_in] decoder bias, for instance `dspa.FrozenSAE.b_dec`; zeros if None. It is copied.
        capacity: places per row for active latents, by default k of a top-k SAE, else unbounded. A row with more
            active latents becomes NaN as a whole.
        backend: "auto", "reference", "triton" or "cuda".

    Attributes:
        weights: the buffers as `SAEWeights`.
        encoder_rows: buffer [d_sae, d_in], one contiguous row per latent.
        W_enc: [d_in, d_sae], a transposed view of encoder_rows.
        b_enc: buffer [d_sae], which stays fp32 whatever `.to` is given.
        threshold: buffer [d_sae], which stays fp32 as well.
        W_dec: buffer [d_sae, d_in].
        b_dec: buffer [d_in].

    Raises:
        InputError: an invalid shape, dtype, device or capacity.
    """

    encoder_rows: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def __init__(
        self,
        weights: SAEWeights,
        b_dec: Tensor | None = None,
        *,
        capacity: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        b_dec = weights.W_dec.new_zeros(weights.d_in) if b_dec is None else b_dec
        check_shape("b_dec", b_dec, (weights.d_in,))
        check_dtype("b_dec", b_dec, FLOATS)
        check_device("b_dec", b_dec, weights.W_dec, "weights.W_dec")
        if capacity is not None:
            check_k("capacity", capacity, weights.d_sae)
        for name in ROWS:
            self.register_buffer(name, getattr(weights, name).detach().clone())
        self.register_buffer("b_dec", b_dec.detach().to(weights.W_dec.dtype, copy=True))
        self.capacity = capacity or weights.k or None
        self.backend = backend
        self._weights = replace(weights, **{name: getattr(self, name) for name in ROWS})
        self._removed: tuple[Tensor, Tensor] | None = None

    @property
    def weights(self) -> SAEWeights:
        """The buffers, as the ops take them."""
        # Not by name through the module, whose search takes longer than a small product.
        sae, buffers = self._weights, self._buffers
        if (
            sae.encoder_rows is not buffers["encoder_rows"]
            or sae.b_enc is not buffers["b_enc"]
            or sae.threshold is not buffers["threshold"]
            or sae.W_dec is not buffers["W_dec"]
        ):
            self._weights = sae = replace(sae, **{name: getattr(self, name) for name in ROWS})
        return sae

    @property
    def W_enc(self) -> Tensor:
        """Encoder [d_in, d_sae], a transposed view of `encoder_rows`."""
        return self.encoder_rows.T

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents [..., d_sae] of x [..., d_in], dense."""
        rows, width = self._rows(x), self.weights.d_sae
        self._removed = self._statistics(rows, x.shape)
        if self._is_eager(rows):
            return _shaped(eager.encode(*self._encoder(rows), self.capacity), x.shape)
        f = rows.new_zeros(len(rows), width)
        for block in row_blocks(len(rows), width):
            latents = self._sparse(rows[block], self.capacity or width)
            # Empty places add 0 to latent 0. Rows that exceed the capacity become NaN as a whole.
            values = latents.values.to(f.dtype)
            f[block].scatter_add_(1, latents.indices.clamp(min=0).long(), values)
            f[block].masked_fill_(values.isnan().any(dim=1, keepdim=True), float("nan"))
        return _shaped(f, x.shape)

    def encode_sparse(self, x: Tensor, capacity: int | None = None) -> SparseLatents:
        """Return the active latents of x [..., d_in]: indices and values [..., capacity], counts [...].

        Args:
            x: [..., d_in].
            capacity: replaces that of the module. A JumpReLU or ReLU SAE needs one of the two.
        """
        rows = self._rows(x)
        latents = self._sparse(rows, self.capacity if capacity is None else capacity)
        self._removed = self._statistics(rows, x.shape)
        shape, places = x.shape[:-1], latents.indices.shape[1]
        return SparseLatents(
            latents.indices.view(*shape, places), latents.values.view(*shape, places), latents.counts.view(shape)
        )

    def decode(self, latents: Tensor | SparseLatents, like: Tensor | None = None) -> Tensor:
        """Return the reconstruction [..., d_in] of latents.

        Args:
            latents: dense [..., d_sae], or sparse.
            like: the rows that were encoded [..., d_in]. An SAE that normalises its input undoes that with their mean
                and scale. By default it takes the rows that were encoded last, once, as SAELens does.
        """
        if isinstance(latents, SparseLatents):
            out = self._decoded(latents)
        else:
            check_shape("latents", latents, (*latents.shape[:-1], self.weights.d_sae))
            out = self._decoded_dense(latents)
        removed, self._removed = self._removed, None
        return self._with_statistics(out, removed if like is None else self._statistics(self._rows(like), like.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction [..., d_in] of x [..., d_in]."""
        rows = self._rows(x)
        removed = self._statistics(rows, x.shape)
        if self._is_eager(rows):
            out = _shaped(eager.reconstruct(*self._encoder(rows), self.W_dec, self.b_dec, self.capacity), x.shape)
        elif self.capacity is None:
            out = self._decoded_dense(self.encode(x))
        else:
            out = self._decoded(self.encode_sparse(x))
        self._removed = None
        # The statistics of this call, which another thread cannot replace.
        return self._with_statistics(out, removed)

    def extra_repr(self) -> str:
        """Return one line for `print`."""
        sae = self.weights
        return f"d_in={sae.d_in}, d_sae={sae.d_sae}, k={sae.k}, normalize={sae.normalize}, capacity={self.capacity}"

    def _rows(self, x: Tensor) -> Tensor:
        encoder_rows = self.weights.encoder_rows
        check_dtype("x", x, FLOATS)
        check_shape("x", x, (*x.shape[:-1], encoder_rows.shape[1]))
        check_device("x", x, encoder_rows, "W_enc")
        return eager.cast(_flat(x), encoder_rows.dtype)

    def _sparse(self, rows: Tensor, capacity: int | None) -> SparseLatents:
        return sparse_encode(rows, self.weights, capacity=capacity, backend=self.backend)

    def _decoded(self, latents: SparseLatents) -> Tensor:
        shape = latents.counts.shape
        flat = (shape.numel(), latents.indices.shape[-1])
        rows = SparseLatents(latents.indices.reshape(flat), latents.values.reshape(flat), latents.counts.flatten())
        return sparse_decode(rows, self.W_dec, self.b_dec, backend=self.backend).view(*shape, self.weights.d_in)

    def _decoded_dense(self, latents: Tensor) -> Tensor:
        W_dec, b_dec = self.weights.W_dec, self.b_dec
        rows = eager.cast(_flat(latents), W_dec.dtype)
        if self._is_eager(rows):
            return _shaped(eager.decode(rows, W_dec, b_dec), latents.shape)
        return _shaped(product(rows, W_dec) + b_dec, latents.shape)

    def _is_eager(self, rows: Tensor) -> bool:
        """Return True if a call runs on a CPU by default, and nothing has to see its operators."""
        return (
            rows.device.type == "cpu"
            and is_plain(self.backend)
            and not is_intercepted((rows, self.weights.W_dec))
            and not torch.is_autocast_enabled("cpu")
        )

    def _encoder(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Return normalised rows and the encoder, as the functions of `eager` take them."""
        sae = self.weights
        hn = rows if sae.normalize == "none" else sae.normalise(rows).rows
        return hn, sae.encoder_rows, sae.b_enc, sae.threshold, sae.k

    def _with_statistics(self, out: Tensor, removed: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return a reconstruction with the mean and scale that were removed from its rows."""
        if self.weights.normalize == "none":
            return out
        if removed is None:
            raise refuse(
                "like",
                None,
                f"the rows that were encoded, [..., {self.weights.d_in}]",
                f"This SAE normalises them ({self.weights.normalize}), and none were encoded since the last decode.",
            )
        mean, scale = removed
        check_shape("latents", out[..., :1], tuple(scale.shape), "Decode what was encoded last, or pass `like`.")
        return (out * scale + mean).to(out.dtype)

    def _statistics(self, rows: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
        """Return the mean and scale [..., 1] that normalising removes from rows, None if it removes nothing."""
        if self.weights.normalize == "none":
            return None
        _, mean, scale = self.weights.normalise(rows)
        return mean.view(*shape[:-1], 1), scale.view(*shape[:-1], 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedSAE:
        """Convert the buffers but b_enc and threshold, whose rounding would change which latents are active."""
        kept = {name: getattr(self, name) for name in ("b_enc", "threshold")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            setattr(self, name, tensor.to(self.encoder_rows.device, compute_dtype(self.encoder_rows)))
        return self


# Buffers that are also fields of `SAEWeights`.
ROWS = ("encoder_rows", "b_enc", "threshold", "W_dec")


def _flat(x: Tensor) -> Tensor:
    """Return x [..., width] as rows [N, width]."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    """Return rows [N, width] as [..., width], with the leading dimensions of `shape`."""
    return rows if len(shape) == 2 else rows.view(*shape[:-1], rows.shape[1])
