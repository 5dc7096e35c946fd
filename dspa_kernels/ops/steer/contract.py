"""Input checks, choice of the backend and empty results of `steer`, in part shared by `lookup_and_steer`."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, cast

import torch
from torch import Tensor

from dspa_kernels import cuda_library
from dspa_kernels.backends import choose, is_auto
from dspa_kernels.checks import check_at_least, check_contiguous, check_device, check_dtype, check_shape, refuse
from dspa_kernels.cuda_library import DTYPES, MAX_ROWS
from dspa_kernels.formulas import compute_dtype
from dspa_kernels.launch import NATIVE, CudaEntry, cuda_entry, precision, steer_variant
from dspa_kernels.weights import FLOATS, PATHS, EncoderStream, MapWeights, SAEWeights, SteeringPlan

PLAN = "Tensor slots, Tensor signs, Tensor? strengths"
GATE = "Tensor? rows, Tensor? positions, Tensor? start, Tensor(a!)? paths"
STRENGTH = "float alpha, Tensor? alphas"


def stream_of(sae: SAEWeights, stream: EncoderStream | None) -> EncoderStream:
    """Return `stream`, by default that of the SAE; raise `InputError` if it was made from an SAE that differs."""
    if stream is None:
        return sae.stream
    check_shape(
        "stream.encoder_rows", stream.encoder_rows, sae.encoder_rows.shape, "Make it with EncoderStream.of(sae)."
    )
    check_dtype("stream.encoder_rows", stream.encoder_rows, (sae.encoder_rows.dtype,))
    check_device("stream", stream.encoder_rows, sae.encoder_rows, "sae")
    if (stream.k, stream.normalize) != (sae.k, sae.normalize):
        raise refuse("stream", (stream.k, stream.normalize), f"k and normalize of the SAE, {sae.k}, {sae.normalize}")
    return stream


class Strength(TypedDict):
    """The arguments `alpha` and `alphas` of the op: a number for all rows, or one per plan row in place of it."""

    alpha: float
    alphas: Tensor | None


def strength_of(alpha: float | Tensor) -> Strength:
    """Return `alpha` as the op takes it. A tensor without dimensions is a number."""
    if isinstance(alpha, Tensor) and alpha.dim():
        return {"alpha": 0.0, "alphas": alpha}
    return {"alpha": cast(float, alpha), "alphas": None}


def choose_steer(h: Tensor, sae: SAEWeights, plan: SteeringPlan, requested: str) -> str:
    """Return the backend of `steer`, "auto" if the launch chooses between Triton and CUDA."""

    def unfit() -> str:
        return cuda_obstacle(h, sae.encoder_rows, sae.normalize, plan.strengths)

    chosen = choose("steer", h.device, requested, compute_dtype(h, sae.encoder_rows), unfit)
    return "auto" if chosen == "triton" and is_auto(requested) else chosen


def cuda_obstacle(h: Tensor, encoder_rows: Tensor, normalize: str, strengths: Tensor | None) -> str:
    """Return why the CUDA kernel does not take such a launch, empty if it does."""
    if strengths is not None:
        return "it takes plans whose latents move by alpha M, and got one with strengths"
    if len(h) <= MAX_ROWS and h.dtype in DTYPES and precision(h, encoder_rows, normalize) == NATIVE:
        return ""
    return (
        f"it takes up to {MAX_ROWS} rows of bf16 or fp16, weights of the same dtype and normalize='none', and got "
        f"{len(h)} rows of {h.dtype}, weights of {encoder_rows.dtype} and normalize={normalize!r}"
    )


def entry_of(
    h: Tensor,
    encoder_rows: Tensor,
    k: int,
    normalize: str,
    screen_rows: Tensor | None,
    strengths: Tensor | None = None,
    **_: Any,
) -> CudaEntry | None:
    """Return the entry of the CUDA table for a launch, None if there is none."""
    if cuda_obstacle(h, encoder_rows, normalize, strengths):
        return None
    d_sae, d_in = encoder_rows.shape
    return cuda_entry(steer_variant(k, screen_rows), len(h), d_in, d_sae, NATIVE, h.device)


def fastest(**arguments: Any) -> Literal["cuda", "triton"]:
    """Return "cuda" if it is compiled and was measured to be faster for these arguments, else "triton"."""
    return "triton" if cuda_library.OBSTACLE or entry_of(**arguments) is None else "cuda"


def check_residual(
    h: Tensor,
    sae: SAEWeights,
    cdmap: MapWeights,
    alpha: float | Tensor,
    n_prompts: int,
    rows: Tensor | None,
    positions: Tensor | None,
    start: Tensor | None,
    paths: Tensor | None,
) -> None:
    """Raise `InputError` unless residual rows, SAE, map, strength and gates fit each other."""
    check_shape("h", h, ("N", sae.d_in), "Flatten batch and sequence into one dimension.")
    check_dtype("h", h, FLOATS)
    check_device("sae", sae.encoder_rows, h, "h")
    check_device("cdmap", cdmap.encoder_rows, h, "h")
    check_shape("cdmap.encoder_rows", cdmap.encoder_rows, ("C", sae.d_in), "Gather the map from the SAE that steers.")
    check_dtype("cdmap.encoder_rows", cdmap.encoder_rows, (sae.encoder_rows.dtype,))
    strength = strength_of(alpha)
    check_at_least("alpha", strength["alpha"], 0)
    n_rows = h.shape[0]
    if rows is None and n_rows != n_prompts:
        raise refuse("rows", None, f"the plan row of each of {n_rows} rows", f"The plan has {n_prompts} rows.")
    if (positions is None) != (start is None):
        raise refuse("start" if start is None else "positions", None, "both of `positions` and `start`, or neither")
    for name, tensor, shape, dtype in (
        ("rows", rows, (n_rows,), torch.int32),
        ("positions", positions, (n_rows,), torch.int64),
        ("start", start, (n_prompts,), torch.int64),
        ("paths", paths, (len(PATHS) + 1,), torch.int64),
        ("alpha", strength["alphas"], (n_prompts,), torch.float32),
    ):
        if tensor is not None:
            check_shape(name, tensor, shape)
            check_dtype(name, tensor, (dtype,))
            check_device(name, tensor, h, "h")
    if paths is not None:
        check_contiguous("paths", paths, "Pass a tensor of its own, to which the counters are added.")


def check_written(name: str, tensor: Tensor) -> None:
    """Raise `InputError` unless kernels can edit `tensor` in place."""
    check_contiguous(name, tensor, "It is edited in place. Pass a contiguous tensor, or use steer.")
    if tensor.requires_grad and torch.is_grad_enabled():
        accepted = "a tensor that autograd does not record, as the edit has no gradient"
        raise refuse(name, "one that requires a gradient", accepted, "Call steer_ under torch.no_grad().")


def empty_results(h: Tensor, encoder_rows: Tensor, n_slots: int, record: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate h', before, after and maximum; those of the edits have no rows unless recorded."""
    dtype, n_rows = compute_dtype(h, encoder_rows), h.shape[0] if record else 0
    slots = h.new_empty(n_rows, n_slots, dtype=dtype)
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    return out, slots, torch.empty_like(slots), h.new_empty(n_rows, dtype=dtype)
