"""`steer_`: a residual stream in one part or two, edited in place, against plain PyTorch and `steer` of the sum."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from dspa_kernels import EncoderStream, InputError, steer, steer_
from dspa_kernels.cuda_library import MAX_ROWS
from dspa_kernels.testing import KINDS, run_on, same_bits
from dspa_kernels.weights import NORMALIZATIONS

from . import oracle
from .cases import BF16, D_IN, D_SAE, DTYPES, PER_PLAN, Case, make_case, residual

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def edited(h: Tensor, residual: Tensor | None, *, backend: str, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    """Copies of both parts after an edit in place."""
    h, residual = h.clone(), None if residual is None else residual.clone()
    steer_(h, residual=residual, backend=backend, **arguments)
    return h, residual


def other_part(h: Tensor) -> Tensor:
    """A second part of integer rows: integers, and numbers that rounding takes out of the sum again. No sum is -0.0."""
    small = torch.finfo(h.dtype).eps / 8 * torch.where(torch.arange(h.shape[1]) % 3 == 0, -1, 1)
    integers = residual(len(h), h.dtype, integers=True, seed=7, d_in=h.shape[1])
    is_small = (torch.arange(h.shape[1]) % 2 == 0) & (h != 0)
    part = torch.where(is_small, small.to(h.dtype), integers)
    return torch.where(part == 0, -0.0, part)


def parts(case: Case) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The first part with zeros of both signs, the second, and the other arguments of a case."""
    arguments = case.arguments()
    h = arguments.pop("h")
    return torch.where(h == 0, -0.0, h), other_part(h), arguments


@pytest.mark.parametrize("alpha", [0.125, PER_PLAN], ids=repr)
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_exact_on_integers(
    backend: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype], alpha: float | Tensor
) -> None:
    h, residual, arguments = parts(make_case(kind, dtypes, integers=True))
    total = h + residual
    assert torch.equal(total, total.round()) and not torch.equal(total.double(), h.double() + residual.double())
    exact, before, after, _ = oracle.steer(total, **arguments, alpha=alpha)
    changed = (before != after).any(dim=1)
    assert changed.any() and not changed.all()
    out, rest = run_on(backend, edited, h, residual, **arguments, alpha=alpha)
    assert rest is not None
    assert torch.equal(out[changed], exact[changed].to(h.dtype))
    assert same_bits(rest[changed], torch.zeros_like(rest[changed]))
    assert same_bits(out[~changed], h[~changed]) and same_bits(rest[~changed], residual[~changed])


@pytest.mark.parametrize(
    ("kind", "dtypes", "normalize", "screen"),
    [
        ("jumprelu", BF16, "none", "none"),
        ("relu", BF16, "none", "int5"),
        ("topk", BF16, "none", "none"),
        ("topk", DTYPES[4], "none", "int5"),
        ("jumprelu", BF16, "layer_norm", "none"),
        ("relu", DTYPES[0], "constant_norm_rescale", "none"),
        ("jumprelu", DTYPES[0], "none", "none"),
    ],
)
@pytest.mark.parametrize("n", [0, 1, MAX_ROWS, 19])
def test_as_steer_of_the_sum(
    backend: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype], normalize: str, screen: str, n: int
) -> None:
    """Rows of two parts and of one, with strengths, positions and counters."""
    case = make_case(kind, dtypes, n=n, normalize=normalize)
    h, arguments = case.h, case.arguments()
    del arguments["h"]
    arguments |= {
        "alpha": PER_PLAN,
        "stream": EncoderStream.of(case.sae, hot=torch.arange(0, D_SAE, 3), n_large=5, screen=screen),
        "positions": torch.arange(n) % 3,
        "start": torch.tensor([1, 0, 0]),
    }
    for second in (residual(n, h.dtype, seed=7), None):
        total = h if second is None else h + second
        expected, edits = run_on(backend, steer, total, **arguments, record=True)
        changed = (edits.before != edits.after).any(dim=1)
        out, rest = run_on(backend, edited, h, second, **arguments)
        assert same_bits(out[changed], expected[changed]) and same_bits(out[~changed], h[~changed])
        if second is not None:
            assert rest is not None and not rest[changed].any() and same_bits(rest[~changed], second[~changed])
        assert changed.any() or n < MAX_ROWS


