"""The ways in which `steer` avoids reading the encoder: each is taken, counted, and changes no bit."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dspa_kernels import EncoderStream, MapWeights, SAEWeights, SteeringPlan, steer
from dspa_kernels.cuda_library import MAX_ROWS
from dspa_kernels.testing import KINDS, random_sae, run_on, same_bits
from dspa_kernels.weights import PATHS, SCREENS

from ..rounding import rounding
from .cases import BF16, D_SAE, DTYPES, make_case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def steered(backend: str, **arguments: Any) -> tuple[Tensor, dict[str, int]]:
    """h' and what became of the rows; "read" is how many encoder rows were read in full."""
    paths = torch.zeros(len(PATHS) + 1, dtype=torch.int64)
    device = "cpu" if backend == "reference" or INTERPRETED else "cuda"
    tally = paths.to(device)
    moved = {name: value.to(device) if hasattr(value, "to") else value for name, value in arguments.items()}
    out = steer(**moved, paths=tally, backend=backend)
    out = out[0] if isinstance(out, tuple) else out
    return out.cpu(), dict(zip((*PATHS, "read"), tally.tolist(), strict=True))


def one_row(
    pre: list[float], selected: dict[int, int], *, k: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """A row whose latents have pre-activations `pre`, and a plan of latent -> sign. Threshold 0."""
    n = len(pre)
    eye = torch.eye(n, dtype=dtype)
    sae = SAEWeights(eye, torch.zeros(n), torch.zeros(n), eye.clone(), k=k)
    return {
        "h": torch.tensor([pre], dtype=dtype),
        "sae": sae,
        "cdmap": MapWeights.gather(torch.arange(n), torch.zeros(1, n), sae),
        "plan": SteeringPlan(
            torch.tensor([list(selected)], dtype=torch.int32), torch.tensor([list(selected.values())], dtype=torch.int8)
        ),
    }


ABLATE, AUGMENT = -1, 1


@pytest.mark.parametrize(
    ("pre", "selected", "hot", "alpha", "path"),
    [
        ([-1.0, 5.0, 2.0], {0: ABLATE}, [1], 0.2, "inactive"),
        ([1.0, 5.0, 2.0], {0: ABLATE}, [1], 0.2, "settled"),  # exactly alpha times a large latent
        ([1.5, 5.0, 2.0], {0: ABLATE}, [1], 0.2, "streamed"),
        ([1.0, 5.0, 2.0], {0: ABLATE}, [2], 0.2, "streamed"),  # what is large was not expected
        ([1.0, 5.0, 2.0], {0: ABLATE, 1: ABLATE}, [], 0.2, "streamed"),
        ([1.0, 5.0, 2.0], {0: ABLATE, 1: ABLATE}, [], 1.0, "settled"),  # every f <= M
        ([1.0, 5.0, 2.0], {0: ABLATE, 2: AUGMENT}, [1], 1.0, "streamed"),  # to augment, M has to be known
        ([1.0, 5.0, -2.0], {0: ABLATE, 2: AUGMENT}, [1], 1.0, "settled"),  # unless there is nothing to augment
        ([1.0, 5.0, 2.0], {0: ABLATE}, [1], 0.0, "streamed"),
        ([1.0, float("inf"), 2.0], {0: ABLATE}, [1], 0.2, "not_finite"),
        ([1.0, float("nan"), 2.0], {0: ABLATE}, [1], 0.2, "not_finite"),
        ([1.0, 2.0**56, 2.0], {0: ABLATE}, [1], 0.2, "not_finite"),  # its square overflows in a norm
        ([1.0, 2.0**55, 2.0], {0: ABLATE}, [1], 0.2, "settled"),
    ],
)
def test_each_path_is_taken_and_counted(
    backend: str, pre: list[float], selected: dict[int, int], hot: list[int], alpha: float, path: str
) -> None:
    arguments = one_row(pre, selected)
    stream = EncoderStream.of(arguments["sae"], hot=torch.tensor(hot, dtype=torch.int32))
    out, paths = steered(backend, **arguments, alpha=alpha, stream=stream)
    assert {name: n for name, n in paths.items() if n and name != "read"} == {path: 1}
    # A block that looks late may find the row settled by another's part of the encoder.
    assert (0 < paths["read"] <= len(pre)) if path == "streamed" else paths["read"] == 0

    # The same bits with everything read.
    plain, _ = run_on(backend, steer, **arguments, alpha=alpha, record=True)
    assert same_bits(out, plain)
    changes = path in ("settled", "streamed") and alpha > 0
    assert same_bits(out, arguments["h"]) != changes


def test_unsteered_rows_are_counted(backend: str) -> None:
    arguments = one_row([1.0, 5.0, 2.0], {0: ABLATE})
    out, paths = steered(backend, **arguments, rows=torch.tensor([-1], dtype=torch.int32))
    assert paths["unsteered"] == 1 and same_bits(out, arguments["h"])


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize(
    ("dtype", "alpha"),
    [
        (torch.float16, 3e4),
        (torch.bfloat16, 3e38),
        (torch.bfloat16, 2e16),  # finite, but the norm of the next layer would take the row for 0
        (torch.float32, 1e38),
    ],
    ids=str,
)
def test_edits_whose_result_is_not_finite_are_counted(
    backend: str, dtype: torch.dtype, alpha: float, record: bool
) -> None:
    """Also if that is so in the last of several column tiles alone."""
    for n, latent in ((3, 0), (1100, 1), (1100, 1099)):
        pre = torch.ones(n)
        pre[-1] = 5
        arguments = one_row(pre.tolist(), {latent: AUGMENT}, dtype=dtype)
        for strength, expected in ((alpha, True), (0.2, False)):
            _, paths = steered(backend, **arguments, alpha=strength, record=record)
            assert (paths["not_finite"] > 0) == expected and paths["settled"] + paths["streamed"] == 1


def test_recording_reads_what_settling_would_not(backend: str) -> None:
    arguments = one_row([1.0, 5.0, 2.0], {0: ABLATE})
    stream = EncoderStream.of(arguments["sae"], hot=torch.tensor([1]))
    _, edits = run_on(backend, steer, **arguments, stream=stream, record=True)
    assert edits.maximum.tolist() == [5] and edits.before.tolist() == [[1]] and edits.after.tolist() == [[0]]


def test_paths_add_up_over_calls(backend: str) -> None:
    arguments = one_row([1.5, 5.0, 2.0], {0: ABLATE})
    paths = torch.full((6,), 7, dtype=torch.int64)
    device = "cpu" if backend == "reference" or INTERPRETED else "cuda"
    arguments, paths = {name: value.to(device) for name, value in arguments.items()}, paths.to(device)
    for _ in range(2):
        steer(**arguments, paths=paths, backend=backend)
    assert paths.tolist() == [7, 7, 7, 7, 9, 7 + 2 * 3]


@pytest.mark.parametrize("start", [0, 1, 2])
def test_rows_before_the_start_of_their_plan_are_not_steered(backend: str, start: int) -> None:
    case = make_case(dtypes=BF16, integers=True, mode="ablate")
    positions = torch.arange(len(case.h)) % 3
    starts = torch.full((len(case.plan.slots),), start)
    gated = run_on(backend, steer, **case.arguments(positions=positions, start=starts))
    rows = torch.where(positions >= start, case.rows, -1)
    assert same_bits(gated, run_on(backend, steer, **case.arguments(rows=rows)))


def test_without_rows_each_follows_its_own_plan(backend: str) -> None:
    case = make_case(dtypes=BF16, integers=True)
    n = len(case.plan.slots)
    own = torch.arange(n, dtype=torch.int32)
    h = case.h[:n]
    without = run_on(backend, steer, **case.arguments(h=h, rows=None))
    assert same_bits(without, run_on(backend, steer, **case.arguments(h=h, rows=own)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("record", [False, True])
def test_each_plan_has_the_bits_and_paths_of_its_own_strength(backend: str, kind: str, record: bool) -> None:
    """Rows that are settled by their strength, streamed, not finite and unsteered. A view of strengths is enough."""
    case = make_case(kind, BF16, mode="ablate")
    case.h[-1, 3] = float("inf")
    alphas = torch.tensor([2.5, 0, 0.125])
    stream = EncoderStream.of(case.sae, hot=torch.arange(0, D_SAE, 3), n_large=5)
    common = case.arguments(stream=stream, record=record)
    strided = alphas.repeat_interleave(2)[::2]
    out, paths = steered(backend, **common | {"alpha": strided})
    total = dict.fromkeys(paths, 0)
    for prompt, alpha in enumerate(alphas.tolist()):
        rows = torch.where(case.rows == prompt, case.rows, -1)
        alone, own = steered(backend, **common | {"alpha": alpha, "rows": rows})
        assert same_bits(out[case.rows == prompt], alone[case.rows == prompt])
        total = {name: total[name] + own[name] for name in own}
    assert paths["unsteered"] == (case.rows < 0).sum()
    names = ("not_finite", "inactive", "settled", "streamed")
    assert [paths[name] for name in names] == [total[name] for name in names]


# Streams


@pytest.mark.parametrize("n_large", [0, 9])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[4]], ids=str)
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@pytest.mark.usefixtures("ordered_sums")
def test_no_stream_changes_a_bit(
    backend: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype], n_large: int
) -> None:
    """Screened, settled or read in another order: the same bits as when every row is needed and recorded."""
    case = make_case(kind, dtypes, mode="ablate", n=7, d_in=150)
    mean = case.h.double().mean(dim=0).float()
    hot = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(1))
    plain, edits = run_on(backend, steer, **case.arguments(record=True))
    # A library, which multiplies in the reference, may round a product by its place in the matrix.
    same = same_bits if backend == "triton" else close
    for screen in SCREENS:
        stream = EncoderStream.of(case.sae, hot=hot, n_large=n_large, screen=screen, mean=mean)
        out, stream_edits = run_on(backend, steer, **case.arguments(record=True, stream=stream))
        assert (
            same(out, plain)
            and same(stream_edits.maximum, edits.maximum)
            and same_bits(stream_edits.before, edits.before)
        )
        assert same(run_on(backend, steer, **case.arguments(stream=stream)), out)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of a product, of the bias, of an edit and of the result."""
    atol = rounding(4, float(b.nan_to_num().abs().max()), a.dtype)
    return torch.allclose(a, b, rtol=0, atol=atol, equal_nan=True)


def wide_case(h: Tensor, encoder_rows: Tensor, *, kind: str, selected: int = 3) -> dict[str, Any]:
    """Rows h [N, d_in] that ablate the latents 0, 1, ..; encoder_rows [d_sae, d_in] as given."""
    d_sae, d_in = encoder_rows.shape
    nothing = torch.zeros(d_sae)
    sae = replace(
        random_sae(kind, d_in, d_sae, dtype=encoder_rows.dtype),
        encoder_rows=encoder_rows,
        b_enc=nothing,
        threshold=nothing,
    )
    plan = SteeringPlan(
        torch.arange(selected, dtype=torch.int32).expand(len(h), -1).contiguous(),
        torch.full((len(h), selected), -1, dtype=torch.int8),
    )
    columns = torch.arange(selected)
    return {"h": h, "sae": sae, "cdmap": MapWeights.gather(columns, torch.zeros(1, selected), sae), "plan": plan}


def adversarial(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows and encoder rows on which a careless bound loses the maximum."""
    g = torch.Generator().manual_seed(0)
    h, W = torch.randn(3, 48, generator=g), torch.randn(150, 48, generator=g)
    if name == "massive activations":
        h[:, [5, 17]] = torch.tensor([3000.0, -2000.0])
    elif name == "a row of outlying norm":
        h[1] = 100 * h[1]
        h[1, 5] = 10000
    elif name == "near ties":
        W = W[:1] * (1 + torch.randn(150, 48, generator=g) * torch.finfo(dtype).eps)
        h = h.abs() * W[0].sign()
    elif name == "all rows are candidates":
        W = W[:1].expand(150, -1).contiguous()
    elif name == "denormals":
        h, W = h * 1e-20, W * 1e-19
        W[::3] = 0
    elif name == "a wide range in each row":
        W = W * torch.logspace(-6, 3, 48)
    return h.to(dtype), W.to(dtype)


