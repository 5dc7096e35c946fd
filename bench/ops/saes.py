"""Cases of an SAE as a module: encode, decode and call of `FusedSAE`, of `fuse` and of SAELens."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness.cases import N_ROWS, Case, Shape, Steps, activity_of, check_rows, n_steps
from bench.ops.dense import SAELensFormula, as_dense, sae_lens, widened
from bench.ops.sparse import CAPACITY
from dspa_kernels import BackendError, SAEWeights, SparseLatents, fuse
from dspa_kernels.fusing import ACTIVATIONS
from dspa_kernels.nn import FusedSAE

# One row, and on a GPU 4096.
ROWS = [1, N_ROWS // 2]
CALLS = {"SAE.encode": "encode", "SAE.decode": "decode", "SAE": "__call__"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The largest errors of reconstructions, relative to the norm of their row.
ERRORS = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
# The sparse ones have places for CAPACITY latents of a row, the others make all latents.
DENSE, SPARSE, FUSED, FUSED_SPARSE = "FusedSAE", "FusedSAE, sparse", "fuse", "fuse, sparse"
OURS, OF_SAE_LENS = (DENSE, SPARSE), (FUSED, FUSED_SPARSE)
EAGER, COMPILED = "SAELens, eager", "SAELens, compiled"


class FormulaOfFuse:
    """The part of a fused JumpReLU SAE that differs from SAELens' and needs no sae-lens: its latents, no hook points.

    On a GPU, `decode` of a fused SAE is SAELens' product, and its sparse call the ops of `FusedSAE`.
    """

    def __init__(self, formula: SAELensFormula) -> None:
        self.encode = partial(ACTIVATIONS["JumpReLUSAE", "ReLU"], formula)


def module(name: str, sae: SAEWeights, backend: str) -> tuple[Any, dict[str, Any]]:
    """The SAE as an object, and where it is from: sae-lens, or its formula."""
    if name in OURS:
        return FusedSAE(sae, capacity=CAPACITY if name == SPARSE else None, backend=backend), {}
    theirs, source = sae_lens(sae)
    if name in OF_SAE_LENS:
        capacity = CAPACITY if name == FUSED_SPARSE else None
        theirs = fuse(theirs, capacity=capacity) if source == "package" else FormulaOfFuse(theirs)
    return theirs, {"sae_lens": source}


def run_of(name: str, sae: Any, call: str) -> Any:
    """The function of a step. That of a sparse SAE keeps latents sparse."""
    run = getattr(sae, "encode_sparse" if name == SPARSE and call == "encode" else call, None)
    if run is None or (name == FUSED_SPARSE and not isinstance(sae, torch.nn.Module)):
        raise BackendError(f"sae-lens is not installed: there is nothing to fuse, and {name} has no {call}")
    if name == COMPILED:
        torch.compiler.reset()
        return torch.compile(run, dynamic=False)
    return run


def step(case: Case, backend: str) -> Steps:
    """One call of the SAE: rows of ours checked in the SAE's dtype, those of SAELens in fp32, in which both agree."""
    activity, (name, _, dtype), call = activity_of(case.shape), case.name.rpartition(", "), CALLS[case.op]
    sae = activity.sae if dtype == "bf16" else widened(activity.sae)
    h = activity.h[: n_steps(case.rows) * case.rows].to(DTYPES[dtype])
    ours, facts = module(name, sae, backend)
    run = run_of(name, ours, call)

    def inputs(sae: SAEWeights, h: Tensor) -> list[Any]:
        """The rows of each step, or to decode their latents."""
        reference, _ = module(SPARSE if name == SPARSE else DENSE, sae, "reference")
        return [run_of(name, reference, "encode")(x) if call == "decode" else x for x in h.split(case.rows)]

    def checked() -> None:
        few, run_few, weights = h[: 4 * case.rows], run, sae
        if name not in OURS and dtype != "fp32":
            few, weights = few.float(), widened(sae)
            run_few = run_of(name, module(name, weights, backend)[0], call)
        reference, _ = module(SPARSE if name == SPARSE else DENSE, weights, "reference")
        wanted = run_of(name, reference, call)
        batches = inputs(weights, few)
        rows = [torch.cat([dense(way(x), sae.d_sae) for x in batches]) for way in (run_few, wanted)]
        (check_rows if call == "encode" else check_reconstructions)(*rows)

    return Steps([partial(run, x) for x in inputs(sae, h)], checked, facts=lambda: facts)


def check_reconstructions(out: Tensor, wanted: Tensor) -> None:
    """Fail unless the errors of rows [N, d_in] are small next to their norms. One in a thousand may be larger, since
    rounding may decide whether a latent is active. A sum of latents that cancel is not close in bf16 as a number."""
    assert out.shape == wanted.shape and out.dtype == wanted.dtype
    errors = (out.float() - wanted.float()).norm(dim=1) / wanted.float().norm(dim=1)
    close = errors <= ERRORS[out.dtype]
    assert float(close.float().mean()) >= 0.999, f"{int((~close).sum())} of {len(close)} rows are wrong"


def dense(out: Tensor | SparseLatents, d_sae: int) -> Tensor:
    return as_dense(out, d_sae) if isinstance(out, SparseLatents) else out


def cases(names: Iterable[str], backends: Iterable[str], shape: Shape) -> Iterator[Case]:
    """Cases by name, with the numbers of rows outermost. Sparse latents of `fuse` are of its call alone."""
    for rows, dtype, op, name, backend in itertools.product(ROWS, DTYPES, CALLS, tuple(names), tuple(backends)):
        if name != FUSED_SPARSE or op == "SAE":
            yield Case(op, f"{name}, {dtype}", backend, shape, rows, step)
