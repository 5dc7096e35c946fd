"""Modules over the ops: an SAE or transcoder for inference that can replace one of SAELens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dspa_kernels import eager
from dspa_kernels.backends import check_backend, choose, is_auto, is_intercepted, is_plain
from dspa_kernels.checks import check_device, check_dtype, check_shape, refuse
from dspa_kernels.formulas import Normalised, compute_dtype, product, row_blocks
from dspa_kernels.ops.sparse_decode import sparse_decode
from dspa_kernels.ops.sparse_encode import sparse_encode
from dspa_kernels.weights import FLOATS, SAEShape, SAEWeights, SparseLatents, check_k


class FusedSAE(SAEShape, nn.Module):
    """An SAE whose `encode`, `decode` and call return what those of a `sae_lens.SAE` do, in the SAE's dtype.

        sae = FusedSAE.from_sae_lens(sae)
        sae = FusedSAE.from_pretrained("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical")
        sae = FusedSAE.load("path/of/an/sae")

    `x [..., d_in]` may have any leading dimensions, and that of an SAE of attention heads may be
    `[..., n_heads, d_head]`. If the number of active latents is bounded, by k of a top-k SAE or by `capacity`, a call
    uses sparse latents and makes no dense `[..., d_sae]`. On a CPU, every call holds the latents of a block of rows
    alone. Inputs are rounded to the SAE's dtype, as in SAELens.

    Sums are in at least fp32. SAELens rounds them to the SAE's dtype before it compares them with thresholds, so in
    bf16 latents at a threshold or at the edge of k can differ; `dspa_kernels.fuse` keeps to SAELens there. It also
    keeps what this module does not have: gradients, hook points, the error term.

    Args:
        sae: a `dspa.FrozenSAE`, or weights where everything is folded. They are copied.
        b_dec: [d_out] decoder bias of weights; zeros if None. It is copied.
        capacity: places per row for active latents, by default k of a top-k SAE, else unbounded. A row with more
            active latents becomes NaN as a whole.
        backend: "auto", "reference", "triton" or "cuda".

    Attributes:
        cfg: what it is, by the names of SAELens: `d_in`, `d_sae`, `d_out`, `dtype`, `device`, `architecture`, `k`,
            `apply_b_dec_to_input` (False, as it is folded), `normalize_activations`, `reshape_activations`, and
            `metadata` with `model_name`, `hook_name`, `hook_name_out` and `neuronpedia_id`, None where unknown.
        weights: the buffers as `SAEWeights`.
        encoder_rows: buffer [d_sae, d_in], one contiguous row per latent.
        W_enc: [d_in, d_sae], a transposed view of encoder_rows.
        b_enc: buffer [d_sae], which stays fp32 whatever `.to` is given.
        threshold: buffer [d_sae], which stays fp32 as well.
        W_dec: buffer [d_sae, d_out].
        b_dec: buffer [d_out].
        W_skip: buffer [d_out, d_in] of a transcoder with a skip connection, which calls add; None for others.

    Raises:
        InputError: another object than an SAE, an invalid shape, dtype, device or capacity, or an unknown backend.
    """

    encoder_rows: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor | None

    def __init__(
        self,
        sae: SAEWeights | SAEShape,
        b_dec: Tensor | None = None,
        *,
        capacity: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        weights = sae if isinstance(sae, SAEWeights) else getattr(sae, "weights", None)
        if not isinstance(weights, SAEWeights):
            advice = "FusedSAE.from_sae_lens(sae) takes an SAE of SAELens, and FusedSAE.load(path) a file."
            raise refuse("sae", f"a {type(sae).__name__}", "a dspa.FrozenSAE, or its weights", advice)
        b_dec = getattr(sae, "b_dec", None) if b_dec is None else b_dec
        b_dec = weights.W_dec.new_zeros(weights.d_out) if b_dec is None else b_dec
        check_shape("b_dec", b_dec, (weights.d_out,))
        check_dtype("b_dec", b_dec, FLOATS)
        check_device("b_dec", b_dec, weights.W_dec, "weights.W_dec")
        if capacity is not None:
            check_k("capacity", capacity, weights.d_sae)
        for name in ROWS:
            self.register_buffer(name, getattr(weights, name).detach().clone())
        self.register_buffer("b_dec", b_dec.detach().to(weights.W_dec.dtype, copy=True))
        W_skip = getattr(sae, "W_skip", None)
        self.register_buffer("W_skip", None if W_skip is None else W_skip.detach().clone())
        default = "topk" if weights.k else "jumprelu"
        is_gated = "gated" in getattr(sae, "folded", ())
        self.architecture: str = "gated" if is_gated else getattr(sae, "arch", default)
        self.is_transcoder: bool = getattr(sae, "transcoder", False)
        self.is_centered: bool = getattr(sae, "centered", False)
        self.reshape_activations: str = getattr(sae, "reshape_activations", "none")
        self._metadata = {name: getattr(sae, name, None) for name in METADATA}
        self.capacity = capacity or weights.k or None
        self.backend = backend
        self._weights = replace(weights, **{name: getattr(self, name) for name in ROWS})
        # Of the rows that were encoded last.
        self._last = PLAIN

    @classmethod
    def from_sae_lens(cls, sae: Any, *, capacity: int | None = None, backend: str = "auto") -> FusedSAE:
        """Make one of a `sae_lens.SAE` or transcoder for inference, on its device and in its dtype. It is copied.

        It encodes the rows that `sae` encodes: those of a model with centred weights, if `sae` was trained on them.
        `dspa.FrozenSAE.from_sae_lens` makes one for the residuals of transformers.

        Args:
            sae: the object.
            capacity: as for the constructor.
            backend: as for the constructor.

        Raises:
            dspa.SAEError: as for `dspa.FrozenSAE.from_sae_lens`.
            InputError: an invalid capacity.
        """
        from dspa.saes.frozen import FrozenSAE

        return cls(FrozenSAE.from_sae_lens(sae, center_writing_weights=False), capacity=capacity, backend=backend)

    @classmethod
    def from_pretrained(
        cls,
        release: str,
        sae_id: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        capacity: int | None = None,
        backend: str = "auto",
    ) -> FusedSAE:
        """Download one of SAELens' catalogue or of a Hugging Face repository, for which sae-lens must be installed.

        Args:
            release: the release in the catalogue, or the repository.
            sae_id: the SAE in it.
            device: device of the SAE.
            dtype: dtype of the weights, by default fp32.
            capacity: as for the constructor.
            backend: as for the constructor.

        Raises:
            RuntimeError: sae-lens is not installed.
            dspa.SAEError: as for `dspa.FrozenSAE.from_pretrained`.
            InputError: an invalid capacity.
        """
        from dspa.saes.frozen import FrozenSAE

        frozen = FrozenSAE.from_pretrained(release, sae_id, device=device, dtype=dtype, center_writing_weights=False)
        return cls(frozen, capacity=capacity, backend=backend)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        dict_class: str | None = None,
        k: int | None = None,
        capacity: int | None = None,
        backend: str = "auto",
    ) -> FusedSAE:
        """Load the SAE in a folder or file of any format that `dspa.FrozenSAE.load` reads, without sae-lens.

        Args:
            path: the folder, or the file of weights in it.
            device: device of the SAE.
            dtype: dtype of the weights, by default as stored.
            dict_class: as for `dspa.FrozenSAE.load`.
            k: as for `dspa.FrozenSAE.load`.
            capacity: as for the constructor.
            backend: as for the constructor.

        Raises:
            dspa.SAEError: as for `dspa.FrozenSAE.load`.
            InputError: an invalid capacity.
        """
        from dspa.saes.frozen import FrozenSAE

        frozen = FrozenSAE.load(
            path, device=device, dtype=dtype, dict_class=dict_class, k=k, center_writing_weights=False
        )
        return cls(frozen, capacity=capacity, backend=backend)

    @property
    def cfg(self) -> SimpleNamespace:
        """The description of the SAE, by the names of SAELens. It describes, and changing it changes nothing."""
        sae = self.weights
        return SimpleNamespace(
            architecture=self.architecture,
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            d_out=sae.d_out,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            k=sae.k or None,
            apply_b_dec_to_input=False,
            normalize_activations=sae.normalize,
            reshape_activations=self.reshape_activations,
            metadata=SimpleNamespace(**self._metadata),
        )

    @property
    def backend(self) -> str:
        """The backend that was asked for. A name that is unknown is refused where it is set."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        check_backend("backend", name)
        self._backend = name

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

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents [..., d_sae] of x [..., d_in], dense."""
        rows, normalised, shape, form = self._rows(x)
        self._remember(form)
        if self._is_eager(rows):
            return _shaped(eager.encode(*self._encoder(rows, normalised), self.capacity), shape)
        return _shaped(self._dense(rows), shape)

    def encode_sparse(self, x: Tensor, capacity: int | None = None) -> SparseLatents:
        """Return the active latents of x [..., d_in]: indices and values [..., capacity], counts [...].

        Args:
            x: [..., d_in].
            capacity: replaces that of the module. A JumpReLU or ReLU SAE needs one of the two.
        """
        rows, _, shape, form = self._rows(x)
        self._remember(form)
        latents = self._sparse(rows, self.capacity if capacity is None else capacity)
        shape, places = shape[:-1], latents.indices.shape[1]
        return SparseLatents(
            latents.indices.view(*shape, places), latents.values.view(*shape, places), latents.counts.view(shape)
        )

    def decode(self, latents: Tensor | SparseLatents, like: Tensor | None = None) -> Tensor:
        """Return the reconstruction [..., d_out] of latents, without the skip connection of a transcoder.

        Args:
            latents: dense [..., d_sae], or sparse.
            like: the rows that were encoded [..., d_in]. An SAE that normalises its input undoes that with their mean
                and scale. By default it takes the rows that were encoded last, once, as SAELens does. If these were
                [..., n_heads, d_head], the reconstruction is as well.
        """
        if isinstance(latents, SparseLatents):
            out = self._decoded(latents)
        else:
            check_dtype("latents", latents, FLOATS)
            check_shape("latents", latents, (*latents.shape[:-1], self.weights.d_sae))
            out = self._decoded_dense(latents)
        last = self._last
        self._remember(last._replace(removed=None) if last.removed else last)
        return self._finished(out, last if like is None else self._rows(like)[3])

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction [..., d_out] of x [..., d_in], with the skip connection of a transcoder."""
        # The form of this call, which another thread cannot replace.
        rows, normalised, shape, form = self._rows(x)
        if self._is_eager(rows):
            out = eager.reconstruct(*self._encoder(rows, normalised), self.W_dec, self.b_dec, self.capacity)
        elif self.capacity is None:
            out = self._decoded_dense(self._dense(rows))
        else:
            out = self._decoded(self._sparse(rows, self.capacity))
        self._remember(form._replace(removed=None) if form.removed else form)
        out = self._finished(_shaped(out, shape), form)
        return out if self.W_skip is None else out + _shaped(product(rows, self.W_skip.T), shape)

    def extra_repr(self) -> str:
        """Return one line for `print`."""
        cfg = self.cfg
        d_out = f", d_out={cfg.d_out}" if self.is_transcoder else ""
        k = f", k={cfg.k}" if cfg.k else ""
        normalize = f", {cfg.normalize_activations}" if cfg.normalize_activations != "none" else ""
        reshape = f", {cfg.reshape_activations}" if cfg.reshape_activations != "none" else ""
        place = f", {cfg.metadata.hook_name}" if cfg.metadata.hook_name else ""
        skip = ", W_skip" if self.W_skip is not None else ""
        capacity = f", capacity={self.capacity}" if self.capacity not in (None, cfg.k) else ""
        backend = repr(self.backend)
        if is_auto(self.backend):
            backend += f" ({choose('sparse_encode', self.device, dtype=compute_dtype(self.W_dec))})"
        return (
            f"{cfg.architecture}{' transcoder' if self.is_transcoder else ''}, d_in={cfg.d_in}, d_sae={cfg.d_sae}"
            f"{d_out}{skip}{k}{normalize}{reshape}{place}, {cfg.dtype} on {cfg.device}, backend={backend}{capacity}"
        )

    def _rows(self, x: Tensor) -> tuple[Tensor, Normalised | None, torch.Size, _Form]:
        """Return x as rows [N, d_in] in the SAE's dtype, the same normalised, its shape, and what `decode` needs of it.

        They are normalised if a reconstruction undoes that. The shape is [..., d_in].
        """
        encoder_rows = self.weights.encoder_rows
        d_in = encoder_rows.shape[1]
        check_dtype("x", x, FLOATS)
        d_head = None
        if self.reshape_activations == "hook_z" and x.shape[-2:].numel() == d_in != x.shape[-1]:
            d_head = x.shape[-1]
            x = x.flatten(-2)
        if x.shape[-1:] != (d_in,):
            raise refuse("x", f"of shape {list(x.shape)}", self._accepted_rows)
        check_device("x", x, encoder_rows, "W_enc")
        rows = eager.cast(_flat(x), encoder_rows.dtype)
        normalised = None if self._is_as_encoded else self.weights.normalise(rows)
        removed = None if normalised is None else self._statistics(rows, normalised, x.shape)
        return rows, normalised, x.shape, PLAIN if removed is None and d_head is None else _Form(removed, d_head)

    def _remember(self, form: _Form) -> None:
        """Keep the form of rows for `decode`. Setting an attribute of a module takes long for what is there already."""
        if form is not self._last:
            self._last = form

    def _dense(self, rows: Tensor) -> Tensor:
        """Return the latents [N, d_sae] by the op for sparse ones."""
        width = self.weights.d_sae
        f = rows.new_zeros(len(rows), width)
        for block in row_blocks(len(rows), width):
            latents = self._sparse(rows[block], self.capacity or width)
            # Empty places add 0 to latent 0. Rows that exceed the capacity become NaN as a whole.
            values = latents.values.to(f.dtype)
            f[block].scatter_add_(1, latents.indices.clamp(min=0).long(), values)
            f[block].masked_fill_(values.isnan().any(dim=1, keepdim=True), float("nan"))
        return f

    def _sparse(self, rows: Tensor, capacity: int | None) -> SparseLatents:
        return sparse_encode(rows, self.weights, capacity=capacity, backend=self.backend)

    def _decoded(self, latents: SparseLatents) -> Tensor:
        shape = latents.counts.shape
        flat = (shape.numel(), latents.indices.shape[-1])
        rows = SparseLatents(latents.indices.reshape(flat), latents.values.reshape(flat), latents.counts.flatten())
        return sparse_decode(rows, self.W_dec, self.b_dec, backend=self.backend).view(*shape, self.weights.d_out)

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

    def _encoder(self, rows: Tensor, normalised: Normalised | None) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Return normalised rows and the encoder, as the functions of `eager` take them."""
        sae = self.weights
        hn = rows if sae.normalize == "none" else (normalised or sae.normalise(rows)).rows
        return hn, sae.encoder_rows, sae.b_enc, sae.threshold, sae.k

    def _finished(self, out: Tensor, form: _Form) -> Tensor:
        """Return the reconstruction [..., d_out] in the form of the rows that were encoded."""
        out = out if self._is_as_encoded else self._restored(out, form.removed)
        return out if form.d_head is None else out.unflatten(-1, (-1, form.d_head))

    @property
    def _is_as_encoded(self) -> bool:
        return self.is_transcoder or (self.weights.normalize == "none" and not self.is_centered)

    def _restored(self, out: Tensor, removed: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return a reconstruction with the mean and scale that were removed from its rows."""
        if removed is None:
            raise refuse(
                "like",
                None,
                f"the rows that were encoded, [..., {self.weights.d_in}]",
                f"This SAE normalises them ({'less their mean' if self.is_centered else self.weights.normalize}), and "
                "none were encoded since the last decode.",
            )
        mean, scale = removed
        check_shape("latents", out[..., :1], tuple(scale.shape), "Decode what was encoded last, or pass `like`.")
        return (out * scale + mean).to(out.dtype)

    def _statistics(self, rows: Tensor, normalised: Normalised, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the mean and scale [..., 1] that are removed from rows."""
        _, mean, scale = normalised
        mean = rows.mean(dim=1, keepdim=True) if self.is_centered else mean
        return mean.view(*shape[:-1], 1), scale.view(*shape[:-1], 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedSAE:
        """Convert the buffers but b_enc and threshold, whose rounding would change which latents are active."""
        kept = {name: getattr(self, name) for name in ("b_enc", "threshold")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        full = compute_dtype(self.encoder_rows)
        for name, tensor in kept.items():
            if getattr(self, name).dtype != full:
                setattr(self, name, tensor.to(self.encoder_rows.device, full))
        return self

    def __getattr__(self, name: str) -> Any:
        buffers = self.__dict__.get("_buffers", {})
        if name in buffers:
            return buffers[name]
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            advice = "A SAELens SAE keeps its own attributes, hook points and use in a HookedSAETransformer with"
            raise AttributeError(f"{error}. {advice} dspa_kernels.fuse(sae).", name=name, obj=self) from None


class _Form(NamedTuple):
    """The part of the encoded rows that `decode` needs: the mean and scale that were removed, the width of heads."""

    removed: tuple[Tensor, Tensor] | None
    d_head: int | None


PLAIN = _Form(removed=None, d_head=None)


# Buffers that are also fields of `SAEWeights`.
ROWS = ("encoder_rows", "b_enc", "threshold", "W_dec")
METADATA = ("model_name", "hook_name", "hook_name_out", "neuronpedia_id")


def _flat(x: Tensor) -> Tensor:
    """Return x [..., width] as rows [N, width]."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    """Return rows [N, width] as [..., width], with the leading dimensions of `shape`."""
    return rows if len(shape) == 2 else rows.view(*shape[:-1], rows.shape[1])
