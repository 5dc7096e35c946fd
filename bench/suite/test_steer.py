"""`steer`, compared with what it replaces. A wrong result fails instead of being timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.conftest import Measure
from bench.harness.cases import (
    ALPHA,
    FEW_ROWS,
    ON_GPU,
    ROWS,
    Setting,
    check_rows,
    dense_steer,
    running,
    sae_lens_steer,
    steer_backends,
    widened,
    with_rows,
)
from bench.harness.measure import DEVICE, Stopwatch
from dspa_kernels import EncoderStream, SAEWeights
from dspa_kernels.ops.steer import reference
from dspa_kernels.testing import Activity, same_bits
from dspa_kernels.weights import PATHS

BACKENDS = with_rows(steer_backends())
# The reference reads no screen.
SCREENED = [
    (name, n_rows, screen)
    for screen in ("none", "int8")
    for name, n_rows in BACKENDS
    if (name, screen) != ("reference", "int8")
]
STREAMED = PATHS.index("streamed")


def paths_of(setting: Setting, **options: Any) -> Tensor:
    """The increments of `paths` per step [N_STEPS, 6]."""
    taken = []
    for h, rows in setting.batches():
        taken.append(torch.zeros(len(PATHS) + 1, dtype=torch.int64, device=h.device))
        setting.steer(h, rows, paths=taken[-1], **options)
    return torch.stack(taken)


def labels(setting: Setting, case: str, backend: str) -> dict[str, Any]:
    return {"op": "steer", "case": case, "backend": backend, "shape": (setting.sae.d_in, setting.sae.d_sae)} | {
        "rows": setting.n_rows,
        "encoder_bytes": setting.encoder_bytes,
    }


@pytest.mark.parametrize(("name", "n_rows"), BACKENDS)
@pytest.mark.parametrize("case", ["stream", "stream, recorded", "stream, top-k"])
def test_whole_encoder(measure: Measure, activity: Activity, case: str, name: str, n_rows: int) -> None:
    """Steps that have to read the whole encoder."""
    setting = Setting.of(activity, "hard", n_rows).never_settled(activity)
    setting = setting.ranked() if case == "stream, top-k" else setting
    with running(name) as backend:
        options: dict[str, Any] = {"record": case == "stream, recorded", "backend": backend}
        assert int(paths_of(setting, **options)[:, STREAMED].min()) > 0
        check_rows(setting.all_steps(**options), setting.steer(setting.h, setting.rows, backend="reference"))
        measure(
            setting.steps(lambda h, rows: setting.steer(h, rows, **options)),
            capture=backend != "reference",
            n_bytes=setting.encoder_bytes + setting.row_bytes,
            **labels(setting, case, name),
        )


@pytest.mark.parametrize(("name", "n_rows", "screen"), SCREENED)
@pytest.mark.parametrize("case", ["hard", "easy"])
def test_mean_step(measure: Measure, activity: Activity, case: str, screen: str, name: str, n_rows: int) -> None:
    """Steps as they come: some read nothing, some a part of the encoder, some all of it."""
    setting = Setting.of(activity, case, n_rows)
    with running(name) as backend:
        options: dict[str, Any] = {"stream": stream_of(activity, screen), "backend": backend}
        out = setting.all_steps(**options)
        check_rows(out, setting.steer(setting.h, setting.rows, backend="reference"))
        assert same_bits(out, setting.all_steps(backend=backend)), "calibration or a screen changed the result"
        paths = paths_of(setting, **options)
        measure(
            setting.steps(lambda h, rows: setting.steer(h, rows, **options)),
            capture=backend != "reference",
            **labels(setting, case + (", int8" if screen == "int8" else ""), name),
            paths=dict(zip(PATHS, paths.sum(dim=0).tolist(), strict=False)),
            encoder_rows_read=float(paths[:, -1].float().mean()),
            steps_that_stream=float((paths[:, STREAMED] > 0).float().mean()),
        )


@pytest.mark.parametrize(("name", "n_rows"), itertools.product(steer_backends(), FEW_ROWS))
@pytest.mark.parametrize("path", ["unsteered", "inactive", "settled"])
def test_fixed_cost(measure: Measure, activity: Activity, path: str, name: str, n_rows: int) -> None:
    """The cost of steps that read nothing of the encoder, since all rows take the path `path`.

    Barrier and tail are in every launch, so they are not timed by themselves. `settled` less `launch only`, of the same
    run, is at least what the two take together: it is the select phase, one grid barrier and a tail that edits, and the
    time by which the launch is longer than that of a small kernel. A step that streams waits at one more barrier of the
    same kind. `unsteered` less `launch only` is a barrier and a tail that copies. `inactive` adds the select phase, and
    `settled` adds the decoder rows to that.
    """
    setting = Setting.of(activity, "hard", n_rows).taking(path, activity)
    with running(name) as backend:
        paths = paths_of(setting, backend=backend).sum(dim=0)
        assert int(paths[PATHS.index(path)]) == len(setting.h) and int(paths[-1]) == 0
        check_rows(setting.all_steps(backend=backend), setting.steer(setting.h, setting.rows, backend="reference"))
        measure(
            setting.steps(lambda h, rows: setting.steer(h, rows, backend=backend)),
            capture=backend != "reference",
            **labels(setting, path, name),
        )


@pytest.mark.skipif(not ON_GPU, reason="launches nothing without a GPU")
def test_launch(measure: Measure, activity: Activity) -> None:
    """A launch that does nothing, with as many programs as `steer` has."""
    from bench.harness.read_triton import launch_only

    measure([lambda: launch_only(DEVICE)] * 32, **labels(Setting.of(activity, "hard", 1), "launch only", "read"))


def stream_of(activity: Activity, screen: str) -> EncoderStream:
    """The stream of an activity, made once."""
    if (id(activity), screen) not in STREAMS:
        STREAMS.clear()
        STREAMS[id(activity), screen] = activity.stream(screen=screen)
    return STREAMS[id(activity), screen]


STREAMS: dict[tuple[int, str], EncoderStream] = {}


@pytest.mark.parametrize(("mode", "n_rows"), [*(("eager", n) for n in ROWS), *(("compiled", n) for n in FEW_ROWS)])
@pytest.mark.parametrize("what", ["dense PyTorch", "SAELens"])
def test_dense(measure: Measure, activity: Activity, what: str, mode: str, n_rows: int) -> None:
    """The same step without the package: compared with the reference in fp32, timed in the SAE's dtype."""
    setting = Setting.of(activity, "hard", n_rows)
    latents = setting.plan.latents(setting.cdmap.columns)[setting.rows.long()].long()

    def formulation(sae: SAEWeights) -> Callable[[Tensor, Tensor], Tensor]:
        return sae_lens_steer(sae) if what == "SAELens" else lambda h, latents: dense_steer(h, sae, latents)

    few = slice(0, 4 * n_rows)
    h, wide = setting.h[few].float(), setting.with_sae(widened(setting.sae))
    wanted = wide.steer(h, setting.rows[few], backend="reference")
    torch.testing.assert_close(formulation(wide.sae)(h, latents[few]), wanted, rtol=1e-3, atol=1e-3)

    torch.compiler.reset()
    run = formulation(setting.sae)
    run = torch.compile(run, dynamic=False) if mode == "compiled" else run
    batches = zip(setting.h.split(n_rows), latents.split(n_rows), strict=True)
    steps = [lambda h=h, latents=latents: run(h, latents) for h, latents in batches]
    measure(steps, n_bytes=2 * setting.encoder_bytes, **labels(setting, f"{what}, {mode}", "torch"))


