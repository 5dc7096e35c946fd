"""The measured cases: what identifies one, how it is checked and timed, and the inputs that cases share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.harness.measure import DEVICE, Step, Stopwatch, Times
from dspa_kernels import MapWeights, SAEWeights, SteeringPlan, available_backends, launch, steer
from dspa_kernels.launch import CudaEntry, Launch
from dspa_kernels.testing import Activity, realistic_activity
from dspa_kernels.weights import SCREENS

ON_GPU = DEVICE.type == "cuda"
# Gemma-2-2B, Gemma-2-9B, Qwen3-8B, and a wide SAE.
SHAPES = [(2304, 16384), (3584, 16384), (4096, 65536), (2304, 262144)] if ON_GPU else [(64, 512)]
ROWS = [1, 4, 8, 16, 32, 64] if ON_GPU else [1, 4]
# For what is slow and not part of the package.
FEW_ROWS = [1, 64] if ON_GPU else [1]
# The screen that is measured.
SCREEN = SCREENS[-1]
# Rows of an activity; the least and the most steps of a measurement (more if a step has few rows); prompts.
N_ROWS, N_STEPS, N_PROMPTS = (8192, (32, 128), 64) if ON_GPU else (16, (4, 4), 4)
ALPHA = 0.2
TOP_K = 70
# The share of latents that an adapter moves in a row; half of them are pushed down.
MOVED = 0.01
# The kinds of CUDA's launches of `steer`. One reads the first encoder rows before it is known whether any row needs
# them; a programmatic one may do so before the launch ahead of it has ended.
LAUNCHES = {
    "cuda": {"programmatic": False, "ahead": False},
    "cuda-ahead": {"programmatic": False, "ahead": True},
    "cuda-programmatic": {"programmatic": True, "ahead": True},
}
KERNELS = ("triton", *LAUNCHES)

Shape = tuple[int, int]


@dataclass(frozen=True)
class Steps:
    """The calls of a case, once its inputs are made.

    Attributes:
        calls: one call per step; none if there is only something to check.
        check: raises AssertionError if a result is wrong.
        capture: the calls can be captured in a CUDA graph.
        n_bytes: bytes that a mean step has to read and write.
        n_flops: operations of a mean step.
        facts: returns more that is recorded, called last.
        times: times the calls on the device and by the wall, where the stopwatch cannot.
    """

    calls: Sequence[Step]
    check: Callable[[], None] = lambda: None
    capture: bool = True
    n_bytes: float | None = None
    n_flops: float | None = None
    facts: Callable[[], dict[str, Any]] = dict
    times: Callable[[], tuple[Times | None, Times]] | None = None


@dataclass(frozen=True)
class Case:
    """A measurement.

    Attributes:
        op: the op.
        name: what its steps do.
        backend: a backend, a kind of CUDA's launches, "torch" or "read".
        shape: d_in and d_sae.
        rows: rows of a step.
        prepare: makes the steps of this case on a backend. It raises `BackendError` if the backend does not take them.
        launch: launch parameters instead of those of the table.
    """

    op: str
    name: str
    backend: str
    shape: Shape
    rows: int
    prepare: Callable[[Case, str], Steps] = field(repr=False)
    launch: Launch | None = None

    def __str__(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))}, {self.rows} rows, {self.name}, {self.backend}"

    def labels(self) -> dict[str, Any]:
        """Return what identifies the case in a result."""
        labels = {"op": self.op, "case": self.name, "backend": self.backend, "shape": self.shape, "rows": self.rows}
        return labels | ({"launch": asdict(self.launch)} if self.launch else {})

    @contextmanager
    def steps(self) -> Iterator[Steps]:
        """Prepare the steps, which have to be called within the context."""
        with torch.no_grad(), running(self.backend) as backend, launching(self.launch):
            yield self.prepare(self, backend)


def timed(case: Case, stopwatch: Stopwatch, benchmark: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Check a case, time it and return the result.

    Args:
        case: the case.
        stopwatch: what measures.
        benchmark: returns the fixture of pytest-benchmark, which then times the calls from Python.

    Raises:
        AssertionError: a result is wrong. Nothing is timed.
        BackendError: the backend does not take such a case.
    """
    with case.steps() as steps:
        steps.check()
        if steps.times:
            on_device, wall = steps.times()
        else:
            on_device = stopwatch.device(steps.calls) if steps.capture and ON_GPU else None
            wall = stopwatch.wall(steps.calls, benchmark and benchmark())
        result = {
            **case.labels(),
            "device_us": on_device and asdict(on_device),
            "wall_us": asdict(wall),
            **steps.facts(),
        }
    seconds = 1e-6 * (on_device or wall).median
    if steps.n_bytes is not None:
        result |= {"bytes": steps.n_bytes, "gb_s": 1e-9 * steps.n_bytes / seconds}
        result["of_read_ceiling"] = steps.n_bytes / seconds / stopwatch.read_bandwidth
    if steps.n_flops is not None:
        result |= {"flops": steps.n_flops, "of_matmul_rate": steps.n_flops / seconds / stopwatch.matmul_rate}
    return result


