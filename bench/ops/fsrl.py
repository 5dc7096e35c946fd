"""Cases of `fsrl_residual`: a decoding step and a training step, compared with plain PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from typing import Any

from bench.harness.cases import ON_GPU, Adapter, Case, Setting, Shape, Steps, activity_of, check_rows
from bench.harness.measure import Times
from bench.offline import fsrl
from bench.offline.fsrl import plain
from dspa_kernels import fsrl_residual

TOKENS, ROUNDS, TRAINED = 2048 if ON_GPU else 32, 5, "1 %"


def step(case: Case, backend: str) -> Steps:
    activity = activity_of(case.shape)
    setting, adapter = Setting.of(activity, "hard", case.rows), Adapter.of(activity)
    if backend == "torch":
        n_bytes = 3.0 * setting.sae.encoder_rows.nbytes
        return Steps(setting.steps(lambda h, _: plain(h, setting.sae, *adapter)[0]), n_bytes=n_bytes)

    def check() -> None:
        for h, _ in list(setting.batches())[:2]:
            check_rows(*(fsrl_residual(h, setting.sae, *adapter, backend=name).h for name in (backend, "reference")))

    calls = setting.steps(lambda h, _: fsrl_residual(h, setting.sae, *adapter, backend=backend).h)
    n_bytes = sum(adapter.n_bytes(h, setting.sae) for h, _ in setting.batches()) / len(calls)
    return Steps(calls, check, capture=backend != "reference", n_bytes=n_bytes)


def cases(backends: Iterable[str], shape: Shape, rows: Iterable[int]) -> Iterator[Case]:
    """One case per backend and number of rows, "torch" for dense matrices."""
    for n_rows, backend in itertools.product(rows, tuple(backends)):
        name = "dense PyTorch, eager" if backend == "torch" else "decoding step"
        yield Case("fsrl_residual", name, backend, shape, n_rows, step)


@lru_cache
def trained(shape: Shape, method: str) -> dict[str, Any]:
    """The result of a training step by one method, from another process."""
    return fsrl.measured(fsrl.Case(*shape, TOKENS, TRAINED), method, ROUNDS)


def train_once(shape: Shape, method: str) -> None:
    step, h = fsrl.step_of(fsrl.Case(*shape, TOKENS, TRAINED), method)
    step(h)


def training_step(case: Case, _backend: str) -> Steps:
    """Forward and backward of many rows, of whose latents the adapter moves few."""
    method = case.name.removeprefix("training step, ")
    first, *_ = fsrl.METHODS
    return Steps(
        [partial(train_once, case.shape, method)],
        lambda: fsrl.check_norms(method, trained(case.shape, method)["norms"], trained(case.shape, first)["norms"]),
        times=lambda: (None, Times.of(trained(case.shape, method)["seconds"])),
        facts=lambda: {"activation_bytes": trained(case.shape, method)["activation_bytes"]},
    )


def training(shape: Shape) -> Iterator[Case]:
    """A training step by each method."""
    for method in fsrl.METHODS:
        backend = "auto" if method == "fsrl_residual" else "torch"
        yield Case("fsrl_residual", f"training step, {method}", backend, shape, TOKENS, training_step)