ADVERSARIAL = [
    "massive activations",
    "a row of outlying norm",
    "near ties",
    "all rows are candidates",
    "denormals",
    "a wide range in each row",
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["relu", "topk"])
@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.usefixtures("ordered_sums")
def test_the_screen_never_loses_a_maximum(backend: str, name: str, kind: str, dtype: torch.dtype) -> None:
    h, encoder_rows = adversarial(name, dtype)
    arguments = wide_case(h, encoder_rows, kind=kind)
    plain, plain_edits = run_on(backend, steer, **arguments, record=True)
    for mean in (None, h.float().mean(dim=0)):
        stream = EncoderStream.of(arguments["sae"], screen="int5", mean=mean)
        out, edits = run_on(backend, steer, **arguments, record=True, stream=stream)
        assert same_bits(out, plain) and same_bits(edits.maximum, plain_edits.maximum)


@pytest.mark.parametrize("screen", ["none", "int5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_of_outlying_norm_is_steered_by_its_own_maximum(backend: str, dtype: torch.dtype, screen: str) -> None:
    """As the first token of a text in many models: it is edited by the formula, and so are the rows with it."""
    h, W = adversarial("a row of outlying norm", dtype)
    arguments = wide_case(h, W, kind="relu")
    # The mean of rows of which one is an outlier is far from all of them.
    stream = EncoderStream.of(arguments["sae"], screen=screen, mean=h.float().mean(dim=0))
    out, edits = run_on(backend, steer, **arguments, record=True, stream=stream, alpha=0.2)
    f = (h.double() @ W.double().T).clamp(min=0)
    M, own = f.amax(dim=1), f[:, :3]
    change = (own - 0.2 * M[:, None]).clamp(min=0) - own
    wanted = h.double() + change @ arguments["sae"].W_dec[:3].double()
    assert M[1] > 50 * M[[0, 2]].max() and (change != 0).any(dim=1).all()
    for row in range(len(h)):
        atol = rounding(h.shape[1], float((h[row].abs().double() @ W.abs().double().T).max()))
        torch.testing.assert_close(edits.maximum[row].double(), M[row], atol=atol, rtol=0)
        atol = 4 * atol + rounding(1, float(wanted[row].abs().max()), dtype)
        torch.testing.assert_close(out[row].double(), wanted[row], atol=atol, rtol=0)


def test_the_screen_reads_few_rows() -> None:
    """On ordinary rows the int5 copy rules out most of the encoder; where all rows tie it rules out none."""
    h, encoder_rows = adversarial("ordinary", torch.bfloat16)
    arguments = wide_case(h[:1], encoder_rows, kind="relu")
    _, plain = steered("triton", **arguments, alpha=0)
    screened = EncoderStream.of(arguments["sae"], screen="int5")
    _, few = steered("triton", **arguments, alpha=0, stream=screened)
    assert plain["read"] == 150 and 0 < few["read"] < 30
    tied = wide_case(*adversarial("all rows are candidates", torch.bfloat16), kind="relu")
    tied = {**tied, "h": tied["h"][:1].abs() * tied["sae"].encoder_rows[0].sign(), "plan": _first(tied["plan"])}
    _, all_rows = steered("triton", **tied, alpha=0, stream=EncoderStream.of(tied["sae"], screen="int5"))
    assert all_rows["read"] == 150


def _first(plan: SteeringPlan) -> SteeringPlan:
    return SteeringPlan(plan.slots[:1], plan.signs[:1])


@pytest.mark.skipif(not INTERPRETED, reason="programs that run at one time may all have begun a tile before any ends")
def test_a_stream_ends_as_soon_as_rows_are_settled() -> None:
    """The hottest rows come first: where they settle a row, the rest is not read."""
    pre = [1.0, *[0.1] * 198, 5.0]
    arguments = one_row(pre, {0: ABLATE})
    hot = EncoderStream.of(arguments["sae"], hot=torch.tensor([199]), n_large=0)
    out, paths = steered("triton", **arguments, stream=hot)
    assert paths["streamed"] == 1 and 0 < paths["read"] < len(pre)
    assert same_bits(out, run_on("triton", steer, **arguments, record=True)[0])


def test_a_screen_reports_its_memory() -> None:
    sae = random_sae("jumprelu", 64, 512)
    assert EncoderStream.of(sae).added_bytes(sae) == 0
    added = EncoderStream.of(sae, screen="int5").added_bytes(sae)
    assert added == 160 * 512 + 4 * 5 * 512 + 4 * 64  # a block per row, five numbers per latent, the mean


# Bits


@pytest.mark.parametrize(
    ("dtypes", "normalize"),
    [(DTYPES[1], "none"), (DTYPES[4], "none"), (DTYPES[1], "layer_norm"), (DTYPES[0], "none")],
    ids=str,
)
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@pytest.mark.usefixtures("ordered_sums")
def test_bits_of_a_row_do_not_depend_on_the_batch(
    backend: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype], normalize: str
) -> None:
    """Alone, in any batch, at any place: through tiles of all sizes and the launches of many rows."""
    n, same = MAX_ROWS if backend == "cuda" else 66, close if backend == "reference" else same_bits
    case = make_case(kind, dtypes, n=n, d_in=150, mode="ablate", normalize=normalize)
    whole, edits = run_on(backend, steer, **case.arguments(record=True))
    for rows in (slice(5, 6), slice(10, 27), slice(2, 35)):
        part, some = run_on(backend, steer, **case.arguments(h=case.h[rows], rows=case.rows[rows], record=True))
        assert same(part, whole[rows]) and same(some.maximum, edits.maximum[rows])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the interpreter has no order of blocks")
def test_runs_are_alike() -> None:
    case = make_case("jumprelu", DTYPES[1], n=64)
    first = run_on("triton", steer, **case.arguments())
    for _ in range(20):
        assert same_bits(run_on("triton", steer, **case.arguments()), first)
