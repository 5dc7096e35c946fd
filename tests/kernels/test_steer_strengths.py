"""Plans with strengths of their own, against loops in fp64 that know no M."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dspa_kernels import BackendError, EncoderStream, InputError, SteeringPlan, steer, steer_
from dspa_kernels.formulas import ABLATE, AUGMENT, AUGMENT_ALWAYS, CLAMP, CLAMP_ALWAYS
from dspa_kernels.testing import KINDS, assert_as_accurate, run_on, same_bits, tensors
from dspa_kernels.weights import NORMALIZATIONS, PATHS

from . import oracle
from .cases import BF16, DTYPES, MARGIN, N_PROMPTS, N_SLOTS, Case, integer_tensor, make_case
from .test_ops_contract import recorded
from .test_steer import small

BACKENDS = ("reference", "triton")
SIGNS = (ABLATE, AUGMENT, CLAMP, AUGMENT_ALWAYS, CLAMP_ALWAYS)
INF = float("inf")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def with_strengths(case: Case, *, integers: bool = False, seed: int = 0) -> Case:
    """The case with a plan of all kinds of slots; one ablates all that there is of a latent."""
    g = torch.Generator().manual_seed(seed)
    used = case.plan.slots >= 0
    signs = torch.tensor(SIGNS, dtype=torch.int8)[torch.randint(0, 5, used.shape, generator=g)]
    strengths = (
        integer_tensor(0, 4, tuple(used.shape), seed).float() if integers else torch.rand(used.shape, generator=g)
    )
    # A latent is also moved down by a negative strength, and set to one.
    strengths = torch.where((signs != ABLATE) & (torch.rand(used.shape, generator=g) < 0.3), -strengths, strengths)
    strengths[0][signs[0] == ABLATE] = INF
    plan = SteeringPlan(case.plan.slots, torch.where(used, signs, 0).to(torch.int8), torch.where(used, strengths, 0))
    return replace(case, plan=plan)


def exact(case: Case, dtype: Any = np.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return h', before and after in `dtype`, from dense latents and loops."""
    out, W_dec = oracle.array(case.h, dtype), oracle.array(case.sae.W_dec, dtype)
    before = np.zeros((len(out), case.plan.slots.shape[1]), dtype)
    after = np.zeros_like(before)
    assert case.plan.strengths is not None
    for n, prompt in enumerate(case.rows.tolist()):
        if prompt < 0 or not np.isfinite(out[n]).all():
            continue
        pre, scale = oracle.pre_activations(out[n], case.sae, dtype)
        latents = oracle.active(pre, case.sae)
        for s, slot in enumerate(case.plan.slots[prompt].tolist()):
            sign, strength = int(case.plan.signs[prompt, s]), dtype(case.plan.strengths[prompt, s].item())
            if slot < 0:
                continue
            j = int(case.cdmap.columns[slot])
            f = latents.get(j, dtype(0))
            if f == 0 and sign not in (AUGMENT_ALWAYS, CLAMP_ALWAYS):
                continue
            edited = {
                ABLATE: max(f - strength, dtype(0)),
                AUGMENT: max(f + strength, dtype(0)),
                AUGMENT_ALWAYS: f + strength,
            }.get(sign, strength)
            before[n, s], after[n, s] = f, edited
            out[n] += scale * (edited - f) * W_dec[j]
    return tuple(torch.from_numpy(result) for result in (out, before, after))  # type: ignore[return-value]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_on_integers(backend: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    case = with_strengths(make_case(kind, dtypes, integers=True), integers=True)
    out, edits = run_on(backend, steer, **case.arguments(alpha=7, record=True))
    wanted, before, after = exact(case)
    assert torch.equal(out, wanted.to(out.dtype))
    assert torch.equal(edits.before.double(), before) and torch.equal(edits.after.double(), after)
    assert edits.maximum is None
    edited = (before != after).any(dim=1)
    assert edited.any() and not edited.all()
    assert same_bits(out[~edited], case.h[~edited])
    assert same_bits(run_on(backend, steer, **case.arguments()), out)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("dtypes", [DTYPES[0], BF16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy(backend: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype], normalize: str) -> None:
    case = with_strengths(make_case(kind, dtypes, normalize=normalize))
    assert oracle.margin(case.h, case.sae) > MARGIN, "rounding decides here: choose another seed"
    out = run_on(backend, steer, **case.arguments())
    assert_as_accurate(out, exact(case, oracle.plain_dtype(case.h, case.sae))[0].to(out.dtype), exact(case)[0])


@pytest.mark.parametrize(
    ("signs", "strengths", "after"),
    [
        ([ABLATE, ABLATE, ABLATE], [0.5, INF, 1], [0.5, 0, 0]),
        ([AUGMENT, AUGMENT, AUGMENT], [0.5, -9, 1], [1.5, 0, 0]),
        ([CLAMP, CLAMP, CLAMP], [0.5, -9, 1], [0.5, -9, 0]),
        ([AUGMENT_ALWAYS] * 3, [0.5, -9, 1], [1.5, -5, 1]),
        ([CLAMP_ALWAYS] * 3, [0.5, -9, 1], [0.5, -9, 1]),
        ([0, CLAMP, AUGMENT_ALWAYS], [0, 0, 1], [0, 0, 1]),
    ],
)
@pytest.mark.parametrize("k", [0, 2])
def test_worked_example(backend: str, signs: list[int], strengths: list[float], after: list[float], k: int) -> None:
    """Latents of 1 and 4 are active, and one of -9 is not."""
    arguments = small([(1, 0), (4, 0), (-9, 0)], signs, k=k)
    arguments["plan"] = replace(arguments["plan"], strengths=torch.tensor([strengths], dtype=torch.float32))
    arguments["plan"].slots[0, torch.tensor(signs) == 0] = -1
    out, edits = run_on(backend, steer, **arguments, record=True)
    assert edits.after.tolist() == [after]
    moved = [a - f if sign else 0 for f, a, sign in zip([1, 4, 0], after, signs, strict=True)]
    assert out.tolist() == [[h + change for h, change in zip([1, 4, -9], moved, strict=True)]]


def test_only_ranks_of_a_top_k_sae_read_the_encoder(backend: str) -> None:
    for kind, sign, record, path in (
        ("jumprelu", AUGMENT, True, "settled"),
        ("topk", AUGMENT, False, "streamed"),
        ("topk", CLAMP_ALWAYS, False, "streamed"),
        ("topk", AUGMENT_ALWAYS, False, "settled"),
        ("topk", AUGMENT_ALWAYS, True, "streamed"),
    ):
        case = make_case(kind, BF16, n=1, integers=True, k=60)
        case.rows.fill_(0)
        slots = torch.arange(23, dtype=torch.int32)[None].expand(N_PROMPTS, -1).contiguous()
        plan = SteeringPlan(slots, torch.full_like(slots, sign, dtype=torch.int8), torch.ones(slots.shape))
        paths = torch.zeros(6, dtype=torch.int64)
        steer(**replace(case, plan=plan).arguments(paths=paths, record=record, backend=backend))
        counts = dict(zip((*PATHS, "read"), paths.tolist(), strict=True))
        assert counts[path] == 1 and sum(paths[:5]) == 1, (kind, sign, record, counts)
        assert counts["read"] == (len(case.sae.encoder_rows) if path == "streamed" else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [False, True])
def test_in_place_is_steer_of_the_sum(backend: str, kind: str, residual: bool) -> None:
    case = with_strengths(make_case(kind, BF16))
    other = torch.randn(case.h.shape, generator=torch.Generator().manual_seed(3)).bfloat16() if residual else None
    total = case.h if other is None else case.h + other
    wanted = steer(**replace(case, h=total).arguments(backend=backend))
    h, rest = case.h.clone(), None if other is None else other.clone()
    steer_(**replace(case, h=h).arguments(residual=rest, backend=backend))
    edited = (wanted != total).any(dim=1)
    assert edited.any() and not edited.all()
    assert same_bits(h[edited], wanted[edited]) and same_bits(h[~edited], case.h[~edited])
    if rest is not None and other is not None:
        assert not rest[edited].any() and same_bits(rest[~edited], other[~edited])


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_gates_and_screens_change_nothing_else(backend: str, kind: str) -> None:
    case = with_strengths(make_case(kind, BF16))
    wanted = exact(case)[0]
    positions, start = torch.arange(len(case.h)), torch.full((N_PROMPTS,), 4)
    stream = EncoderStream.of(case.sae, hot=torch.arange(9), screen="int5")
    out = run_on(backend, steer, **case.arguments(positions=positions, start=start, stream=stream))
    assert same_bits(out[:4], case.h[:4])
    assert same_bits(out[4:], run_on(backend, steer, **case.arguments())[4:])
    assert (out[4:] != case.h[4:]).any() and (wanted[:4] != case.h[:4]).any()


def test_rows_that_are_not_finite_stay(backend: str) -> None:
    case = with_strengths(make_case("relu", BF16))
    case.plan.signs[case.plan.slots >= 0] = CLAMP_ALWAYS
    case.h[:, 2] = float("nan")
    paths = torch.zeros(6, dtype=torch.int64)
    assert same_bits(steer(**case.arguments(paths=paths, backend=backend)), case.h)
    assert paths.tolist() == [2, 6, 0, 0, 0, 0]


def test_backends_and_batches_agree() -> None:
    case = with_strengths(make_case("jumprelu", BF16, n=40))
    whole = steer(**case.arguments(backend="triton"))
    for n in (0, 1, 39):
        one = replace(case, h=case.h[n : n + 1], rows=case.rows[n : n + 1])
        assert same_bits(steer(**one.arguments(backend="triton")), whole[n : n + 1])


@pytest.mark.parametrize("in_place", [False, True])
def test_contract_with_torch(in_place: bool) -> None:
    arguments = with_strengths(make_case("topk", BF16, integers=True), integers=True).arguments()
    function = steer_ if in_place else steer
    call = recorded(function, **copy.deepcopy(arguments)).call
    assert call is not None
    torch.library.opcheck(*call)
    expected, compiled = copy.deepcopy(arguments), copy.deepcopy(arguments)
    torch._dynamo.reset()
    result = torch.compile(lambda: function(**compiled), fullgraph=True)()
    wanted = function(**expected)
    pairs = zip(tensors([result, compiled]), tensors([wanted, expected]), strict=True)
    assert all(same_bits(*pair) for pair in pairs)


def test_refusals() -> None:
    case = with_strengths(make_case("jumprelu", BF16))
    plan = case.plan
    for strengths, said in (
        (torch.zeros(N_PROMPTS, N_SLOTS + 1), "strengths"),
        (torch.zeros(N_PROMPTS, N_SLOTS, dtype=torch.float64), "strengths"),
    ):
        with pytest.raises(InputError, match=said):
            SteeringPlan(plan.slots, plan.signs, strengths)
    with pytest.raises(BackendError, match="cuda cannot run steer"):
        steer(**case.arguments(backend="cuda"))
