"""`steer` in CUDA at the shapes its tiles are cut for: whole pieces of 16 bytes, several k tiles and work tiles."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dspa_kernels import (
    EncoderStream,
    MapWeights,
    SAEWeights,
    SteeringPlan,
    cuda_library,
    launch,
    steer,
    steer_,
)
from dspa_kernels.cuda_library import EMULATED
from dspa_kernels.ops.steer import cuda_impl
from dspa_kernels.screen import quantise, quantise_rows
from dspa_kernels.testing import random_map, random_plan, random_sae, run_on, same_bits, tensors

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]
DEVICE = "cpu" if EMULATED else "cuda"
BF16, FP16 = ((dtype, dtype) for dtype in (torch.bfloat16, torch.float16))
D_SAE, N_COLUMNS, N_SLOTS, N_PROMPTS = 203, 23, 6, 3
ROWS = (1, 5, 8)


def stream_of(sae: SAEWeights, screen: str = "none", **options: Any) -> EncoderStream:
    mean = torch.randn(sae.d_in, generator=torch.Generator().manual_seed(5))
    return EncoderStream.of(sae, screen=screen, mean=mean, **options)


def make_arguments(
    d_in: int, n: int, *, kind: str = "jumprelu", dtypes: Any = BF16, integers: bool = True, screen: str = "none"
) -> dict[str, Any]:
    """Arguments of `steer`: rows of three prompts and unsteered ones in turn; an encoder in an order of its own."""
    g = torch.Generator().manual_seed(n)
    sae = random_sae(kind, d_in, D_SAE, dtype=dtypes[1], integers=integers)
    h = torch.randint(-2, 3, (n, d_in), generator=g) if integers else torch.randn(n, d_in, generator=g)
    hot = torch.randperm(D_SAE, generator=g)[:50]
    return {
        "h": h.to(dtypes[0]),
        "sae": sae,
        "cdmap": random_map(sae, 31, N_COLUMNS),
        "plan": random_plan(N_PROMPTS, N_SLOTS, N_COLUMNS, mode="both" if n % 2 else "ablate"),
        "rows": (torch.arange(n) % (N_PROMPTS + 1) - 1).to(torch.int32),
        "stream": stream_of(sae, screen, hot=hot, n_large=5),
        "alpha": 0.125,
    }


@pytest.mark.parametrize("screen", ["none", "int5"])
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@pytest.mark.parametrize("dtypes", [BF16, FP16], ids=str)
@pytest.mark.parametrize("n", ROWS)
# Less than a slice, slices and a half, several chunks and a half; and rows that are not aligned, or end amid a step.
@pytest.mark.parametrize("d_in", [16, 272, 1552, 130, 24])
def test_exact_on_integers(d_in: int, n: int, dtypes: Any, kind: str, screen: str) -> None:
    arguments = make_arguments(d_in, n, kind=kind, dtypes=dtypes, screen=screen)
    actual = tensors(run_on("cuda", steer, **arguments, record=True))
    expected = tensors(run_on("reference", steer, **arguments, record=True))
    assert all(same_bits(*pair) for pair in zip(actual, expected, strict=True))
    assert same_bits(run_on("cuda", steer, **arguments), expected[0])


@pytest.mark.parametrize("screen", ["none", "int5"])
@pytest.mark.parametrize("dtypes", [BF16, FP16], ids=str)
@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("d_in", [16, 272, 1552, 130, 24])
def test_two_parts_in_place(d_in: int, n: int, dtypes: Any, screen: str) -> None:
    arguments = make_arguments(d_in, n, dtypes=dtypes, screen=screen) | {"rows": torch.arange(n, dtype=torch.int32) % 3}
    total = arguments.pop("h")
    # Sums are rounded to the integers again.
    second = torch.where(torch.arange(d_in) % 3 == 0, 1, torch.finfo(total.dtype).eps / 8 * (total != 0)).to(total)
    first = torch.where(second == 1, total - 1, total)
    assert same_bits(first + second, total) and not torch.equal(first.double() + second.double(), total.double())

    def in_place(first: Tensor, second: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        parts = first.clone(), second.clone()
        steer_(parts[0], residual=parts[1], **arguments)
        return parts

    expected, edits = run_on("reference", steer, total, **arguments, record=True)
    changed = (edits.before != edits.after).any(dim=1)
    assert changed.any() or n == 1
    out, rest = run_on("cuda", in_place, first, second, **arguments)
    assert same_bits(out[changed], expected[changed]) and same_bits(rest[changed], torch.zeros_like(rest[changed]))
    assert same_bits(out[~changed], first[~changed]) and same_bits(rest[~changed], second[~changed])


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("screen", ["none", "int5"])
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@pytest.mark.parametrize("n", [7, 8])
def test_a_strength_for_each_plan(n: int, kind: str, screen: str, record: bool) -> None:
    arguments = make_arguments(272, n, kind=kind, screen=screen) | {"record": record}
    alphas = torch.tensor([2, 0, 0.125])
    actual = tensors(run_on("cuda", steer, **arguments | {"alpha": alphas}))
    for plan, alpha in enumerate(alphas.tolist()):
        expected = tensors(run_on("reference", steer, **arguments | {"alpha": alpha}))
        rows = arguments["rows"] == plan
        assert all(same_bits(ours[rows], theirs[rows]) for ours, theirs in zip(actual, expected, strict=True))
    unsteered = arguments["rows"] < 0
    assert same_bits(actual[0][unsteered], arguments["h"][unsteered])


@pytest.mark.parametrize("screen", ["none", "int5"])
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@pytest.mark.parametrize("dtypes", [BF16, FP16], ids=str)
@pytest.mark.parametrize("d_in", [272, 1552])
def test_bits_of_a_row_do_not_depend_on_the_batch(d_in: int, dtypes: Any, kind: str, screen: str) -> None:
    arguments = make_arguments(d_in, max(ROWS), kind=kind, dtypes=dtypes, integers=False, screen=screen)
    h, rows = arguments.pop("h"), arguments.pop("rows")
    whole, edits = run_on("cuda", steer, h, rows=rows, **arguments, record=True)
    for part in (slice(5, 6), slice(1, 8), slice(2, 6)):
        out, part_edits = run_on("cuda", steer, h[part], rows=rows[part], **arguments, record=True)
        assert same_bits(out, whole[part]) and same_bits(part_edits.maximum, edits.maximum[part])


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("dtypes", [BF16, FP16], ids=str)
def test_a_screen_changes_no_bit(dtypes: Any, n: int) -> None:
    plain, edits = run_on("cuda", steer, **make_arguments(1552, n, dtypes=dtypes, integers=False), record=True)
    screened = make_arguments(1552, n, dtypes=dtypes, integers=False, screen="int5")
    out, screened_edits = run_on("cuda", steer, **screened, record=True)
    assert same_bits(out, plain) and same_bits(screened_edits.maximum, edits.maximum)


@pytest.mark.parametrize("d_in", [256, 1552])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_screen_keeps_a_maximum_that_is_as_far_from_its_copy_as_it_may_be(dtype: torch.dtype, d_in: int) -> None:
    """A row along the remainder of latent 0, and latent 1, which the copy holds exactly, just below that."""
    W = torch.zeros(40, d_in, dtype=dtype)
    W[0] = torch.randn(d_in, generator=torch.Generator().manual_seed(3))
    q, scale = quantise(W[:1])
    remainder = W[0].double() - scale.double() * q[0].double()
    W[1] = q[0].to(dtype) / 32
    h = (20 * remainder / remainder.norm()).to(dtype)[None]
    latent, copied = h[0].double() @ W[0].double(), scale.double() * (h[0].double() @ q[0].double())
    b_enc = torch.full((40,), -1000.0)
    b_enc[0], b_enc[2] = 100, 1
    b_enc[1] = 100 + latent - h[0].double() @ W[1].double() - 0.01 * (latent - copied)
    sae = SAEWeights(W, b_enc, torch.zeros(40), W.clone())
    cdmap = MapWeights.gather(torch.tensor([2]), torch.zeros(1, 1), sae)
    plan = SteeringPlan(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.int8))
    rows, latents = quantise_rows(W, b_enc, torch.zeros(d_in))
    screened = replace(EncoderStream.of(sae), screen_rows=rows, screen_latents=latents, screen_mean=torch.zeros(d_in))
    arguments = {"h": h, "sae": sae, "cdmap": cdmap, "plan": plan, "record": True}
    _, edits = run_on("cuda", steer, **arguments, stream=screened)
    assert edits.maximum.item() == pytest.approx(100 + latent.item(), rel=1e-6)
    _, plain = run_on("cuda", steer, **arguments)
    assert same_bits(edits.maximum, plain.maximum)


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@pytest.mark.parametrize("d_in", [272, 1552])
def test_latents_have_the_same_bits_wherever_they_are_evaluated(d_in: int, kind: str) -> None:
    """Among the large latents, by the stream and, for those that are selected, in the columns."""
    arguments = make_arguments(d_in, 8, kind=kind, integers=False)
    sae, hot = arguments["sae"], arguments["stream"].order
    _, expected = run_on("cuda", steer, **{**arguments, "stream": EncoderStream.of(sae)}, record=True)
    for n_large in (0, 16, D_SAE):
        stream = EncoderStream.of(sae, hot=hot, n_large=n_large)
        _, edits = run_on("cuda", steer, **{**arguments, "stream": stream}, record=True)
        assert same_bits(edits.maximum, expected.maximum) and same_bits(edits.after, expected.after)
    # Some row's largest latent is a selected one.
    assert (expected.maximum == expected.before.max(dim=1).values).any()


@pytest.mark.skipif(not EMULATED, reason="a GPU has its own order")
@pytest.mark.parametrize("screen", ["none", "int5"])
@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("seed", range(1, 5))
def test_the_order_of_threads_does_not_matter(seed: int, n: int, screen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make_arguments(1552, n, integers=False, screen=screen)
    expected = run_on("cuda", steer, **arguments)
    monkeypatch.setenv("DSPA_EMULATED_SEED", str(seed))
    assert same_bits(run_on("cuda", steer, **arguments), expected)


@pytest.mark.parametrize("n", [1, 8])
def test_runs_are_alike(n: int) -> None:
    arguments = make_arguments(272, n, integers=False)
    first = run_on("cuda", steer, **arguments)
    assert all(same_bits(run_on("cuda", steer, **arguments), first) for _ in range(10))


@pytest.mark.parametrize("word", [0, -(2**31)])
def test_the_barrier_is_left_as_it_was_found_but_for_its_sign(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that was waited for, or was not, from a word of either sign."""
    barrier = torch.tensor([word], dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(cuda_impl, "barrier_word", lambda _device: barrier)
    for rows in (torch.tensor([1], dtype=torch.int32), torch.tensor([-1], dtype=torch.int32)):
        arguments = {**make_arguments(272, 1), "rows": rows}
        expected = run_on("reference", steer, **arguments)
        assert same_bits(run_on("cuda", steer, **arguments), expected)
        assert barrier.item() in (0, -(2**31))


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launches that read the first of the encoder before they know whether they need it."""
    entry = launch.CudaEntry("steer", 0, programmatic=True, ahead=True)
    monkeypatch.setattr(launch, "cuda_table", lambda: (entry,))
    launch.cuda_entry.cache_clear()
    yield
    launch.cuda_entry.cache_clear()


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("screen", ["none", "int5"])
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@pytest.mark.parametrize("n", [1, 8])
# Fewer pieces than stages, more, and rows that are not aligned.
@pytest.mark.parametrize("d_in", [16, 1552, 130])
def test_exact_where_the_first_is_read_ahead(d_in: int, n: int, kind: str, screen: str) -> None:
    arguments = make_arguments(d_in, n, kind=kind, screen=screen)
    for rows in (arguments["rows"], torch.full((n,), -1, dtype=torch.int32)):
        actual = run_on("cuda", steer, **{**arguments, "rows": rows})
        assert same_bits(actual, run_on("reference", steer, **{**arguments, "rows": rows}))


# What the library that emulates a GPU shows or can be told.

emulated = pytest.mark.skipif(not EMULATED, reason="only the library that emulates a GPU has this")


@emulated
@pytest.mark.parametrize("n_blocks", [1, 2])
def test_a_launch_takes_the_blocks_that_fit_into_a_part_of_the_device(n_blocks: int) -> None:
    arguments = make_arguments(272, 8, integers=False)
    expected = run_on("cuda", steer, **arguments)
    library = ctypes.CDLL(EMULATED)
    library.dspa_emulated_partition(n_blocks)
    try:
        assert same_bits(run_on("cuda", steer, **arguments), expected)
    finally:
        library.dspa_emulated_partition(0)


@emulated
@pytest.mark.parametrize("n", [1, 8])
def test_every_latent_may_be_a_candidate(n: int) -> None:
    """More of them than a pass of all blocks takes; all are read once."""
    arguments = settling(n, 203, 202, value=4)
    W = arguments["sae"].encoder_rows
    W.copy_(W[0].clone())
    arguments["cdmap"] = MapWeights.gather(torch.tensor([0]), torch.zeros(1, 1), arguments["sae"])
    paths = torch.zeros(6, dtype=torch.int64)
    out = steer(**arguments, stream=stream_of(arguments["sae"], "int5"), paths=paths, alpha=0.5, backend="cuda")
    assert paths.tolist() == [0, 0, 0, 0, n, 203] and (out[:, 0] == 4 - 2).all()


class Copies:
    """Bytes of the encoder that asynchronous copies brought."""

    def __enter__(self) -> Copies:
        self.library = ctypes.CDLL(EMULATED)
        self.library.dspa_emulated_bytes_copied.restype = ctypes.c_int64
        self.library.dspa_emulated_reset()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = self.library.dspa_emulated_bytes_copied()


ROW = 512  # bytes of one of their rows in bf16


def settling(n: int, d_sae: int, hot: int, value: float) -> dict[str, Any]:
    """n rows that ablate a latent of `value`; their maximum is 5, at the latent `hot` of d_sae, on d_in = 256."""
    d_in = ROW // 2
    W = torch.zeros(d_sae, d_in, dtype=torch.bfloat16)
    W[0, 0] = W[hot, 1] = 1
    h = torch.zeros(n, d_in, dtype=torch.bfloat16)
    h[:, 0], h[:, 1] = value, 5
    sae = SAEWeights(W, torch.zeros(d_sae), torch.zeros(d_sae), W.clone())
    plan = SteeringPlan(torch.zeros(n, 1, dtype=torch.int32), torch.full((n, 1), -1, dtype=torch.int8))
    return {"h": h, "sae": sae, "cdmap": MapWeights.gather(torch.tensor([0]), torch.zeros(1, 1), sae), "plan": plan}


@emulated
@pytest.mark.parametrize("n", [1, 8])
def test_the_encoder_is_read_once_for_all_rows(n: int) -> None:
    arguments = settling(n, 1000, 999, value=4)
    with Copies() as copies:
        steer(**arguments, backend="cuda")
    assert copies.bytes == arguments["sae"].encoder_rows.nbytes + n * ROW


@emulated
@pytest.mark.parametrize("value", [0, 1])
def test_little_is_read_for_rows_that_are_inactive_or_settled(value: float) -> None:
    arguments = settling(3, 1000, 999, value)
    stream = EncoderStream.of(arguments["sae"], hot=torch.tensor([999]))
    with Copies() as copies:
        out = steer(**arguments, stream=stream, backend="cuda")
    # The selected latent of each row, and the hot latent for all of them.
    assert copies.bytes == (3 + 1) * ROW and torch.equal(out[:, 0], torch.zeros(3, dtype=torch.bfloat16))


@emulated
@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize(("value", "share"), [(0, 0.2), (1, 0.2), (4, 1)])
def test_what_is_read_ahead_is_little_and_not_read_again(value: float, share: float) -> None:
    arguments = settling(1, 10_000, 9_999, value)
    stream = EncoderStream.of(arguments["sae"], hot=torch.tensor([9_999]))
    with Copies() as copies:
        steer(**arguments, stream=stream, backend="cuda")
    streamed = copies.bytes - 2 * ROW  # without the selected latent and the hot latent
    assert 0 < streamed <= share * arguments["sae"].encoder_rows.nbytes
    assert (streamed == arguments["sae"].encoder_rows.nbytes) == (share == 1)


@emulated
@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("seed", range(8))
def test_blocks_that_look_late_need_nothing_of_what_they_read_ahead(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have settled the row by then."""
    monkeypatch.setenv("DSPA_EMULATED_SEED", str(seed))
    arguments = settling(1, 20_000, 19_999, value=1)
    stream = EncoderStream.of(arguments["sae"], hot=torch.tensor([19_999]), n_large=0)
    paths = torch.zeros(6, dtype=torch.int64)
    out = steer(**arguments, stream=stream, paths=paths, backend="cuda")
    assert out[0, 0] == 0 and paths[4] == 1 and paths[5] < 20_000


@emulated
@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize(("screen", "hot"), [("none", 40), ("int5", 70)])
def test_weights_that_the_launch_ahead_writes_are_read_after_it(screen: str, hot: int) -> None:
    """Block 2 of 3 has nothing to select. It reads its first latents, among them the largest, as early as it may."""
    arguments = settling(1, 1000, hot, value=4)
    stream = stream_of(arguments["sae"], screen)
    name = "encoder_rows" if screen == "none" else "screen_rows"
    values = getattr(stream, name)
    expected = steer(**arguments, stream=stream, backend="cuda")
    library = ctypes.CDLL(EMULATED)

    def is_right_after_a_write(written: Tensor) -> bool:
        """The launch ahead writes the values over others, and ends as late as it may."""
        ctypes.memset(written.data_ptr(), 0, written.nbytes)
        addresses = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (written, values))
        library.dspa_emulated_write_ahead(*addresses, ctypes.c_int64(values.nbytes))
        return same_bits(steer(**arguments, stream=replace(stream, **{name: written}), backend="cuda"), expected)

    written = torch.empty_like(values)
    assert is_right_after_a_write(written)
    # Nothing shows further writes of this kind, and launches are programmatic now.
    assert not is_right_after_a_write(written)
    assert is_right_after_a_write(written.zero_()) and is_right_after_a_write(torch.empty_like(values))


