"""An SAE at inference: it encodes rows and decodes latents."""

from __future__ import annotations

import torch
from torch import Tensor

from dspa.errors import SAEError, refusal
from dspa.saes.metadata import CENTERED
from dspa_kernels import SAEShape, product


class Autoencoder(SAEShape):
    """The tensors of an SAE at inference, and what it computes with them.

    Attributes:
        weights: the tensors that the kernels read.
        b_dec: [d_out], in the dtype of `W_enc`.
        W_skip: [d_out, d_in] of a transcoder with a skip connection, in the dtype of `W_enc`; None for others.
        transcoder: True if it computes the content of another place than it reads.
        reshape_activations: "hook_z" for an SAE of attention heads, whose rows may be [n_heads, d_head], else "none".
        folded: names of the settings that were folded into the tensors.
    """

    b_dec: Tensor
    W_skip: Tensor | None
    transcoder: bool
    folded: tuple[str, ...]

    def encode(self, h: Tensor) -> Tensor:
        """Return the latents f [..., d_sae] of rows h [..., d_in], dense and differentiable in h.

        They are computed and returned in fp32, or in fp64 if h or the weights are fp64. Among equal values at the edge
        of the top k, the smaller index is active.
        """
        return self.weights.latents(self._flat("h", h))

    def normalise(self, h: Tensor) -> Tensor:
        """Return n(h) [..., d_in], which the encoder reads, of rows h [..., d_in], in the dtype of `encode`.

        For a centred SAE, h less its mean, normalised.
        """
        rows = self.weights.normalise(self._flat("h", h)).rows
        return rows - rows.mean(dim=-1, keepdim=True) if self.centered else rows

    def decode(self, f: Tensor, like: Tensor | None = None) -> Tensor:
        """Return the reconstruction [..., d_out] of latents, with `b_dec`, in the dtype of `encode`.

        Args:
            f: latents [..., d_sae].
            like: rows that f was encoded from [..., d_in]. An SAE that normalises or centres its input undoes that with
                their mean and scale, and a skip connection adds `like W_skip^T`. If they are [..., n_heads, d_head],
                the reconstruction is as well. Others ignore them.

        Raises:
            SAEError: `like` is needed and not given.
        """
        _check_rows("f", f, self.d_sae, f"shape [..., {self.d_sae}]")
        f = f.to(self._compute_dtype(f))
        out = product(f, self.W_dec.to(f.dtype)) + self.b_dec.to(f.dtype)
        undoes = not self.transcoder and (self.weights.normalize != "none" or self.centered)
        if like is None and not undoes and self.W_skip is None:
            return out
        if like is None:
            raise refusal(
                SAEError,
                "`like`",
                "None",
                "the rows that `f` was encoded from, [..., d_in]",
                "This SAE adds W_skip times its input: decode(f, like=h)."
                if not undoes
                else f"This SAE normalises its input ({CENTERED if self.centered else self.weights.normalize}): "
                "decode(f, like=h).",
            )
        rows = self._flat("like", like).to(f.dtype)
        if undoes:
            _, mean, scale = self.weights.normalise(rows)
            out = out * scale + (rows.mean(dim=-1, keepdim=True) if self.centered else mean)
        if self.W_skip is not None:
            out = out + rows @ self.W_skip.to(f.dtype).T
        return out.unflatten(-1, like.shape[-2:]) if like.shape[-1] != self.d_in else out

    def _flat(self, name: str, x: Tensor) -> Tensor:
        """Return rows [..., d_in], which are [..., n_heads, d_head] where an SAE of attention heads takes them."""
        if self.reshape_activations == "hook_z" and x.shape[-2:].numel() == self.d_in != x.shape[-1]:
            return x.flatten(-2)
        _check_rows(name, x, self.d_in, self._accepted_rows)
        return x

    @property
    def centered(self) -> bool:
        """True if the SAE was trained on residuals less their mean over d_in (`center_writing_weights`)."""
        return CENTERED in self.folded

    @property
    def b_enc(self) -> Tensor:
        """Encoder bias [d_sae], fp32, or fp64 for an fp64 SAE."""
        return self.weights.b_enc

    @property
    def threshold(self) -> Tensor:
        """Threshold [d_sae], in the dtype of `b_enc`, zeros for standard and topk."""
        return self.weights.threshold

    @property
    def W_dec(self) -> Tensor:
        """Decoder [d_sae, d_out]."""
        return self.weights.W_dec

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        return torch.promote_types(torch.promote_types(x.dtype, self.dtype), torch.float32)


def _check_rows(name: str, x: Tensor, width: int, accepted: str) -> None:
    if not isinstance(x, Tensor) or x.is_complex():
        got = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise refusal(SAEError, f"`{name}`", got, "a tensor of real numbers")
    if x.shape[-1:] != (width,):
        raise refusal(SAEError, f"`{name}`", f"of shape {list(x.shape)}", accepted)
