"""Decoding with and without steering."""

from __future__ import annotations

import pytest

from bench.conftest import Measure
from bench.harness.cases import Case
from bench.ops import generate


@pytest.mark.parametrize("case", generate.cases(generate.BATCHES), ids=str)
def test_case(measure: Measure, case: Case) -> None:
    measure(case)