def backends(op: str) -> list[str]:
    """The backends that have `op` and run here by default: kernels where there is a GPU, and the reference."""
    return [name for name, status in available_backends().items() if status.available and op in status.ops]


def steer_backends() -> list[str]:
    """The backends of `steer`, with a name for each kind of CUDA's launches."""
    return [name for backend in backends("steer") for name in (LAUNCHES if backend == "cuda" else [backend])]


@contextmanager
def running(name: str) -> Iterator[str]:
    """The backend of a name from `steer_backends`; within the context, CUDA's launches are of that kind.

    The kind of a launch is read from the CUDA table, so the context replaces the table.
    """
    if name not in LAUNCHES:
        yield name
        return
    served = dict.fromkeys((entry.kernel, entry.precision) for entry in launch.table())
    entries = tuple(CudaEntry(*kernel, **LAUNCHES[name]) for kernel in served)
    launch.cuda_entry.cache_clear()
    try:
        with mock.patch.object(launch, "cuda_table", lambda: entries):
            yield "cuda"
    finally:
        launch.cuda_entry.cache_clear()


@contextmanager
def launching(parameters: Launch | None) -> Iterator[None]:
    """Within the context, every launch has these parameters."""
    if parameters is None:
        yield
        return
    entries = tuple(replace(entry, launch=parameters) for entry in launch.table())
    launch.launch_parameters.cache_clear()
    try:
        with mock.patch.object(launch, "table", lambda: entries):
            yield
    finally:
        launch.launch_parameters.cache_clear()


def with_rows(names: Sequence[str]) -> list[tuple[str, int]]:
    """Pairs of a backend and a number of rows at which it is measured."""
    return [(name, n) for name in names for n in (FEW_ROWS if name == "reference" else ROWS)]