@emulated
@pytest.mark.parametrize("n", [1, 8])
def test_a_stream_ends_as_soon_as_rows_are_settled(n: int) -> None:
    """Where the first tiles settle all rows, no more is read than was under way."""
    arguments = settling(n, 20_000, 19_999, value=1)
    stream = EncoderStream.of(arguments["sae"], hot=torch.tensor([19_999]), n_large=0)
    with Copies() as copies:
        steer(**arguments, stream=stream, backend="cuda")
    assert 0 < copies.bytes < arguments["sae"].encoder_rows.nbytes / 2


@emulated
def test_a_screen_reads_five_bits_a_number_and_few_rows() -> None:
    arguments = settling(1, 1000, 999, value=4)
    stream, paths = stream_of(arguments["sae"], "int5"), torch.zeros(6, dtype=torch.int64)
    with Copies() as copies:
        steer(**arguments, stream=stream, paths=paths, backend="cuda")
    sae = arguments["sae"]
    assert 0 < paths[5] < 10
    assert copies.bytes == sae.encoder_rows.numel() * 5 / 8 + (1 + paths[5]) * ROW


# Errors


@pytest.fixture
def bad_call(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launches that name a dtype there is not."""
    monkeypatch.setitem(cuda_library.DTYPES, torch.bfloat16, 7)
    yield


@pytest.mark.usefixtures("bad_call")
def test_an_error_names_the_kernel_its_shape_and_what_cuda_says() -> None:
    arguments = {name: _moved(value) for name, value in make_arguments(272, 8).items()}
    with pytest.raises(cuda_library.CudaError) as error:
        steer(**arguments, backend="cuda")
    message = str(error.value)
    assert "steer with n_rows 8, d_in 272, d_sae 203, n_slots 6 cannot be launched: DSPA_BAD_DTYPE (" in message


def test_rows_that_do_not_fit_into_shared_memory_are_an_error() -> None:
    arguments = {name: _moved(value) for name, value in make_arguments(16384, 1).items()}
    with pytest.raises(cuda_library.CudaError, match=r"DSPA_NO_SHARED_MEMORY .*rows of this width do not fit"):
        steer(**arguments, backend="cuda")


def _moved(value: Any) -> Any:
    return (
        value.to(DEVICE) if isinstance(value, (Tensor, SAEWeights, MapWeights, SteeringPlan, EncoderStream)) else value
    )
