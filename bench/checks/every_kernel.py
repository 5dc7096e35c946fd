"""Compares every kernel once with the reference, at small shapes: `python -m bench.checks.every_kernel`.

It is short, so that it can run under compute-sanitizer. Weights and rows are small integers where nothing is
normalised. Then every sum is exact, and results have to be equal to the last bit.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.harness.cases import KERNELS, SCREEN, running
from bench.harness.measure import synchronize
from dspa_kernels import (
    BackendError,
    EncoderStream,
    MapWeights,
    PlacedTokens,
    PromptRows,
    SAEWeights,
    SteeringPlan,
    activation_bits,
    activation_counts,
    activation_sums,
    bit_counts,
    fsrl_residual,
    lookup_and_steer,
    map_lookup,
    n_words,
    place_tokens,
    sparse_decode,
    sparse_encode,
    steer,
    steer_,
)
from dspa_kernels.backends import IMPLEMENTED
from dspa_kernels.testing import random_map, random_plan, random_sae, run_on, tensors

D_IN, D_SAE, D_SAE_IN, N_COLUMNS, N_PROMPTS = 200, 600, 300, 40, 5
ROWS = (1, 19, 40, 100)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# kind, dtypes of rows and weights, normalisation, screen, record
VARIANTS = [
    ("jumprelu", (BF16, BF16), "none", "none", False),
    ("jumprelu", (BF16, BF16), "none", SCREEN, False),
    ("jumprelu", (BF16, BF16), "none", "none", True),
    ("topk", (BF16, BF16), "none", "none", False),
    ("topk", (BF16, BF16), "none", SCREEN, True),
    ("relu", (FP16, FP16), "none", SCREEN, False),
    ("relu", (FP32, BF16), "layer_norm", "none", False),
    ("jumprelu", (FP32, FP32), "constant_norm_rescale", SCREEN, True),
]

Check = Callable[[str], None]


def compare(call: Callable[..., object], exact: bool, *args: object, **options: object) -> Check:
    """A check that `call` gives the same on a backend as on the reference."""

    def check(backend: str) -> None:
        results = [tensors(run_on(name, call, *args, **options)) for name in (backend, "reference")]
        for ours, wanted in zip(*results, strict=True):
            tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 2e-2, "atol": 1e-3}
            torch.testing.assert_close(ours, wanted, equal_nan=True, **tolerance)

    return check


def adapted(
    h: Tensor, sae: SAEWeights, W_a: Tensor, b_a: Tensor, threshold: Tensor | None, *options: object, backend: str
) -> list[Tensor]:
    """Results and gradients of `fsrl_residual`."""
    leaves = [tensor.detach().requires_grad_() for tensor in (h, W_a, b_a, threshold) if tensor is not None]
    inputs = (leaves[0], sae, *leaves[1:], *(() if threshold is not None else (None,)))
    activation, settings = options
    out, l1, l0 = fsrl_residual(*inputs, activation, backend=backend, **settings)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    grads = [torch.randint(-2, 3, result.shape, generator=g).to(result) for result in (out, l1)]
    return [out.detach(), l1.detach(), l0, *torch.autograd.grad((out, l1), leaves, grads)]


def adapter_checks() -> Iterator[tuple[str, str, Check]]:
    """Checks of `fsrl_residual` and its backward. W_a is sparse, so that 16 bits hold every change of a latent."""
    adapters = itertools.product(
        ("soft_threshold", "relu", "jumprelu"), ("jumprelu", "topk"), (BF16, FP16, FP32), (1.0, 0.25)
    )
    for (activation, kind, dtype, fraction), n in itertools.product(adapters, ROWS):
        sae = random_sae(kind, D_IN, D_SAE, dtype=dtype, integers=True)
        W_a = integers(-1, 2, D_SAE, D_IN) * (integers(0, 10, D_SAE + 1, D_IN)[1:] == 0)
        threshold = None if activation == "relu" else integers(0, 4, D_SAE).float()
        settings = {"fraction": fraction, "bandwidth": 2.0}
        arguments = (integers(-2, 3, n, D_IN).to(dtype), sae, W_a.to(dtype), integers(-2, 3, D_SAE).float(), threshold)
        name = f"{n} rows, {activation}, {kind}, {dtype}, fraction {fraction}"
        yield "fsrl_residual", name, compare(adapted, True, *arguments, activation, settings)


def served(h: Tensor, sae: SAEWeights, slots: Tensor, blocks: Tensor, *, backend: str) -> list[Tensor]:
    """Bits of the rows that are kept, and counts of two rows of blocks of 4 slots, one of which is named."""
    bits = torch.zeros(len(h), n_words(sae.d_sae), dtype=torch.int32, device=h.device)
    activation_bits(h, sae, slots, bits, backend=backend)
    n_tokens, rows = torch.tensor([len(h), 0], device=h.device), torch.tensor([0, -1], device=h.device).int()
    counts = torch.full((2, sae.d_sae), 7, dtype=torch.int32, device=h.device)
    return [bits, bit_counts(bits, blocks, 4, n_tokens, rows, counts, backend=backend)]


def placed(positions: Tensor, *, backend: str) -> list[Tensor]:
    """Tokens of a step of two sequences, the first of which ends its prompt."""
    device, n_tokens = positions.device, len(positions)
    rows, starts = torch.tensor([3, 1], device=device), torch.tensor([0, 2, n_tokens], device=device).int()
    n_counted = torch.tensor([0, 2 * n_tokens, 0, 2], device=device)
    prompts = PromptRows(n_counted, torch.ones_like(n_counted).bool()[:, None], torch.zeros_like(n_counted).bool())
    token = torch.zeros(2 * n_tokens, dtype=torch.int64, device=device)
    out = PlacedTokens(token.int(), token.clone(), token.clone(), torch.zeros(1, 4, device=device).int())
    place_tokens(rows, starts, positions, positions, prompts, out, backend=backend)
    return [out.row, out.position[:n_tokens], out.slot, out.due, prompts.planned]


def integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.int32)


def stream_of(sae: SAEWeights, screen: str) -> EncoderStream:
    hot = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(1))[:24]
    return EncoderStream.of(sae, hot=hot, screen=screen)


def checks() -> Iterator[tuple[str, str, Check]]:
    """Triples of an op, a name and a check."""
    counts = integers(0, 9, N_PROMPTS, D_SAE_IN)
    for (kind, dtypes, normalize, screen, record), n in itertools.product(VARIANTS, ROWS):
        name = f"{n} rows, {kind}, {dtypes[0]} x {dtypes[1]}, {normalize}, screen {screen}, record {record}"
        exact = normalize == "none"
        sae = random_sae(kind, D_IN, D_SAE, dtype=dtypes[1], normalize=normalize, integers=exact)
        h = integers(-2, 3, n, D_IN).to(dtypes[0])
        cdmap = random_map(sae, D_SAE_IN, N_COLUMNS)
        plan = random_plan(N_PROMPTS, 6, N_COLUMNS)
        fixed = {"rows": integers(-1, N_PROMPTS, n), "alpha": 0.125, "record": record, "stream": stream_of(sae, screen)}
        yield "steer", name, compare(steer, exact, h, sae, cdmap, plan, **fixed)
        yield "steer", f"{name}, with strengths", compare(steer, exact, h, sae, cdmap, with_strengths(plan), **fixed)
        if not record:
            parts = (h, integers(-2, 3, n + 1, D_IN)[1:].to(h))
            yield "steer", f"{name}, in place", compare(in_place, exact, *parts, sae, cdmap, plan, **fixed)
        arguments = (h, counts, sae, cdmap)
        yield "lookup_and_steer", name, compare(lookup_and_steer, exact, *arguments, **fixed)
        if screen == "none" and not record:
            arguments = (h, sae, integers(-1, 3, n), 3)
            yield "activation_counts", name, compare(activation_counts, exact, *arguments)
            yield "activation_sums", name, compare(activation_sums, exact, *arguments)
            slots, blocks = torch.arange(n).flip(0), torch.arange(2 * n, dtype=torch.int32).view(2, n)
            yield "activation_bits", name, compare(served, exact, h, sae, slots, blocks % -(-n // 4))
            yield "sparse_encode", name, compare(sparse_encode, exact, h, sae, capacity=400)
            latents = sparse_encode(h, sae, capacity=400, backend="reference")
            yield "sparse_decode", name, compare(sparse_decode, exact, latents, sae.W_dec)
    for mode in ("ablate", "augment", "both"):
        values = torch.randn(D_SAE_IN, N_COLUMNS, generator=torch.Generator().manual_seed(0))
        yield "map_lookup", mode, compare(map_lookup, True, counts, values, mode=mode)
    yield "place_tokens", "two sequences", compare(placed, True, torch.arange(40))
    yield from adapter_checks()


def with_strengths(plan: SteeringPlan) -> SteeringPlan:
    """The plan with slots of all kinds, and a whole number as the strength of each."""
    kinds = torch.tensor([-1, 1, 2, 3, 4], dtype=torch.int8)
    signs = kinds[torch.arange(plan.slots.numel()) % len(kinds)].view_as(plan.slots)
    return SteeringPlan(plan.slots, torch.where(plan.slots < 0, 0, signs), integers(-3, 4, *plan.slots.shape).float())


def in_place(
    h: Tensor, residual: Tensor, sae: SAEWeights, cdmap: MapWeights, plan: SteeringPlan, *, record: bool, **fixed: Any
) -> tuple[Tensor, Tensor]:
    """Copies of both parts of a residual stream after `steer_`, which records nothing."""
    h, residual = h.clone(), residual.clone()
    steer_(h, sae, cdmap, plan, residual=residual, **fixed)
    return h, residual


def few_programs(n: int | None) -> contextlib.AbstractContextManager[object]:
    """Limit Triton's persistent grids to `n` programs, for a tool that leaves fewer registers than expected."""
    patches = contextlib.ExitStack()
    for op in ("steer", "fsrl_residual") if n is not None else ():
        patches.enter_context(mock.patch(f"dspa_kernels.ops.{op}.triton_impl.n_programs", lambda *_: n))
    return patches


def passes(name: str, check: Check, backend: str) -> bool:
    """Run a check, and print what is wrong if it fails."""
    try:
        check(backend)
        synchronize()
    except BackendError as error:
        print(f"left out {name}: {error}")
    except Exception:
        print(f"FAILED {name}", traceback.format_exc(limit=-3), sep="\n")
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--programs", type=int, help="size of Triton's persistent grids")
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS), help="only these numbers of rows")
    parser.add_argument("--only", help="only this op")
    parser.add_argument("--some", type=int, help="only so many checks, at even intervals")
    chosen = parser.parse_args()
    passed = []
    for kernel in chosen.backends:
        with few_programs(chosen.programs), running(kernel) as backend:
            mine = [
                (f"{kernel}, {op}, {name}", check)
                for op, name, check in checks()
                if (op, backend) in IMPLEMENTED
                and chosen.only in (None, op)
                and (" rows" not in name or int(name.split()[0]) in chosen.rows)
            ]
            few = mine[:: -(-len(mine) // chosen.some)] if chosen.some else mine
            passed += [passes(name, check, backend) for name, check in few]
    print(f"every kernel: {sum(passed)} of {len(passed)} as the reference")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
