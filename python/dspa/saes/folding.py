"""Checks, folding and the fingerprint of an SAE's tensors, once when it is made."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from dspa.errors import SAEError, refusal
from dspa.saes.formats.source import SourceSAE
from dspa.saes.metadata import CENTERED, WRITTEN, is_elsewhere
from dspa.schemas import Count, Flag, Text, check, whole
from dspa_kernels import SAEWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ARCHITECTURES = ("standard", "jumprelu", "topk")
RESHAPES = ("none", "hook_z")
# Folded into the weights when SAELens ends a training. If it was not, SAELens' encode leaves it out.
FOLDED_IN_TRAINING = ("expected_average_only_in", "covariance_whitening")
# Rows that are held in a wider dtype at once.
ROWS = 4096

# Settings and tensors that a fingerprint covers.
Content: TypeAlias = tuple[tuple[object, ...], tuple[Tensor, ...]]


def full_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of thresholds and biases with weights of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def content(
    arch: str,
    weights: SAEWeights,
    b_dec: Tensor,
    apply_b_dec: bool = False,
    rescale: bool = False,
    *,
    W_skip: Tensor | None = None,
    kind: tuple[str, ...] = (),
) -> Content:
    """Return the settings and tensors that the fingerprint of these weights covers.

    Args:
        arch: as in `FrozenSAE`.
        weights: the tensors.
        b_dec: the bias of the decoder.
        apply_b_dec: True if it still has to be subtracted from the input.
        rescale: True if latents still have to be multiplied by the norms of their decoder rows.
        W_skip: the skip connection of a transcoder.
        kind: what else than an SAE of plain rows it is.
    """
    settings = (arch, weights.k, weights.normalize, apply_b_dec, rescale, *kind)
    skip = () if W_skip is None else (W_skip,)
    return settings, (weights.encoder_rows, weights.b_enc, weights.threshold, weights.W_dec, b_dec, *skip)


def weights_digest(content: Content) -> str:
    """Return a fingerprint of 16 hexadecimal digits."""
    settings, tensors = content
    sha = hashlib.sha256(repr((settings, [list(tensor.shape) for tensor in tensors])).encode())
    for tensor in tensors:
        for block in tensor.split(ROWS):
            # Values, so that a bf16 tensor and its fp32 copy are the same.
            sha.update(block.to("cpu", full_dtype(block.dtype)).contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def centered_fingerprint(fingerprint: str) -> str:
    """Return the fingerprint of a centred SAE, given that of the same weights without centring."""
    return hashlib.sha256(f"{fingerprint} {CENTERED}".encode()).hexdigest()[:16]


def unfolded(source: SourceSAE) -> tuple[SAEWeights, Tensor]:
    """Return the tensors of `source` as the kernels read them, and its `b_dec`, checked and with nothing folded.

    Tensors are copied, unless `source` owns them.
    """
    _check_kinds(source)
    tensors = {name: tensor.detach() for name, tensor in source.tensors.items()}
    W_enc, b_enc, threshold = tensors["W_enc"], tensors["b_enc"], tensors.get("threshold")
    _check_arguments(source.arch, W_enc, threshold, source.k, source.layer)
    if "W_skip" in tensors and not source.transcoder:
        raise refusal(SAEError, "`W_skip`", "given", "None, but for a transcoder")
    if source.reshape_activations not in RESHAPES:
        raise refusal(SAEError, "`reshape_activations`", repr(source.reshape_activations), ", ".join(RESHAPES))
    W_dec, rows = tensors["W_dec"], W_enc.T
    if not source.transcoder and W_dec.shape != rows.shape:
        raise refusal(SAEError, "`W_dec`", f"of shape {list(W_dec.shape)}", f"shape [d_sae, d_in], {list(rows.shape)}")
    if source.apply_b_dec_to_input and W_dec.shape[1:] != W_enc.shape[:1]:
        got, accepted = "True, whose b_dec is of another width than its input", "False"
        raise refusal(SAEError, "`apply_b_dec_to_input` of a transcoder", got, accepted)
    full = full_dtype(W_enc.dtype)
    threshold = torch.zeros_like(b_enc) if threshold is None else threshold
    weights = SAEWeights(
        encoder_rows=_contiguous(rows, source.owned),
        b_enc=b_enc.to(full, copy=True),
        threshold=threshold.to(full, copy=True),
        W_dec=_contiguous(W_dec, source.owned),
        k=source.k or 0,
        normalize=_at_inference(source.normalize_activations),
    )
    b_dec = tensors.get("b_dec")
    b_dec = W_enc.new_zeros(weights.d_out) if b_dec is None else b_dec.clone()
    check_values(weights, b_dec, tensors.get("W_skip"))
    return weights, b_dec


def _contiguous(matrix: Tensor, owned: bool) -> Tensor:
    """Return a matrix with contiguous rows; a copy, unless it has them already and is `owned`."""
    return matrix.contiguous() if owned else matrix.clone(memory_format=torch.contiguous_format)


def fold(
    weights: SAEWeights,
    b_dec: Tensor,
    *,
    apply_b_dec_to_input: bool,
    rescale_acts_by_decoder_norm: bool,
    center_writing_weights: bool,
) -> SAEWeights:
    """Return weights with the same latents without these settings, except for the scale of the rows of `W_dec`.

    The model is centred before the SAE reads it, so `b_dec` is taken from a centred residual and is not centred itself.
    A row of `W_dec` is not centred either: what reads the residual is a LayerNorm, which ignores its mean.
    """
    encoder_rows, b_enc, W_dec = weights.encoder_rows, weights.b_enc.double(), weights.W_dec
    if apply_b_dec_to_input:
        b_enc = b_enc - torch.cat([rows.double() @ b_dec.double() for rows in encoder_rows.split(ROWS)])
    if rescale_acts_by_decoder_norm:
        norm = torch.linalg.vector_norm(W_dec, dim=1, dtype=torch.float64)
        encoder_rows, b_enc = _scaled(encoder_rows, norm), b_enc * norm
        # A latent without a direction never fires, since its encoder row and bias are zero now.
        W_dec = _scaled(W_dec, torch.where(norm > 0, 1 / norm, 0))
    if center_writing_weights:
        encoder_rows = torch.cat([_centred(rows.double()).to(rows.dtype) for rows in encoder_rows.split(ROWS)])
    return replace(weights, encoder_rows=encoder_rows, b_enc=b_enc.to(weights.b_enc.dtype), W_dec=W_dec)


def ungated(source: SourceSAE) -> SourceSAE:
    """Return the tensors of the jumprelu SAE that equals a gated one.

    With `z = h W_enc`, the gate `z + b_gate > 0` is `e^r_mag z + b_mag > b_mag - e^r_mag b_gate`, whose left side is
    the magnitude.
    """
    tensors = source.tensors
    W_enc, b_mag, b_gate, r_mag = (tensors[name] for name in ("W_enc", "b_mag", "b_gate", "r_mag"))
    if W_enc.dim() != 2 or not b_mag.shape == b_gate.shape == r_mag.shape == W_enc.shape[1:]:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise refusal(
            SAEError, "the gated SAE", f"of shapes {shapes}", "b_mag, b_gate, r_mag [d_sae], W_enc [d_in, d_sae]"
        )
    scale = r_mag.double().exp()
    folded = {
        # Contiguous rows of its own, so that they need not be copied again.
        "W_enc": _scaled(W_enc.T, scale).T,
        "b_enc": b_mag,
        "W_dec": tensors["W_dec"] if source.owned else tensors["W_dec"].clone(),
        "b_dec": tensors["b_dec"],
        "threshold": b_mag - scale * b_gate,
    }
    return replace(source, arch="jumprelu", tensors=folded, owned=True)


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=1, keepdim=True)


def _scaled(rows: Tensor, factors: Tensor) -> Tensor:
    pairs = zip(rows.split(ROWS), factors[:, None].split(ROWS), strict=True)
    return torch.cat([(block.double() * factor).to(rows.dtype) for block, factor in pairs])


def _at_inference(normalize: str) -> str:
    """Return the normalisation at inference; warn of one that does nothing there."""
    if normalize not in FOLDED_IN_TRAINING:
        return normalize
    warnings.warn(
        f"normalize_activations={normalize!r} does nothing at inference, here as in SAELens. That is right only if "
        "its scale was folded into these weights: check how well they reconstruct residuals of the model.",
        stacklevel=5,
    )
    return "none"


def _check_kinds(source: SourceSAE) -> None:
    """Raise `SAEError` unless tensors hold real floating-point numbers and settings are of their types."""
    accepted = ", ".join(map(str, DTYPES))
    for name, tensor in source.tensors.items():
        if not isinstance(tensor, Tensor):
            raise refusal(SAEError, f"`{name}`", f"a {type(tensor).__name__}", f"a tensor of {accepted}")
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
            got = f"of dtype {tensor.dtype} ({tensor.layout})"
            raise refusal(SAEError, f"`{name}`", got, f"dense, {accepted}", f"Convert it: {name}.to({DTYPES[0]}).")
    for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "transcoder", CENTERED):
        if getattr(source, name) is not None:
            check(Flag, getattr(source, name), SAEError, f"`{name}`")
    if source.model_name is not None:
        check(Text, source.model_name, SAEError, "`model_name`")


def _check_arguments(arch: str, W_enc: Tensor, threshold: Tensor | None, k: int | None, layer: int | None) -> None:
    """Raise `SAEError` unless the arguments of a `FrozenSAE` fit together."""
    if arch not in ARCHITECTURES:
        advice = "BatchTopK, Matryoshka and gated SAEs become jumprelu in FrozenSAE.load and from_sae_lens."
        raise refusal(SAEError, "`arch`", repr(arch), ", ".join(ARCHITECTURES), advice)
    if W_enc.dim() != 2 or not W_enc.numel():
        raise refusal(SAEError, "`W_enc`", f"of shape {list(W_enc.shape)}", "shape [d_in, d_sae], both >= 1")
    if (threshold is None) == (arch == "jumprelu"):
        got = "None" if threshold is None else "given"
        raise refusal(
            SAEError, f"`threshold` of a {arch} SAE", got, "a tensor [d_sae] for jumprelu, None for the others"
        )
    if (k is None) == (arch == "topk"):
        raise refusal(SAEError, f"`k` of a {arch} SAE", k, "a number of latents for topk, None for the others")
    if k is not None:
        check(whole(1, W_enc.shape[1], f"1 to d_sae = {W_enc.shape[1]}"), k, SAEError, "`k`")
    if layer is not None:
        check(Count, layer, SAEError, "`layer`")


def to_center(source: SourceSAE, stated: bool | None) -> bool:
    """Return True if the encoder of `source` still has to be centred.

    Args:
        source: the SAE as stored.
        stated: what the caller says, in place of the file; None if nothing.

    Raises:
        SAEError: the caller says that a saved SAE, in which centring is folded already, is not centred.
    """
    if CENTERED in (source.record or {}).get("folded", ()):
        if stated is False:
            accepted = "True or None"
            advice = "Load the SAE from where it came from. For a FusedSAE of this one: FusedSAE(FrozenSAE.load(path))."
            raise refusal(SAEError, f"`{CENTERED}`", "False, and it is folded into this copy", accepted, advice)
        return False
    if stated is None and source.hook_name is not None and is_elsewhere(source.hook_name):
        # Centring changes what is written to the residual stream, and nothing within a layer.
        return bool(source.center_writing_weights and WRITTEN.search(source.hook_name))
    if stated is None and source.center_writing_weights is None:
        warnings.warn(
            f"{source.name} does not say whether its SAE was trained on residuals less their mean, as SAELens did by "
            f"default until 2024. It is read as not, like SAELens reads it. If its model has LayerNorm (GPT-2, "
            f"Pythia), find out and pass {CENTERED}=True or False. That of gpt2-small-res-jb is True.",
            stacklevel=4,
        )
    return bool(source.center_writing_weights if stated is None else stated)


def check_centering(normalize: str) -> None:
    """Raise `SAEError` for a centred SAE whose normalisation at inference needs the centred residual itself."""
    if normalize == "constant_norm_rescale":
        raise refusal(
            SAEError,
            f"`normalize_activations` of an SAE with {CENTERED}",
            f"{normalize!r}, whose scale is the norm of the residual less its mean",
            "none, layer_norm",
            f"For a model without LayerNorm, {CENTERED} does nothing: load the SAE with {CENTERED}=False.",
        )


def check_values(weights: SAEWeights, b_dec: Tensor, W_skip: Tensor | None = None) -> None:
    """Raise `SAEError` unless all weights are finite, and `b_dec` and `W_skip` have their shapes."""
    others = {"b_dec": (b_dec, [weights.d_out])}
    others |= {} if W_skip is None else {"W_skip": (W_skip, [weights.d_out, weights.d_in])}
    for name, (tensor, shape) in others.items():
        if list(tensor.shape) != shape:
            raise refusal(SAEError, f"`{name}`", f"of shape {list(tensor.shape)}", f"shape {shape}")
    # A threshold of +inf is a latent that never fires.
    threshold = weights.threshold.nan_to_num(nan=torch.nan, posinf=0.0, neginf=-torch.inf)
    tensors = {"W_enc": weights.encoder_rows, "b_enc": weights.b_enc, "W_dec": weights.W_dec}
    tensors |= {name: tensor for name, (tensor, _) in others.items()}
    for name, tensor in (tensors | {"threshold": threshold}).items():
        if bad := tensor.numel() - int(tensor.isfinite().sum()):
            got = f"NaN or infinite in {bad} of {tensor.numel()} places ({tensor.dtype})"
            raise refusal(SAEError, f"`{name}`", got, "finite numbers, and +inf in `threshold`")