def n_steps(n_rows: int) -> int:
    """The number of steps of `n_rows` rows that are measured together."""
    least, most = N_STEPS
    return max(least, min(most, 256 // n_rows))


@lru_cache(maxsize=1)
def activity_of(shape: Shape) -> Activity:
    """The activity of a shape; only the last one is kept."""
    return realistic_activity(*shape, N_ROWS, n_calibration=4096 if ON_GPU else 256, device=DEVICE)


@dataclass(frozen=True)
class Setting:
    """Decoding steps of `n_rows` rows that edit what their prompts' plans say."""

    h: Tensor
    rows: Tensor
    sae: SAEWeights
    cdmap: MapWeights
    plan: SteeringPlan
    n_rows: int
    alpha: float = ALPHA

    @classmethod
    def of(cls, activity: Activity, case: str, n_rows: int) -> Setting:
        cdmap, plan = activity.steered(case, N_PROMPTS)
        h = activity.h[: n_steps(n_rows) * n_rows]
        rows = torch.arange(len(h), dtype=torch.int32, device=DEVICE) % N_PROMPTS
        return cls(h, rows, activity.sae, cdmap, plan, n_rows)

    def never_settled(self, activity: Activity) -> Setting:
        """All prompts augment latents that are active on every row, so that the maximum takes the whole encoder."""
        return self._active(activity, 1)

    def taking(self, path: str, activity: Activity) -> Setting:
        """All rows take one of the `PATHS` that read nothing of the encoder."""
        if path == "unsteered":
            return replace(self, rows=torch.full_like(self.rows, -1))
        if path == "inactive":
            never = torch.full_like(self.cdmap.threshold, torch.inf)
            return replace(self, cdmap=replace(self.cdmap, threshold=never))
        assert path == "settled", path
        # Ablated by the maximum itself, every latent ends at 0, however large the maximum is.
        return replace(self._active(activity, -1), alpha=1.0)

    def _active(self, activity: Activity, sign: int) -> Setting:
        """All prompts edit the 16 most frequent latents, with thresholds of 0, so that on every row one is active."""
        columns = activity.by_frequency[:16].sort().values
        cdmap = MapWeights.gather(columns, torch.zeros(1, len(columns)), self.sae)
        cdmap = replace(cdmap, threshold=torch.zeros_like(cdmap.threshold))
        slots = torch.arange(len(columns), dtype=torch.int32, device=DEVICE).repeat(N_PROMPTS, 1)
        signs = torch.full_like(slots, sign, dtype=torch.int8)
        return replace(self, cdmap=cdmap, plan=SteeringPlan(slots, signs))

    def with_sae(self, sae: SAEWeights) -> Setting:
        """The setting with other weights."""
        return replace(self, sae=sae, cdmap=MapWeights.gather(self.cdmap.columns, self.cdmap.values, sae))

    def ranked(self) -> Setting:
        """The setting with the same latents as a top-k SAE."""
        return replace(self, sae=replace(self.sae, k=TOP_K, threshold=torch.zeros_like(self.sae.threshold)))

    def steer(self, h: Tensor, rows: Tensor, **options: Any) -> Tensor:
        """Return h' of some rows, without what `record` adds."""
        out = steer(h, self.sae, self.cdmap, self.plan, rows, alpha=self.alpha, **options)
        return out[0] if isinstance(out, tuple) else out

    def all_steps(self, **options: Any) -> Tensor:
        """Return h' of all rows, computed step by step."""
        return torch.cat([self.steer(h, rows, **options) for h, rows in self.batches()])

    def steps(self, run: Callable[[Tensor, Tensor], Tensor]) -> list[Step]:
        """A call of `run(h, rows)` per step."""
        return [lambda h=h, rows=rows: run(h, rows) for h, rows in self.batches()]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.h.split(self.n_rows), self.rows.split(self.n_rows), strict=True)

    @property
    def encoder_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.sae.encoder_rows, self.sae.b_enc, self.sae.threshold))

    @property
    def row_bytes(self) -> int:
        """Rows in and out, and per row the encoder and decoder rows of its selected latents."""
        d_in, size = self.sae.d_in, self.sae.encoder_rows.element_size()
        return self.n_rows * d_in * (2 * self.h.element_size() + 2 * self.plan.slots.shape[1] * size)


class Adapter(NamedTuple):
    """An adapter with a soft threshold that moves a share of the latents of each row."""

    W_a: Tensor
    b_a: Tensor
    threshold: Tensor

    @classmethod
    def of(cls, activity: Activity) -> Adapter:
        sae = activity.sae
        generator = torch.Generator(sae.encoder_rows.device).manual_seed(0)
        W_a = torch.empty_like(sae.encoder_rows).normal_(std=sae.d_in**-0.5, generator=generator)
        sizes = (activity.h[:256] @ W_a.T).abs().float()
        return cls(W_a, torch.zeros_like(sae.b_enc), torch.quantile(sizes, 1 - MOVED, dim=0))

    def n_bytes(self, h: Tensor, sae: SAEWeights) -> float:
        """The bytes that a step of rows h reads: the adapter, encoder rows of latents that some row pushes
        down, and decoder rows of latents that change in some row."""
        u = h.float() @ self.W_a.float().T
        pre = h.float() @ sae.W_enc.float() + sae.b_enc
        active = (pre > sae.threshold) & (pre > 0)
        up, down = u > self.threshold, u < -self.threshold
        read = int(down.any(dim=0).sum()) + int((up | (down & active)).any(dim=0).sum())
        return self.W_a.nbytes + sae.W_dec.element_size() * read * sae.d_in


def check_rows(out: Tensor, wanted: Tensor) -> None:
    """Fail unless rows are equal up to their dtype's rounding. One in a thousand may differ by more, since rounding may
    decide whether a latent is active."""
    assert out.shape == wanted.shape and out.dtype == wanted.dtype
    close = torch.isclose(out.float(), wanted.float(), rtol=1.6e-2, atol=1e-3).all(dim=1)
    assert float(close.float().mean()) >= 0.999, f"{int((~close).sum())} of {len(close)} rows are wrong"
