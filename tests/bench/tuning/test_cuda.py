"""The CUDA table that `bench.tuning.cuda` writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.harness.cases import KERNELS
from bench.harness.measure import DEVICE, Times
from bench.tuning import cuda as tune_cuda
from bench.tuning import triton as tune
from bench.tuning.triton import Place
from dspa_kernels import launch
from dspa_kernels.launch import CudaEntry

PLACES = [Place("steer", 0, rows, 2304, 16384) for rows in tune_cuda.ROWS]


def times(whole: tuple[float, float, float], mean: tuple[float, float, float] = (10.0, 10.0, 10.0)) -> tune_cuda.Times:
    """Times of Triton, CUDA, and CUDA's programmatic launches; launches that only read ahead are slow."""
    whole, mean = ((triton, cuda, 100.0, programmatic) for triton, cuda, programmatic in (whole, mean))
    return {"whole": dict(zip(KERNELS, whole, strict=True)), "mean": dict(zip(KERNELS, mean, strict=True))}


def entry(rows: int, programmatic: bool, d_sae: int = 16384) -> CudaEntry:
    return CudaEntry("steer", 0, 90, rows, 2304, d_sae, programmatic, ahead=programmatic)


@pytest.mark.parametrize(
    ("measured", "kind"),
    [
        (times((30.0, 25.0, 26.0)), "cuda"),
        (times((30.0, 25.0, 24.0)), "cuda-programmatic"),
        (times((30.0, 29.9, 29.8)), None),
        (times((30.0, 25.0, 24.0), (10.0, 10.0, 12.0)), "cuda"),
        (times((30.0, 25.0, 24.0), (10.0, 11.0, 12.0)), None),
        (times((30.0, 25.0, 40.0), (10.0, 10.1, 9.0)), "cuda"),
    ],
)
def test_faster_by_more_than_noise_and_nowhere_slower(measured: tune_cuda.Times, kind: str | None) -> None:
    assert tune_cuda.faster(measured) == kind


def test_cuda_is_entered_as_far_as_it_is_faster() -> None:
    plain, early, slow = times((30.0, 20.0, 25.0)), times((30.0, 25.0, 20.0)), times((30.0, 31.0, 32.0))
    asked: list[Place] = []

    def entries(*measured: tune_cuda.Times | str | None) -> list[CudaEntry]:
        asked.clear()
        return tune_cuda.entries_of(PLACES, 90, lambda place: (asked.append(place), measured[len(asked) - 1])[1])

    assert entries(early, early, early, early, early) == [entry(8, True)]
    assert entries(early, plain, plain, slow) == [entry(1, True), entry(4, False)]
    assert asked == PLACES[:4]
    for other in (slow, "AssertionError: 3 of 128 rows are wrong", None):
        assert entries(plain, other) == [entry(1, False)] and entries(other) == []


def test_entries_replace_those_of_their_shape() -> None:
    other, old, new = entry(64, True, 65536), [entry(1, True), entry(64, False)], [entry(8, False)]
    assert tune_cuda.updated([*old, other], PLACES[0], 90, new) == [*new, other]
    assert tune_cuda.updated([*old, other], PLACES[0], 90, []) == [other]
    assert tune_cuda.updated([*old, other], PLACES[0], 80, new) == tune.ordered([*old, other, *new])


def test_the_table_round_trips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune.as_text(launch.cuda_table()) == launch.CUDA_TABLE.read_text()
    monkeypatch.setattr(launch, "CUDA_TABLE", tmp_path / "table.json")
    for entries in ((), (entry(1, True), entry(64, False))):
        launch.CUDA_TABLE.write_text(tune.as_text(entries))
        assert launch.cuda_table.__wrapped__() == entries


@pytest.mark.parametrize(("kernel", "precision"), [("steer", 0), ("steer_int8", 0), ("steer_topk_int8", 0)])
def test_kernels_are_compared_once(
    kernel: str, precision: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(kernel, precision, 1, 64, 512)
    monkeypatch.setattr("bench.harness.measure.Stopwatch.device", lambda _, steps: Times.of([len(steps)]))
    first = tune_cuda.Comparison(tune.State(tmp_path / "state.json"), float("inf"))(place)
    assert isinstance(first, dict) and list(first) == ["whole", "mean"]
    assert all(tuple(times_by_kernel) == KERNELS for times_by_kernel in first.values())
    again = tune_cuda.Comparison(tune.State(tmp_path / "state.json"), 0.0)
    assert again(place) == first and again(Place(kernel, precision, 8, 64, 512)) is None


def test_what_is_not_close_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.harness.measure.Stopwatch.device", lambda _, steps: Times.of([1.0]))
    all_steps = tune_cuda.Setting.all_steps
    wrong = {"triton": 0.0, "cuda": 1.0}
    monkeypatch.setattr(
        tune_cuda.Setting, "all_steps", lambda self, **options: all_steps(self, **options) + wrong[options["backend"]]
    )
    result = tune_cuda.Comparison(tune.State(tmp_path / "state.json"), float("inf"))(Place("steer", 0, 1, 64, 512))
    assert isinstance(result, str) and "rows are wrong" in result


@pytest.mark.skipif(DEVICE.type == "cuda", reason="says what happens without a CUDA device")
def test_without_a_gpu_the_table_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tune_cuda", "--table", str(tmp_path / "table.json")])
    assert tune_cuda.main() == 2 and "CUDA" in capsys.readouterr().out
    assert not (tmp_path / "table.json").exists()
