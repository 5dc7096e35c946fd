"""Cases of `steer`, and of the dense formulations that it replaces."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from bench.harness.cases import ALPHA, SCREEN, Case, Setting, Shape, Steps, activity_of, check_rows
from bench.ops.dense import dense_steer, sae_lens, sae_lens_steer, widened
from dspa_kernels import EncoderStream, SAEWeights
from dspa_kernels.ops.steer import reference
from dspa_kernels.testing import same_bits
from dspa_kernels.weights import PATHS

STREAMED = PATHS.index("streamed")
# Names of cases; `PREPARE` has what they do.
STREAMS = ("stream", "stream, recorded", "stream, top-k")
FIXED = ("unsteered", "inactive", "settled")
MEAN, SCREENED = ("hard", "easy"), (f"hard, {SCREEN}", f"easy, {SCREEN}")
EAGER, COMPILED = ("dense PyTorch, eager", "SAELens, eager"), ("dense PyTorch, compiled", "SAELens, compiled")
COMPILED_REFERENCE = "reference, compiled"


def paths_of(setting: Setting, **options: Any) -> Tensor:
    """The increments of `paths` per step [N_STEPS, 6]."""
    taken = []
    for h, rows in setting.batches():
        taken.append(torch.zeros(len(PATHS) + 1, dtype=torch.int64, device=h.device))
        setting.steer(h, rows, paths=taken[-1], **options)
    return torch.stack(taken)


def encoder_bytes(setting: Setting) -> dict[str, Any]:
    return {"encoder_bytes": setting.encoder_bytes}


def check(setting: Setting, out: Tensor) -> None:
    check_rows(out, setting.steer(setting.h, setting.rows, backend="reference"))


def whole_encoder(case: Case, backend: str) -> Steps:
    """Steps that have to read the whole encoder."""
    activity = activity_of(case.shape)
    setting = Setting.of(activity, "hard", case.rows).never_settled(activity)
    setting = setting.ranked() if case.name == "stream, top-k" else setting
    options: dict[str, Any] = {"record": case.name == "stream, recorded", "backend": backend}

    def checked() -> None:
        assert int(paths_of(setting, **options)[:, STREAMED].min()) > 0
        check(setting, setting.all_steps(**options))

    return Steps(
        setting.steps(partial(setting.steer, **options)),
        checked,
        capture=backend != "reference",
        n_bytes=setting.encoder_bytes + setting.row_bytes,
        facts=partial(encoder_bytes, setting),
    )


@lru_cache(maxsize=1)
def stream_of(shape: Shape, screen: str) -> EncoderStream:
    """The calibrated stream of a shape's activity; only the last one is kept."""
    return activity_of(shape).stream(screen=screen)


def mean_step(case: Case, backend: str) -> Steps:
    """Steps as they come: some read nothing, some a part of the encoder, some all of it."""
    kind, _, screen = case.name.partition(", ")
    setting = Setting.of(activity_of(case.shape), kind, case.rows)
    options: dict[str, Any] = {"stream": stream_of(case.shape, screen or "none"), "backend": backend}

    def checked() -> None:
        out = setting.all_steps(**options)
        check(setting, out)
        assert same_bits(out, setting.all_steps(backend=backend)), "calibration or a screen changed the result"

    def facts() -> dict[str, Any]:
        paths = paths_of(setting, **options)
        return {
            "encoder_bytes": setting.encoder_bytes,
            "paths": dict(zip(PATHS, paths.sum(dim=0).tolist(), strict=False)),
            "encoder_rows_read": float(paths[:, -1].float().mean()),
            "steps_that_stream": float((paths[:, STREAMED] > 0).float().mean()),
        }

    calls = setting.steps(partial(setting.steer, **options))
    return Steps(calls, checked, capture=backend != "reference", facts=facts)


