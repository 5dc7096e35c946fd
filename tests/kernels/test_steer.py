from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dspa_kernels import InputError, MapWeights, SAEWeights, SteeringPlan, steer
from dspa_kernels.ops.steer import reference
from dspa_kernels.testing import KINDS, assert_as_accurate, random_sae, run_on, same_bits
from dspa_kernels.weights import NORMALIZATIONS

from ..rounding import rounding
from . import oracle
from .cases import BF16, D_IN, D_SAE, DTYPES, MARGIN, N_PROMPTS, N_SLOTS, PER_PLAN, ROUNDINGS, VIEWS, Case, make_case

MODES = ("ablate", "augment", "both")


def small(
    pre_threshold: list[tuple[int, int]], signs: list[int], *, k: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """One row whose latents have given pre-activations and thresholds; the first len(signs) are selected."""
    pre, threshold = torch.tensor(pre_threshold).T
    n = len(pre)
    eye = torch.eye(n, dtype=dtype)
    sae = SAEWeights(eye, torch.zeros(n), threshold.float(), eye.clone(), k=k)
    cdmap = MapWeights.gather(torch.arange(n), torch.zeros(1, n), sae)
    slots = torch.arange(len(signs), dtype=torch.int32)[None]
    plan = SteeringPlan(slots, torch.tensor([signs], dtype=torch.int8))
    rows = torch.zeros(1, dtype=torch.int32)
    return {"h": pre[None].to(dtype), "sae": sae, "cdmap": cdmap, "plan": plan, "rows": rows}


def with_negative_zeros(case: Case) -> Case:
    return replace(case, h=torch.where(case.h == 0, -0.0, case.h))


@pytest.mark.parametrize("alpha", [0.125, 1, 3, PER_PLAN], ids=repr)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_on_integers(
    backend: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype], mode: str, alpha: float | Tensor
) -> None:
    case = with_negative_zeros(make_case(kind, dtypes, mode=mode, integers=True))
    out, edits = run_on(backend, steer, **case.arguments(alpha=alpha, record=True))
    exact, before, after, maximum = oracle.steer(**case.arguments(alpha=alpha))

    assert out.dtype == case.h.dtype and out.is_contiguous()
    assert torch.equal(out, exact.to(out.dtype))
    for actual, wanted in zip((edits.before, edits.after, edits.maximum), (before, after, maximum), strict=True):
        assert actual.dtype == torch.promote_types(torch.promote_types(*dtypes), torch.float32)
        assert torch.equal(actual.double(), wanted)
    edited = (before != after).any(dim=1)
    assert edited.any() and not edited.all()
    assert same_bits(out[~edited], case.h[~edited])


@pytest.mark.parametrize("alpha", [0.2, 3])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy(
    backend: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype], normalize: str, alpha: float
) -> None:
    case = make_case(kind, dtypes, normalize=normalize)
    assert oracle.margin(case.h, case.sae) > MARGIN, "rounding decides here: choose another seed"
    out, edits = run_on(backend, steer, **case.arguments(alpha=alpha, record=True))
    dtype = oracle.plain_dtype(case.h, case.sae)
    plain, *plain_edits = oracle.steer(**case.arguments(alpha=alpha, dtype=dtype))
    exact, *exact_edits = oracle.steer(**case.arguments(alpha=alpha))

    assert_as_accurate(out, plain.to(out.dtype), exact)
    actual_edits = (edits.before, edits.after, edits.maximum)
    for actual, like, wanted in zip(actual_edits, plain_edits, exact_edits, strict=True):
        assert_as_accurate(actual, like, wanted)
    unedited = (exact_edits[0] == exact_edits[1]).all(dim=1)
    assert same_bits(out[unedited], case.h[unedited])


