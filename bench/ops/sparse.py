"""Cases of `sparse_encode` and `sparse_decode`, compared with dense matrices."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import partial

from bench.harness.cases import Case, Setting, Shape, Steps, activity_of, check_rows
from bench.ops.dense import as_dense, dense_encode
from dspa_kernels import sparse_decode, sparse_encode

CAPACITY = 256


def encode(case: Case, backend: str) -> Steps:
    setting = Setting.of(activity_of(case.shape), "hard", case.rows)
    h, sae = setting.h[: 4 * case.rows], setting.sae
    size = setting.h.element_size()
    if backend == "torch":
        n_bytes = setting.encoder_bytes + case.rows * (sae.d_in + sae.d_sae) * size
        return Steps(setting.steps(lambda h, _: dense_encode(h, sae)), n_bytes=n_bytes)

    def check() -> None:
        ours, wanted = (sparse_encode(h, sae, capacity=CAPACITY, backend=name) for name in (backend, "reference"))
        check_rows(*(as_dense(f, sae.d_sae) for f in (ours, wanted)))

    return Steps(
        setting.steps(lambda h, _: sparse_encode(h, sae, capacity=CAPACITY, backend=backend).values),
        check,
        capture=backend != "reference",
        n_bytes=setting.encoder_bytes + case.rows * (sae.d_in * size + 8 * CAPACITY),
    )


def decode(case: Case, backend: str) -> Steps:
    setting = Setting.of(activity_of(case.shape), "hard", case.rows)
    sae = setting.sae
    latents = [sparse_encode(h, sae, capacity=CAPACITY, backend="reference") for h, _ in setting.batches()]
    if backend == "torch":
        dense = [as_dense(f, sae.d_sae).to(sae.W_dec.dtype) for f in latents[:8]]
        return Steps([partial(f.matmul, sae.W_dec) for f in dense], n_bytes=float(sae.W_dec.nbytes))
    calls = [partial(sparse_decode, f, sae.W_dec, backend=backend) for f in latents]

    def check() -> None:
        for call, f in zip(calls, latents, strict=True):
            check_rows(call(), sparse_decode(f, sae.W_dec, backend="reference"))

    active = sum(int(f.counts.sum()) for f in latents) / len(latents)
    n_bytes = active * sae.d_in * sae.W_dec.element_size()
    return Steps(calls, check, capture=backend != "reference", n_bytes=n_bytes)


def cases(backends: Iterable[str], shape: Shape, rows: Iterable[int]) -> Iterator[Case]:
    """Cases of both ops, on "torch" those of dense matrices."""
    for n_rows, backend, prepare in itertools.product(rows, tuple(backends), (encode, decode)):
        op, name = f"sparse_{prepare.__name__}", prepare.__name__
        yield Case(op, "dense PyTorch, eager" if backend == "torch" else name, backend, shape, n_rows, prepare)