@pytest.mark.parametrize("n_rows", FEW_ROWS)
def test_compiled_reference(measure: Measure, activity: Activity, n_rows: int) -> None:
    """The specification itself under torch.compile, which breaks its graph where data decide."""
    setting = Setting.of(activity, "hard", n_rows)
    torch.compiler.reset()
    compiled = torch.compile(reference.steer)
    fixed = setting.sae.stream.arguments() | setting.cdmap.latents() | {"slots": setting.plan.slots}
    fixed |= {"signs": setting.plan.signs, "positions": None, "start": None, "paths": None}

    def run(h: Tensor, rows: Tensor) -> Tensor:
        out, *_ = compiled(h=h, rows=rows, alpha=ALPHA, record=False, **fixed)
        return out

    steps = setting.steps(run)
    check_rows(torch.cat([step() for step in steps]), setting.all_steps(backend="reference"))
    measure(steps, capture=False, **labels(setting, "reference, compiled", "reference"))


def test_read(measure: Measure, activity: Activity, stopwatch: Stopwatch) -> None:
    """A read of the encoder and nothing else: the limit of a stream of this size."""
    setting = Setting.of(activity, "hard", 1)
    W = activity.sae.encoder_rows
    measure([lambda: stopwatch.read(W)] * 32, n_bytes=W.nbytes, **labels(setting, "read only", "read"))
