"""Every op at every shape, compared with what it replaces. A wrong result fails instead of being timed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.conftest import Measure
from bench.harness.cases import FEW_ROWS, ROWS, SHAPES, Case, Shape, backends, steer_backends
from bench.ops import counts, fsrl, read, saes, sparse, steer


def kernels_and_reference(names: list[str]) -> list[tuple[list[str], list[int]]]:
    """Backends with the numbers of rows at which they are measured. The reference is slow."""
    return [([name for name in names if name != "reference"], ROWS), (["reference"], FEW_ROWS)]


def cases(shape: Shape) -> Iterator[Case]:
    yield from read.cases(shape)
    for names, rows in kernels_and_reference(steer_backends()):
        # The reference reads no screen.
        screened = steer.SCREENED if names != ["reference"] else ()
        yield from steer.cases((*steer.STREAMS, *steer.MEAN, *screened), names, shape, rows)
    yield from steer.cases(steer.FIXED, steer_backends(), shape, FEW_ROWS)
    yield from steer.cases(steer.EAGER, ["torch"], shape, ROWS)
    yield from steer.cases(steer.COMPILED, ["torch"], shape, FEW_ROWS)
    yield from steer.cases([steer.COMPILED_REFERENCE], ["reference"], shape, FEW_ROWS)
    yield from counts.cases([*backends("activation_counts"), "torch"], shape)
    for names, rows in [*kernels_and_reference(backends("sparse_encode")), (["torch"], ROWS)]:
        yield from sparse.cases(names, shape, rows)
    for names, rows in [*kernels_and_reference(backends("fsrl_residual")), (["torch"], ROWS)]:
        yield from fsrl.cases(names, shape, rows)
    yield from saes.cases(saes.OURS, [name for name in backends("sparse_encode") if name != "reference"], shape)
    yield from saes.cases((*saes.OF_SAE_LENS, saes.EAGER), ["torch"], shape)


@pytest.mark.parametrize("case", [case for shape in SHAPES for case in cases(shape)], ids=str)
def test_case(measure: Measure, case: Case) -> None:
    measure(case)
