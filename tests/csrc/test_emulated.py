"""csrc/emulated, the device primitives on the CPU: correct kernels run, and faulty ones fail."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or "g++"
FLAGS = (
    "-x c++ -std=c++17 -O1 -g -fPIC -shared -ffp-contract=off -U_FORTIFY_SOURCE "
    "-Wall -Wextra -Werror -Wno-unknown-pragmas"
)
LAUNCH_FAILURE = 719
SEEDS = range(20)

pytestmark = pytest.mark.skipif(shutil.which(shlex.split(COMPILER)[0]) is None, reason=f"there is no {COMPILER}")

Pointer, Int = ctypes.c_void_p, ctypes.c_int


class SumArguments(ctypes.Structure):
    _fields_ = [("x", Pointer), ("sums", Pointer), ("n_rows", Int), ("n", Int), ("bug", Int)]


class RingArguments(ctypes.Structure):
    _fields_ = [("x", Pointer), ("sums", Pointer), ("n_rows", Int), ("width", Int), ("bug", Int)]


class ProductArguments(ctypes.Structure):
    _fields_ = [("a", Pointer), ("b", Pointer), ("c", Pointer), ("depth", Int)]


class RoundsArguments(ctypes.Structure):
    _fields_ = [("word", Pointer), ("values", Pointer), ("rounds", Int), ("wait", ctypes.c_bool)]


class MistakeArguments(ctypes.Structure):
    _fields_ = [("source", Pointer), ("out", Pointer), ("which", Int)]


class RoundArguments(ctypes.Structure):
    _fields_ = [(name, Pointer) for name in ("x", "to_bf16", "to_fp16", "from_bf16", "from_fp16")] + [("n", Int)]


# In the order of the enumerations in toy_kernels.cu.
SUM_BUGS = ["right", "no warp barrier", "no barrier before reading", "no barrier before writing"]
RING_BUGS = ["right", "no wait for full", "no wait for empty", "arrives early", "forgets a row", "no first parity"]
MISTAKES = {
    "copy out of range": r"copy: 16 bytes at 1016 of shared memory, which has 1024",
    "copy misaligned": r"copy from 0x\w+, which is not aligned to 16",
    "copy never awaited": r"nobody waited for copies by the mbarrier at 0",
    "write under copy": r"wrote to 128 of shared memory, where a copy was about to arrive",
    "copies overlap": r"wrote to 128 of shared memory, where a copy was about to arrive",
    "copy by one lane": (
        r"which lanes \w{8} of its warp never reach|wait for the others at: (warp barrier|asynchronous copy)"
    ),
    "too many arrivals": r"more than 1 arrivals in a phase|deadlock",
    "too many bytes": r"8 bytes more than expected came in a phase",
    "too few bytes": r"deadlock(.|\n)*phase 0 of the mbarrier at 0, which lacks 0 of 1 arrivals and 16 bytes",
    "no mbarrier": r"mbarrier_wait: there is no mbarrier at 0",
    "overwritten mbarrier": r"copy: there is no mbarrier at 0",
    "other barrier in block": r"deadlock(.|\n)*at barrier 0 of 96 threads(.|\n)*at barrier 1 of 64 threads",
    "other barrier in warp": r"(named|block) barrier, while lanes \w+ of its warp are at: (named|block) barrier",
    "other id in warp": r"named barrier 2 of 32 threads in lane 0, 1 of 32 in lane 1",
    "other count": r"named barrier 1 for \d+ threads, where others wait for \d+|the warps 6 alone",
    "one warp too many": r"named barrier 1, which has been one of the warps \d alone",
    "lanes ended": r"warp barrier, which lanes \w{8} of its warp never reach|wait for the others at: warp barrier",
    "warp ended": r"deadlock(.|\n)*ffffffff at barrier 0 of 96 threads, as are warps 6(.|\n)*ended; warps 0",
    "other operation": r"while lanes \w+ of its warp are at: (ballot|warp barrier)",
    "matrix out of range": r"ldmatrix: 16 bytes at \d+ of shared memory, which has 1024",
    "load misaligned": r"load of 16 bytes at 0x\w+, which is not aligned to 16",
    "write beyond": r"block 0 wrote outside its 1024 bytes of shared memory",
    "wait for nobody": r"deadlock(.|\n)*lanes 00000020 wait for phase 0 of the mbarrier at 0, which lacks 2 of 3",
    "stack too small": r"needs more than the 192 KB of its stack",
}
# These go wrong only if a copy happens to be in flight.
RACES = {"write under copy", "copies overlap"}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the toy kernels for the CPU."""
    path = tmp_path_factory.mktemp("toy") / "libtoy.so"
    sources = [HERE / "toy_kernels.cu", *sorted(CSRC.glob("emulated/*.cpp"))]
    command = [*shlex.split(COMPILER), *FLAGS.split(), "-I", CSRC / "emulated", *sources, "-o", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    library = ctypes.CDLL(str(path))
    library.dspa_emulated_bytes_copied.restype = library.dspa_emulated_launches.restype = ctypes.c_int64
    library.toy_error_name.restype = library.toy_error_text.restype = ctypes.c_char_p
    return library


@pytest.fixture
def toy(built: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Reset the library's counters, so that tests do not depend on each other."""
    monkeypatch.delenv("DSPA_EMULATED_SEED", raising=False)
    built.dspa_emulated_reset()
    return built


def error_of(toy: ctypes.CDLL, code: int) -> str:
    if not code:
        return ""
    assert toy.toy_error_name(code) == b"cudaErrorLaunchFailure" and code == LAUNCH_FAILURE
    return toy.toy_error_text(code).decode()


def small_integers(*shape: int) -> torch.Tensor:
    """Return numbers whose sums are exact in any order."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(0)).float()


def column_sums(toy: ctypes.CDLL, x: torch.Tensor, blocks: int = 3, threads: int = 128, bug: int = 0) -> torch.Tensor:
    sums = torch.zeros(blocks, x.shape[1])
    code = toy.toy_sum(SumArguments(x.data_ptr(), sums.data_ptr(), *x.shape, bug), blocks, threads)
    assert not code, error_of(toy, code)
    return sums.sum(0)


def ring_sums(toy: ctypes.CDLL, x: torch.Tensor, blocks: int = 3, bug: int = 0) -> tuple[torch.Tensor, str]:
    sums = torch.zeros(blocks, x.shape[1])
    code = toy.toy_add_rows(RingArguments(x.data_ptr(), sums.data_ptr(), *x.shape, bug), blocks)
    return sums.sum(0), error_of(toy, code)


def make_mistake(toy: ctypes.CDLL, which: int) -> str:
    source, out = torch.zeros(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    return error_of(toy, toy.toy_mistake(MistakeArguments(source.data_ptr(), out.data_ptr(), which)))


def over_seeds(monkeypatch: pytest.MonkeyPatch, toy: ctypes.CDLL, condition: Callable[[], bool]) -> float:
    """Return the share of seeds for which `condition` is true."""
    count = 0
    for seed in SEEDS:
        monkeypatch.setenv("DSPA_EMULATED_SEED", str(seed))
        toy.dspa_emulated_reset()
        count += condition()
    return count / len(SEEDS)


@pytest.mark.parametrize(("blocks", "threads"), [(1, 32), (2, 96), (3, 288), (3, 1024)])
def test_sums_by_shuffles_and_barriers(toy: ctypes.CDLL, blocks: int, threads: int) -> None:
    x = small_integers(700, 5)
    torch.testing.assert_close(column_sums(toy, x, blocks, threads), x.sum(0), rtol=0, atol=0)


@pytest.mark.parametrize("bug", range(1, len(SUM_BUGS)), ids=SUM_BUGS[1:])
def test_missing_barriers_give_wrong_sums(toy: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, bug: int) -> None:
    x = small_integers(500, 4)
    assert over_seeds(monkeypatch, toy, lambda: not torch.equal(column_sums(toy, x, bug=bug), x.sum(0))) > 0.9


@pytest.mark.parametrize(("n_rows", "width", "blocks"), [(1, 4, 1), (8, 128, 3), (100, 256, 3), (301, 36, 2)])
def test_ring(toy: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, n_rows: int, width: int, blocks: int) -> None:
    x = small_integers(n_rows, width)

    def is_right() -> bool:
        sums, error = ring_sums(toy, x, blocks)
        assert not error and torch.equal(sums, x.sum(0))
        return toy.dspa_emulated_bytes_copied() == x.nbytes and toy.dspa_emulated_launches() == 1

    assert over_seeds(monkeypatch, toy, is_right) == 1


@pytest.mark.parametrize("bug", range(1, len(RING_BUGS)), ids=RING_BUGS[1:])
def test_ring_bugs_are_detected(toy: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, bug: int) -> None:
    x = small_integers(200, 128)

    def is_detected() -> bool:
        sums, error = ring_sums(toy, x, bug=bug)
        return bool(error) or not torch.equal(sums, x.sum(0))

    assert over_seeds(monkeypatch, toy, is_detected) > 0.8


@pytest.mark.parametrize("which", range(len(MISTAKES)), ids=list(MISTAKES))
def test_mistakes_are_reported(toy: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    name, message = list(MISTAKES.items())[which]

    def is_reported() -> bool:
        error = make_mistake(toy, which)
        assert re.search(message, error) or (name in RACES and not error), error
        return bool(error)

    assert over_seeds(monkeypatch, toy, is_reported) > 0.3
    # A failed launch does not affect the next.
    x = small_integers(100, 64)
    sums, error = ring_sums(toy, x)
    assert not error and torch.equal(sums, x.sum(0))


def test_missed_phase(toy: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    assert over_seeds(monkeypatch, toy, lambda: "went on by two phases" in make_mistake(toy, len(MISTAKES))) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("depth", [32, 96])
def test_product(toy: ctypes.CDLL, dtype: torch.dtype, depth: int) -> None:
    torch.manual_seed(0)
    a, b, c = torch.randn(16, depth).to(dtype), torch.randn(8, depth).to(dtype), torch.full((16, 8), torch.nan)
    multiply = toy.toy_multiply_bf16 if dtype == torch.bfloat16 else toy.toy_multiply_fp16
    code = multiply(ProductArguments(a.data_ptr(), b.data_ptr(), c.data_ptr(), depth))
    assert not code, error_of(toy, code)
    plain = torch.zeros(16, 8)
    for k in range(depth):
        plain = plain + a[:, k, None].float() * b[None, :, k].float()
    torch.testing.assert_close(c, plain, rtol=0, atol=0)


def grid_rounds(toy: ctypes.CDLL, blocks: int, wait: bool) -> torch.Tensor:
    rounds = 7  # an even number of barriers, which restores the word
    word, values = torch.zeros(1, dtype=torch.int32), torch.zeros(rounds, blocks, dtype=torch.int32)
    values[0] = 1 + torch.arange(blocks)
    code = toy.toy_add_in_rounds(RoundsArguments(word.data_ptr(), values.data_ptr(), rounds, wait), blocks)
    assert not code, error_of(toy, code)
    assert word.item() == 0
    return values[-1]


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_grid_barrier(toy: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    expected = [blocks**5 * blocks * (blocks + 1) // 2] * blocks
    assert over_seeds(monkeypatch, toy, lambda: grid_rounds(toy, blocks, wait=True).tolist() == expected) == 1
    if blocks > 1:
        assert over_seeds(monkeypatch, toy, lambda: grid_rounds(toy, blocks, wait=False).tolist() != expected) > 0.9


def test_order_follows_from_the_seed(toy: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    x = small_integers(200, 128)
    early = RING_BUGS.index("arrives early")

    def outcomes(seed: int) -> list[str]:
        monkeypatch.setenv("DSPA_EMULATED_SEED", str(seed))
        toy.dspa_emulated_reset()
        return [str(ring_sums(toy, x, bug=early)) for _ in range(4)]

    assert outcomes(1) == outcomes(1)
    assert len({*outcomes(1), *outcomes(2)}) > 2


def test_launches_that_a_device_refuses(toy: ctypes.CDLL) -> None:
    x = small_integers(8, 4)
    for blocks, threads, code, name in [
        (1, 48, 1, b"cudaErrorInvalidValue"),
        (1, 1056, 1, b"cudaErrorInvalidValue"),
        (4, 32, 720, b"cudaErrorCooperativeLaunchTooLarge"),
    ]:
        assert toy.toy_sum(SumArguments(x.data_ptr(), x.data_ptr(), *x.shape, 0), blocks, threads) == code
        assert toy.toy_error_name(code) == name
        assert str(blocks) in toy.toy_error_text(code).decode()


def test_launches_from_threads_take_turns(toy: ctypes.CDLL) -> None:
    x = small_integers(100, 64)
    with ThreadPoolExecutor(4) as pool:
        for sums, error in pool.map(lambda _: ring_sums(toy, x), range(40)):
            assert not error and torch.equal(sums, x.sum(0))


def test_rounding(toy: ctypes.CDLL) -> None:
    # All 16-bit numbers, the midpoints between them and their neighbours, and very small and large numbers.
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    halves = numbers.view(torch.float16)[numbers.view(torch.float16).isfinite()].float().sort().values
    ties = torch.stack(
        [
            (halves[1:] + halves[:-1]) / 2,
            numbers[:-1].int().mul(2**16).add(2**15).view(torch.float32)[: len(halves) - 1],
        ]
    )
    x = torch.cat(
        [
            numbers.view(torch.bfloat16).float(),
            halves,
            ties.flatten(),
            ties.nextafter(torch.tensor(torch.inf)).flatten(),
            ties.nextafter(torch.tensor(-torch.inf)).flatten(),
            torch.tensor([65519.0, 65520.0, -65520.0, torch.nan, torch.inf, 3.4e38, 1e-45, 0.0, -0.0]),
        ]
    )
    to = [torch.empty(len(x), dtype=dtype) for dtype in (torch.bfloat16, torch.float16)]
    back = [torch.empty(len(x)) for _ in to]
    code = toy.toy_round(RoundArguments(x.data_ptr(), *(t.data_ptr() for t in to + back), len(x)))
    assert not code, error_of(toy, code)
    for rounded, again in zip(to, back, strict=True):
        torch.testing.assert_close(rounded, x.to(rounded.dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(again, rounded.float(), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(rounded.signbit(), x.signbit()) or rounded.isnan().any()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_toy_kernels_are_cuda(tmp_path: Path, architecture: str) -> None:
    """The same kernels compile with the device primitives."""
    flags = ["-std=c++17", f"-arch={architecture}", "-I", CSRC / "device"]
    done = subprocess.run(
        ["nvcc", *flags, "-c", HERE / "toy_kernels.cu", "-o", tmp_path / "toy.o"], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
