"""A decoding step of `fsrl_residual` beside dense matrices. What a training step takes: `python -m bench.fsrl`."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench.cases import ROWS, Setting, backends, check_rows, with_rows
from bench.conftest import Measure
from bench.fsrl import plain
from dspa_kernels import SAEWeights, fsrl_residual
from dspa_kernels.testing import Activity

# Of the latents, how many are moved on a row; half of them are pushed down.
MOVED = 0.01


class Adapter(NamedTuple):
    """A soft threshold that moves a part of the latents of each row."""

    W_a: Tensor
    b_a: Tensor
    threshold: Tensor

    @classmethod
    def of(cls, activity: Activity) -> Adapter:
        sae = activity.sae
        generator = torch.Generator(sae.W_enc.device).manual_seed(0)
        W_a = torch.empty_like(sae.W_enc).normal_(std=sae.d_in**-0.5, generator=generator)
        sizes = (activity.h[:256] @ W_a.T).abs().float()
        return cls(W_a, torch.zeros_like(sae.b_enc), torch.quantile(sizes, 1 - MOVED, dim=0))

    def n_bytes(self, h: Tensor, sae: SAEWeights) -> float:
        """What a step of rows h reads: the adapter, encoder rows of what is pushed down on some row, decoder rows of
        what changes on some row."""
        u = h.float() @ self.W_a.float().T
        pre = h.float() @ sae.W_enc.float().T + sae.b_enc
        active = (pre > sae.threshold) & (pre > 0)
        up, down = u > self.threshold, u < -self.threshold
        read = int(down.any(dim=0).sum()) + int((up | (down & active)).any(dim=0).sum())
        return self.W_a.nbytes + sae.W_dec.element_size() * read * sae.d_in


def labels(case: str, backend: str, setting: Setting) -> dict[str, Any]:
    shape = (setting.sae.d_in, setting.sae.d_sae)
    return {"op": "fsrl_residual", "case": case, "backend": backend, "shape": shape, "rows": setting.n_rows}


@pytest.mark.parametrize(("backend", "n_rows"), with_rows(backends("fsrl_residual")))
def test_step(measure: Measure, activity: Activity, backend: str, n_rows: int) -> None:
    setting, adapter = Setting.of(activity, "hard", n_rows), Adapter.of(activity)
    for h, _ in list(setting.batches())[:2]:
        check_rows(*(fsrl_residual(h, setting.sae, *adapter, backend=each).h for each in (backend, "reference")))
    steps = setting.steps(lambda h, _: fsrl_residual(h, setting.sae, *adapter, backend=backend).h)
    n_bytes = sum(adapter.n_bytes(h, setting.sae) for h, _ in setting.batches()) / len(steps)
    measure(steps, capture=backend != "reference", n_bytes=n_bytes, **labels("decoding step", backend, setting))


@pytest.mark.parametrize("n_rows", ROWS)
def test_dense_step(measure: Measure, activity: Activity, n_rows: int) -> None:
    setting, adapter = Setting.of(activity, "hard", n_rows), Adapter.of(activity)
    steps = setting.steps(lambda h, _: plain(h, setting.sae, *adapter)[0])
    n_bytes = 3.0 * setting.sae.W_enc.nbytes
    measure(steps, n_bytes=n_bytes, **labels("dense PyTorch, eager", "torch", setting))