@pytest.mark.parametrize(
    ("signs", "alpha", "after"),
    [
        ([-1, -1], 0.5, [0, 2]),  # max(1 - 0.5 * 4, 0), 4 - 0.5 * 4
        ([1, 1], 0.5, [3, 6]),
        ([1, -1], 1, [5, 0]),
        ([-1, 1], 0, [1, 4]),
        ([0, -1], 0.5, [0, 2]),  # an empty place
        ([-1, 0], 0.5, [0, 0]),
        ([1, 0], 0.5, [3, 0]),
    ],
)
def test_worked_example(backend: str, signs: list[int], alpha: float, after: list[float]) -> None:
    arguments = small([(1, 0), (4, 0), (-9, 0)], signs)
    arguments["plan"].slots[0, torch.tensor(signs) == 0] = -1
    out, edits = run_on(backend, steer, **arguments, alpha=alpha, record=True)
    assert edits.before.tolist() == [[f if sign else 0 for f, sign in zip([1, 4], signs, strict=True)]]
    assert edits.after.tolist() == [after]
    assert edits.maximum.tolist() == [4]
    assert out.tolist() == [[*(a if s else f for f, a, s in zip([1, 4], after, signs, strict=True)), -9]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("pre_threshold", "k", "before", "maximum"),
    [
        # Exactly at the threshold is inactive, whether selected (0) or only a candidate for the maximum (3).
        ([(3, 3), (2, 1), (4, 2), (9, 9)], 0, [0, 2, 4], 4),
        # A threshold below zero does not make 0 or -1 active.
        ([(0, -5), (-1, -5), (1, -5), (0, -1)], 0, [0, 0, 1], 1),
        ([(0, -5), (-1, -5), (5, 5), (7, 0)], 0, [0, 0, 0], 0),
        # Of equal values the k of smaller index are active.
        ([(2, 0), (2, 0), (2, 0), (1, 0)], 2, [2, 2, 0], 2),
        ([(1, 0), (2, 0), (2, 0), (2, 0)], 2, [0, 2, 2], 2),
        ([(2, 0), (1, 0), (3, 0), (2, 0)], 2, [2, 0, 3], 3),
        # A top-k latent is active by rank and sign, whatever its threshold.
        ([(2, 9), (-1, -9), (0, -9), (-3, -9)], 3, [2, 0, 0], 2),
        ([(1, 0), (-1, 0), (2, 0), (3, 0)], 4, [1, 0, 2], 3),
        ([(1, 0), (-1, 0), (2, 0), (3, 0)], 1, [0, 0, 0], 0),
    ],
)
def test_what_is_active(
    backend: str,
    pre_threshold: list[tuple[int, int]],
    k: int,
    before: list[float],
    maximum: float,
    dtype: torch.dtype,
) -> None:
    arguments = small(pre_threshold, [1, 1, 1], k=k, dtype=dtype)
    out, edits = run_on(backend, steer, **arguments, alpha=1, record=True)
    assert edits.before.tolist() == [before]
    assert edits.maximum.tolist() == [maximum]
    pre = arguments["h"][0].tolist()
    assert out[0, :3].tolist() == [f + p if f == 0 else f + maximum for f, p in zip(before, pre[:3], strict=True)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_alpha_zero_changes_no_bit(backend: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for integers in (True, False):
        case = with_negative_zeros(make_case(kind, dtypes, integers=integers))
        out, edits = run_on(backend, steer, **case.arguments(alpha=0, record=True))
        assert same_bits(out, case.h)
        assert edits.before.any() and torch.equal(edits.before, edits.after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["no steered row", "empty plan", "no columns", "no slots", "no prompts"])
def test_nothing_to_steer_changes_no_bit(backend: str, what: str, kind: str) -> None:
    n_columns = 0 if what == "no columns" else 23
    case = with_negative_zeros(make_case(kind, BF16, n_columns=n_columns, integers=True))
    if what in ("no steered row", "no prompts"):
        case.rows.fill_(-1)
    if what == "no prompts":
        case = replace(case, plan=SteeringPlan(case.plan.slots[:0], case.plan.signs[:0]))
    if what == "no slots":
        case = replace(case, plan=SteeringPlan(case.plan.slots[:, :0], case.plan.signs[:, :0]))
    if what == "empty plan":
        case.plan.slots.fill_(-1)
        case.plan.signs.fill_(0)
    out, edits = run_on(backend, steer, **case.arguments(alpha=1, record=True))
    assert same_bits(out, case.h)
    assert edits.before.shape == edits.after.shape == (len(case.h), case.plan.slots.shape[1])
    assert not edits.before.any() and not edits.after.any()
    assert edits.maximum.tolist() == [0] * len(case.h)


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_few_rows(backend: str, kind: str, n: int) -> None:
    case = make_case(kind, BF16, n=n, integers=True)
    case.rows.fill_(1)
    out, edits = run_on(backend, steer, **case.arguments(alpha=1, record=True))
    exact, before, _, maximum = oracle.steer(**case.arguments(alpha=1))
    assert torch.equal(out, exact.to(out.dtype))
    assert torch.equal(edits.before.double(), before) and edits.before.shape == (n, N_SLOTS)
    assert torch.equal(edits.maximum.double(), maximum)


@pytest.mark.parametrize("k", [1, D_SAE - 1, D_SAE])
def test_any_k(backend: str, k: int) -> None:
    case = make_case("topk", BF16, k=k, integers=True)
    out = run_on(backend, steer, **case.arguments(alpha=1))
    assert torch.equal(out, oracle.steer(**case.arguments(alpha=1))[0].to(out.dtype))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_finite(backend: str, kind: str, normalize: str) -> None:
    case = make_case(kind, BF16, normalize=normalize)
    clean, clean_edits = run_on(backend, steer, **case.arguments(record=True))
    bad = torch.tensor([1, 2, 3, 4, 5])  # prompts 0, 1, 2 (which steers nothing), unsteered, 0
    for n, value in zip(bad, (float("nan"), float("inf"), -float("inf"), float("nan"), float("inf")), strict=True):
        case.h[n, 3 + n] = value
    out, edits = run_on(backend, steer, **case.arguments(record=True))
    good = torch.ones(len(case.h), dtype=torch.bool)
    good[bad] = False

    assert same_bits(out[bad], case.h[bad])
    assert edits.maximum[bad].isnan().tolist() == [True, True, True, False, True]
    assert not edits.before[bad].any() and not edits.after[bad].any()
    for actual, expected in ((out, clean), (edits.maximum, clean_edits.maximum)):
        largest = float(expected[good].abs().max())
        atol = rounding(ROUNDINGS, D_IN**0.5 * largest) + rounding(1, largest, expected.dtype)
        torch.testing.assert_close(actual[good], expected[good], rtol=0, atol=atol)


def test_a_row_that_is_not_finite_is_flagged_without_columns(backend: str) -> None:
    case = make_case(dtypes=BF16, n_columns=0)
    case.h[1] = float("nan")
    out, edits = run_on(backend, steer, **case.arguments(record=True))
    assert same_bits(out, case.h)
    assert edits.maximum.isnan().nonzero().tolist() == [[1]]


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_stays(backend: str, kind: str, normalize: str) -> None:
    case = make_case(kind, BF16, normalize=normalize)
    case.sae.b_enc.fill_(-1)
    case = replace(case, cdmap=MapWeights.gather(case.cdmap.columns, case.cdmap.values, case.sae))
    case.h[1:3] = 0
    assert same_bits(run_on(backend, steer, **case.arguments())[1:3], case.h[1:3])


@pytest.mark.parametrize("view", VIEWS)
def test_views(backend: str, view: str) -> None:
    case = make_case(dtypes=BF16, integers=True)
    viewed = replace(case, h=VIEWS[view](case.h), rows=case.rows.repeat_interleave(2)[::2])
    assert not viewed.h.is_contiguous() and torch.equal(viewed.h, case.h)
    out = run_on(backend, steer, **viewed.arguments())
    assert out.is_contiguous()
    assert same_bits(out, run_on(backend, steer, **case.arguments()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(backend: str, kind: str) -> None:
    case = make_case(kind, BF16, integers=True)
    together = run_on(backend, steer, **case.arguments())
    for n in range(len(case.h)):
        alone = replace(case, h=case.h[n : n + 1], rows=case.rows[n : n + 1])
        assert same_bits(run_on(backend, steer, **alone.arguments())[0], together[n])


@pytest.mark.not_cuda
@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_a_selected_latent_may_round_differently_than_in_the_whole_encoder(backend: str, kind: str) -> None:
    d_in, d_sae, n_columns = 257, 300, 7
    sae = random_sae(kind, d_in, d_sae, k=1)
    columns = torch.arange(n_columns)
    # Each row lies along one selected latent, which is therefore its largest.
    noise = torch.randn(70, d_in, generator=torch.Generator().manual_seed(0))
    _, edits = run_on(
        backend,
        steer,
        h=20 * sae.W_dec[columns].repeat(10, 1) + noise,
        sae=sae,
        cdmap=MapWeights.gather(columns, torch.zeros(1, n_columns), sae),
        plan=SteeringPlan(columns.int()[None], -torch.ones(1, n_columns, dtype=torch.int8)),
        rows=torch.zeros(70, dtype=torch.int32),
        record=True,
    )
    largest, latent = edits.before.max(dim=1)
    assert torch.equal(latent, columns.repeat(10))
    assert (edits.maximum >= largest).all()
    if kind == "topk":
        assert ((edits.before > 0).sum(dim=1) == 1).all()


def test_record_changes_nothing(backend: str) -> None:
    case = make_case(dtypes=BF16)
    out, _ = run_on(backend, steer, **case.arguments(record=True))
    assert same_bits(out, run_on(backend, steer, **case.arguments()))


def test_reads_the_encoder_only_for_rows_that_need_the_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = []
    stream = reference._stream

    def spy(hn: Tensor, *rest: Any) -> Any:
        streamed.append(len(hn))
        return stream(hn, *rest)

    monkeypatch.setattr(reference, "_stream", spy)
    case = make_case("jumprelu")
    _, edits = steer(**case.arguments(record=True, backend="reference"))
    with_active = int((edits.before > 0).any(dim=1).sum())
    assert streamed == [with_active] and 0 < with_active < int((case.rows >= 0).sum())

    streamed.clear()
    case.cdmap.threshold.fill_(1e6)
    out, _ = steer(**case.arguments(record=True, backend="reference"))
    assert streamed == [] and same_bits(out, case.h)


META = random_sae("jumprelu", D_IN, D_SAE).to("meta")
VALID = make_case(n=11)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"h": torch.zeros(2, 3, D_IN)}, ("`h`", "[2, 3, 19]", "[N, 19]", "Flatten")),
        ({"h": torch.zeros(11, D_IN + 1)}, ("`h`", "[11, 20]", "[N, 19]")),
        ({"h": torch.zeros(11, D_IN, dtype=torch.int64)}, ("`h`", "torch.int64", "torch.bfloat16", "h.to(")),
        ({"sae": META}, ("`sae`", "meta", "cpu", "`h`", "sae.to('cpu')")),
        ({"cdmap": VALID.cdmap.to("meta")}, ("`cdmap`", "meta", "cpu")),
        ({"plan": VALID.plan.to("meta")}, ("`plan`", "meta", "cpu")),
        ({"rows": VALID.rows.to("meta")}, ("`rows`", "meta", "cpu")),
        ({"rows": VALID.rows[1:]}, ("`rows`", "[10]", "[11]")),
        ({"rows": VALID.rows.long()}, ("`rows`", "torch.int64", "torch.int32", "rows.to(torch.int32)")),
        (
            {"cdmap": make_case(dtypes=(torch.float32, torch.bfloat16)).cdmap},
            ("`cdmap.encoder_rows`", "torch.bfloat16", "torch.float32"),
        ),
        (
            {"cdmap": MapWeights.gather(torch.arange(3), torch.zeros(5, 3), random_sae("relu", 20, 9))},
            ("`cdmap.encoder_rows`", "[3, 20]", "[C, 19]", "Gather"),
        ),
        (
            {"paths": torch.zeros(12, dtype=torch.int64)[::2]},
            ("`paths`", "not contiguous", "[2]", "a tensor of its own"),
        ),
        ({"alpha": -0.1}, ("`alpha`", "-0.1", "finite number >= 0")),
        ({"alpha": float("nan")}, ("`alpha`", "nan", "finite number >= 0")),
        ({"alpha": float("inf")}, ("`alpha`", "inf", "finite number >= 0")),
        ({"alpha": torch.ones(2)}, ("`alpha`", "[2]", "[3]")),
        ({"alpha": torch.ones(3, dtype=torch.float64)}, ("`alpha`", "torch.float64", "torch.float32")),
        ({"alpha": torch.ones(3, device="meta")}, ("`alpha`", "meta", "cpu")),
        ({"backend": "cudnn"}, ("`backend`", "'cudnn'", "auto, cuda, triton, reference")),
    ],
)
def test_input_errors(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        steer(**VALID.arguments(**change))
    assert all(part in str(error.value) for part in parts), error.value


def test_the_cases_cover_empty_places_and_prompts() -> None:
    case = make_case()
    assert set(case.rows.tolist()) == set(range(-1, N_PROMPTS))
    assert (case.plan.slots[:-1] < 0).any() and set(case.plan.signs[:-1].flatten().tolist()) == {-1, 0, 1}