def fixed_cost(case: Case, backend: str) -> Steps:
    """Steps that read nothing of the encoder, since all rows take one path.

    Barrier and tail are in every launch, so they are not timed by themselves. `settled` less `launch only`, of the same
    run, is at least what the two take together: it is the select phase, one grid barrier and a tail that edits, and the
    time by which the launch is longer than that of a small kernel. A step that streams waits at one more barrier of the
    same kind. `unsteered` less `launch only` is a barrier and a tail that copies. `inactive` adds the select phase, and
    `settled` adds the decoder rows to that.
    """
    activity = activity_of(case.shape)
    setting = Setting.of(activity, "hard", case.rows).taking(case.name, activity)

    def checked() -> None:
        paths = paths_of(setting, backend=backend).sum(dim=0)
        assert int(paths[PATHS.index(case.name)]) == len(setting.h) and int(paths[-1]) == 0
        check(setting, setting.all_steps(backend=backend))

    calls = setting.steps(partial(setting.steer, backend=backend))
    return Steps(calls, checked, capture=backend != "reference", facts=partial(encoder_bytes, setting))


def compiled_reference(case: Case, backend: str) -> Steps:
    """The specification itself under torch.compile, which breaks its graph where data decide."""
    setting = Setting.of(activity_of(case.shape), "hard", case.rows)
    torch.compiler.reset()
    compiled = torch.compile(reference.steer)
    fixed = setting.sae.stream.arguments() | setting.cdmap.latents() | {"slots": setting.plan.slots}
    fixed |= {"signs": setting.plan.signs, "positions": None, "start": None, "paths": None}
    fixed["alphas"] = None

    def run(h: Tensor, rows: Tensor) -> Tensor:
        out, *_ = compiled(h=h, rows=rows, alpha=ALPHA, record=False, **fixed)
        return out

    calls = setting.steps(run)

    def checked() -> None:
        check_rows(torch.cat([run(h, rows) for h, rows in setting.batches()]), setting.all_steps(backend=backend))

    return Steps(calls, checked, capture=False)


def formulation(sae: SAEWeights, name: str) -> tuple[Callable[[Tensor, Tensor], Tensor], dict[str, Any]]:
    """The step without the package, and where it is from."""
    if name.startswith("SAELens"):
        theirs, source = sae_lens(sae)
        return sae_lens_steer(theirs), {"sae_lens": source}
    return lambda h, latents: dense_steer(h, sae, latents), {}


def dense_step(case: Case, _backend: str) -> Steps:
    """The same step without the package: checked in fp32, timed in the SAE's dtype, eager or compiled."""
    setting = Setting.of(activity_of(case.shape), "hard", case.rows)
    latents = setting.plan.latents(setting.cdmap.columns)[setting.rows.long()].long()
    run, facts = formulation(setting.sae, case.name)
    if case.name.endswith("compiled"):
        torch.compiler.reset()
        run = torch.compile(run, dynamic=False)

    def checked() -> None:
        few = slice(0, 4 * case.rows)
        h, wide = setting.h[few].float(), setting.with_sae(widened(setting.sae))
        in_fp32, _ = formulation(wide.sae, case.name)
        wanted = wide.steer(h, setting.rows[few], backend="reference")
        torch.testing.assert_close(in_fp32(h, latents[few]), wanted, rtol=1e-3, atol=1e-3)

    batches = zip(setting.h.split(case.rows), latents.split(case.rows), strict=True)
    calls = [partial(run, h, some) for h, some in batches]
    return Steps(calls, checked, n_bytes=2.0 * setting.encoder_bytes, facts=lambda: facts)


PREPARE: dict[str, Callable[[Case, str], Steps]] = {
    **dict.fromkeys(STREAMS, whole_encoder),
    **dict.fromkeys((*MEAN, *SCREENED), mean_step),
    **dict.fromkeys(FIXED, fixed_cost),
    **dict.fromkeys((*EAGER, *COMPILED), dense_step),
    COMPILED_REFERENCE: compiled_reference,
}


def cases(names: Iterable[str], backends: Iterable[str], shape: Shape, rows: Iterable[int]) -> Iterator[Case]:
    """Cases by name, with the numbers of rows outermost."""
    for n_rows, name, backend in itertools.product(rows, tuple(names), tuple(backends)):
        yield Case("steer", name, backend, shape, n_rows, PREPARE[name])
