"""`sparse_encode` and `sparse_decode`, compared with dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.conftest import Measure
from bench.harness.cases import ROWS, Setting, backends, check_rows, with_rows
from dspa_kernels import SAEWeights, sparse_decode, sparse_encode
from dspa_kernels.testing import Activity

CAPACITY = 256


def labels(op: str, case: str, backend: str, setting: Setting) -> dict[str, Any]:
    shape = (setting.sae.d_in, setting.sae.d_sae)
    return {"op": op, "case": case, "backend": backend, "shape": shape, "rows": setting.n_rows}


def dense_encode(h: Tensor, sae: SAEWeights) -> Tensor:
    pre = h @ sae.W_enc + sae.b_enc.to(h.dtype)
    return pre * ((pre > sae.threshold) & (pre > 0))


def as_dense(indices: Tensor, values: Tensor, d_sae: int) -> Tensor:
    """Latents [N, d_sae]. Empty places go to an extra column, which is dropped."""
    f = values.new_zeros(len(indices), d_sae + 1)
    place = torch.where(indices < 0, d_sae, indices).long()
    return f.scatter_(1, place, values)[:, :d_sae]


@pytest.mark.parametrize(("backend", "n_rows"), with_rows(backends("sparse_encode")))
def test_encode(measure: Measure, activity: Activity, backend: str, n_rows: int) -> None:
    setting = Setting.of(activity, "hard", n_rows)
    h, sae = setting.h[: 4 * n_rows], setting.sae
    ours, wanted = (sparse_encode(h, sae, capacity=CAPACITY, backend=name) for name in (backend, "reference"))
    check_rows(*(as_dense(f.indices, f.values, sae.d_sae) for f in (ours, wanted)))
    steps = setting.steps(lambda h, _: sparse_encode(h, sae, capacity=CAPACITY, backend=backend).values)
    n_bytes = setting.encoder_bytes + n_rows * (sae.d_in * h.element_size() + 8 * CAPACITY)
    measure(
        steps, capture=backend != "reference", n_bytes=n_bytes, **labels("sparse_encode", "encode", backend, setting)
    )


@pytest.mark.parametrize("n_rows", ROWS)
def test_dense_encode(measure: Measure, activity: Activity, n_rows: int) -> None:
    setting = Setting.of(activity, "hard", n_rows)
    n_bytes = setting.encoder_bytes + n_rows * (setting.sae.d_in + setting.sae.d_sae) * setting.h.element_size()
    steps = setting.steps(lambda h, _: dense_encode(h, setting.sae))
    measure(steps, n_bytes=n_bytes, **labels("sparse_encode", "dense PyTorch, eager", "torch", setting))


@pytest.mark.parametrize(("backend", "n_rows"), [*with_rows(backends("sparse_decode")), *(("torch", n) for n in ROWS)])
def test_decode(measure: Measure, activity: Activity, backend: str, n_rows: int) -> None:
    setting = Setting.of(activity, "hard", n_rows)
    sae = setting.sae
    latents = [sparse_encode(h, sae, capacity=CAPACITY, backend="reference") for h, _ in setting.batches()]
    if backend == "torch":
        dense = [as_dense(f.indices, f.values, sae.d_sae).to(sae.W_dec.dtype) for f in latents[:8]]
        steps = [lambda f=f: f @ sae.W_dec for f in dense]
        n_bytes, case = float(sae.W_dec.nbytes), "dense PyTorch, eager"
    else:
        steps = [lambda f=f: sparse_decode(f, sae.W_dec, backend=backend) for f in latents]
        active = sum(int(f.counts.sum()) for f in latents) / len(latents)
        n_bytes, case = active * sae.d_in * sae.W_dec.element_size(), "decode"
        for step, f in zip(steps, latents, strict=True):
            check_rows(step(), sparse_decode(f, sae.W_dec, backend="reference"))
    measure(steps, capture=backend != "reference", n_bytes=n_bytes, **labels("sparse_decode", case, backend, setting))