@pytest.mark.parametrize("kind", KINDS)
def test_counts_the_rows_as_steer_does(backend: str, kind: str) -> None:
    case = make_case(kind, BF16)
    case.h[1, 3] = float("nan")
    h, arguments = case.h, case.arguments()
    del arguments["h"]
    second = residual(len(h), h.dtype, seed=7)

    def counted(*parts: Tensor, backend: str) -> Tensor:
        paths = torch.zeros(6, dtype=torch.int64, device=parts[0].device)
        moved = {name: value.to(parts[0].device) for name, value in arguments.items()}
        if len(parts) == 1:
            steer(*parts, **moved, paths=paths, backend=backend)
        else:
            edited(*parts, **moved, paths=paths, backend=backend)
        return paths[:5]

    assert torch.equal(run_on(backend, counted, h, second), run_on(backend, counted, h + second))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_parts_of_a_sum_that_is_not_finite_stay(backend: str, normalize: str) -> None:
    """NaNs keep their payloads, and a part may be finite by itself."""
    case = make_case("relu", (torch.float16, torch.float16) if normalize == "none" else BF16, normalize=normalize)
    h, arguments = case.h, case.arguments(alpha=1)
    del arguments["h"]
    second = residual(len(h), h.dtype, seed=7)
    largest = torch.finfo(h.dtype).max
    bad = torch.tensor([1, 2, 6])
    h.view(torch.int16)[1, 3], second.view(torch.int16)[1, 4] = 0x7FC1, 0x7FC2
    h[2, 3], second[2, 3] = float("inf"), -float("inf")
    h[6, 3], second[6, 3] = largest, largest
    good = torch.ones(len(h), dtype=torch.bool)
    good[bad] = False
    out, rest = run_on(backend, edited, h, second, **arguments)
    assert rest is not None and same_bits(out[bad], h[bad]) and same_bits(rest[bad], second[bad])
    assert (case.rows[bad] >= 0).all() and not same_bits(out[good], h[good])


@pytest.mark.parametrize("what", ["unsteered", "empty plan", "alpha 0"])
def test_rows_without_an_edit_keep_their_bits(backend: str, what: str) -> None:
    case = make_case("jumprelu", BF16, integers=True)
    if what == "unsteered":
        case.rows.fill_(-1)
    if what == "empty plan":
        case.plan.slots.fill_(-1)
    h, residual, arguments = parts(case)
    out, rest = run_on(backend, edited, h, residual, **arguments, alpha=0.0 if what == "alpha 0" else 1.0)
    assert rest is not None and same_bits(out, h) and same_bits(rest, residual)
    assert (h.view(torch.int16) == -(2**15)).any() and (residual.view(torch.int16) == -(2**15)).any()


@contextmanager
def stored() -> Iterator[list[Any]]:
    """Collect the addresses that the interpreter's programs store to."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen: list[Any] = []
    store = InterpreterBuilder.create_masked_store

    def collecting(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen.append(np.broadcast_to(ptrs.data, np.shape(mask.data))[np.asarray(mask.data, bool)].ravel())
        return store(self, ptrs, value, mask, *rest)

    with mock.patch.object(InterpreterBuilder, "create_masked_store", collecting):
        yield seen


@pytest.mark.skipif(not INTERPRETED, reason="stores are seen in Triton's interpreter")
@pytest.mark.parametrize("n", [8, 19])
def test_only_rows_that_change_are_written(n: int) -> None:
    h, residual, arguments = parts(make_case("jumprelu", BF16, n=n, integers=True))
    out, rest = h.clone(), residual.clone()
    with stored() as addresses:
        steer_(out, residual=rest, **arguments, backend="triton")
    written = np.concatenate(addresses)
    for before, after in ((h, out), (residual, rest)):
        first, size = after.data_ptr(), after.element_size()
        inside = written[(written >= first) & (written < first + after.nbytes)]
        rows = set(((inside - first) // (size * D_IN)).tolist())
        assert rows == set((before != after).any(dim=1).nonzero().flatten().tolist()) and 0 < len(rows) < n


VALID = make_case(n=4)
STRIDED = torch.zeros(4, 2 * D_IN)[:, ::2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"h": STRIDED}, ("`h`", "not contiguous", "in place", "use steer")),
        ({"h": torch.zeros(4, D_IN, requires_grad=True)}, ("`h`", "a gradient", "torch.no_grad()")),
        ({"residual": STRIDED}, ("`residual`", "not contiguous", "in place")),
        ({"residual": torch.zeros(4, D_IN, requires_grad=True)}, ("`residual`", "a gradient", "torch.no_grad()")),
        ({"residual": torch.zeros(3, D_IN)}, ("`residual`", "[3, 19]", "[4, 19]")),
        ({"residual": torch.zeros(4, D_IN).double()}, ("`residual`", "torch.float64", "torch.float32")),
        ({"residual": torch.zeros(4, D_IN, device="meta")}, ("`residual`", "meta", "cpu")),
        ({"residual": 0.0}, ("`residual`", "a float", "a tensor")),
        ({"plan": VALID.plan.to("meta")}, ("`plan`", "meta", "cpu")),
        ({"alpha": -1.0}, ("`alpha`", "-1.0", "finite number >= 0")),
    ],
)
def test_input_errors(change: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        steer_(**VALID.arguments(**change))
    assert all(part in str(error.value) for part in said), error.value


def test_edits_a_parameter_without_gradients() -> None:
    case = make_case(integers=True)
    expected = steer(**case.arguments())
    arguments = case.arguments(h=torch.nn.Parameter(case.h.clone()))
    with torch.no_grad():
        steer_(**arguments)
    assert torch.equal(arguments["h"].detach(), expected) and arguments["h"]._version > 0
