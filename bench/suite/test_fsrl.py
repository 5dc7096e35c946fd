"""A decoding step of `fsrl_residual`, compared with dense matrices.

`python -m bench.offline.fsrl` measures a training step.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.conftest import Measure
from bench.harness.cases import ROWS, Adapter, Setting, backends, check_rows, with_rows
from bench.offline.fsrl import plain
from dspa_kernels import fsrl_residual
from dspa_kernels.testing import Activity


def labels(case: str, backend: str, setting: Setting) -> dict[str, Any]:
    shape = (setting.sae.d_in, setting.sae.d_sae)
    return {"op": "fsrl_residual", "case": case, "backend": backend, "shape": shape, "rows": setting.n_rows}


@pytest.mark.parametrize(("backend", "n_rows"), with_rows(backends("fsrl_residual")))
def test_step(measure: Measure, activity: Activity, backend: str, n_rows: int) -> None:
    setting, adapter = Setting.of(activity, "hard", n_rows), Adapter.of(activity)
    for h, _ in list(setting.batches())[:2]:
        check_rows(*(fsrl_residual(h, setting.sae, *adapter, backend=name).h for name in (backend, "reference")))
    steps = setting.steps(lambda h, _: fsrl_residual(h, setting.sae, *adapter, backend=backend).h)
    n_bytes = sum(adapter.n_bytes(h, setting.sae) for h, _ in setting.batches()) / len(steps)
    measure(steps, capture=backend != "reference", n_bytes=n_bytes, **labels("decoding step", backend, setting))


@pytest.mark.parametrize("n_rows", ROWS)
def test_dense_step(measure: Measure, activity: Activity, n_rows: int) -> None:
    setting, adapter = Setting.of(activity, "hard", n_rows), Adapter.of(activity)
    steps = setting.steps(lambda h, _: plain(h, setting.sae, *adapter)[0])
    n_bytes = 3.0 * setting.sae.encoder_rows.nbytes
    measure(steps, n_bytes=n_bytes, **labels("dense PyTorch, eager", "torch", setting))
