"""`fsrl_residual`, forward and backward, against a dense formulation of its definition under plain autograd."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dspa_kernels import InputError, SAEWeights, formulas, fsrl_residual
from dspa_kernels.ops.fsrl_residual import triton_impl
from dspa_kernels.testing import KINDS, assert_as_accurate, random_sae, run_on, same_bits

from ..rounding import rounding
from . import oracle
from .cases import D_IN, D_SAE, ROUNDINGS, integer_tensor

ACTIVATIONS = ("soft_threshold", "relu", "jumprelu")
DTYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16, torch.float16),
    (torch.float64, torch.float64, torch.float64),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
]


@dataclass(frozen=True)
class Case:
    """Arguments of `fsrl_residual`, by name, and the gradients that come back to its results."""

    h: Tensor
    sae: SAEWeights
    W_a: Tensor
    b_a: Tensor
    threshold: Tensor | None
    activation: str
    grad: Tensor
    grad_l1: Tensor
    bandwidth: float = 2.0
    mask: Tensor | None = None
    rows: Tensor | None = None
    fraction: float = 1.0

    def arguments(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("grad")}

    def in_dtype(self, dtype: torch.dtype) -> Case:
        """The same values, in another dtype throughout."""
        sae = replace(
            self.sae, **{n: getattr(self.sae, n).to(dtype) for n in ("encoder_rows", "b_enc", "threshold", "W_dec")}
        )
        names = ("h", "W_a", "b_a", "grad", "grad_l1", "threshold")
        moved = {name: getattr(self, name).to(dtype) for name in names if getattr(self, name) is not None}
        return replace(self, sae=sae, **moved)


def make_case(
    activation: str,
    kind: str = "jumprelu",
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = DTYPES[0],
    *,
    n: int = 6,
    normalize: str = "none",
    integers: bool = False,
    seed: int = 0,
    **others: Any,
) -> Case:
    h_dtype, W_dtype, A_dtype = dtypes
    g = torch.Generator().manual_seed(seed)
    full = torch.promote_types(A_dtype, torch.float32)
    sae = random_sae(kind, D_IN, D_SAE, dtype=W_dtype, normalize=normalize, integers=integers, seed=seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

    h, W_a, b_a, grad, grad_l1 = draw(n, D_IN), draw(D_SAE, D_IN, scale=0.2), draw(D_SAE), draw(n, D_IN), draw(n)
    threshold = torch.rand(D_SAE, generator=g, dtype=torch.float64)
    if integers:
        shapes = (h, W_a, b_a, grad, grad_l1)
        h, W_a, b_a, grad, grad_l1 = (integer_tensor(-1, 2, tuple(x.shape), seed + i) for i, x in enumerate(shapes))
        threshold = integer_tensor(0, 4, (D_SAE,), seed)
    return Case(
        h=h.to(h_dtype),
        sae=sae,
        W_a=W_a.to(A_dtype),
        b_a=b_a.to(full),
        threshold=None if activation == "relu" else threshold.to(full),
        activation=activation,
        grad=grad.to(h_dtype),
        grad_l1=grad_l1.to(torch.promote_types(torch.promote_types(h_dtype, W_dtype), full)),
        **others,
    )


class Jump(torch.autograd.Function):
    """u where u > theta, with the rectangle's estimate for theta."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(u, theta)
        ctx.bandwidth = bandwidth
        return u * (u > theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        u, theta = ctx.saved_tensors
        near = ((u - theta) / ctx.bandwidth).abs() <= 0.5
        return grad * (u > theta), (-theta / ctx.bandwidth * near * grad).sum(dim=0), None


def dense(case: Case, stored: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Decode the modified latents, and add what the SAE's own reconstruction misses.

    With `stored`, every dense intermediate is rounded to it, as if it were written to memory.
    """

    def kept(x: Tensor) -> Tensor:
        return x if stored is None else x.to(stored).to(x.dtype)

    h, sae = case.h, case.sae
    x, scale = h, torch.ones((), dtype=h.dtype)
    if sae.normalize == "layer_norm":
        x = h - h.mean(dim=1, keepdim=True)
        scale = x.std(dim=1, keepdim=True)
        x = x / (scale + 1e-5)
    if sae.normalize == "constant_norm_rescale":
        scale = (h * h).sum(dim=1, keepdim=True).sqrt() / D_IN**0.5
        x = h / scale
    pre = x @ sae.W_enc + sae.b_enc
    active = torch.zeros_like(pre, dtype=torch.bool)
    for n, latents in enumerate(oracle.active(row, sae) for row in oracle.array(pre)):
        active[n, list(latents)] = True
    f = kept(pre * active)
    u = kept(h @ case.W_a.T + case.b_a)
    if case.threshold is None:
        v = torch.relu(u)
    elif case.activation == "jumprelu":
        v = Jump.apply(u, case.threshold, case.bandwidth)
    else:
        v = torch.relu(u - case.threshold) - torch.relu(-u - case.threshold)
    if case.mask is not None:
        v = v * case.mask
    for row, sizes in enumerate(oracle.array(v.abs())) if case.fraction < 1 else ():
        ranked = [j for j in sorted(range(len(sizes)), key=lambda j, s=sizes: (-s[j], j)) if sizes[j] > 0]
        top = torch.zeros(D_SAE, dtype=h.dtype)
        top[ranked[: int(-(-len(ranked) * case.fraction // 1))]] = 1
        v = torch.cat([v[:row], v[row : row + 1] * top, v[row + 1 :]])
    v = kept(v)
    missed = h - kept(scale * (f @ sae.W_dec))
    return kept(scale * (kept(torch.relu(f + v)) @ sae.W_dec)) + missed, v.abs().sum(dim=1), (v != 0).sum(dim=1)


@pytest.fixture(params=[False, True], ids=["step", "blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as those of a decoding step, in one launch, or as those of a training batch, in blocks of latents."""
    if request.param:
        monkeypatch.setattr(triton_impl, "MAX_STEP", 0)
        monkeypatch.setattr(triton_impl, "MAX_ELEMENTS", 32 * 6)


LEAVES = ("h", "W_a", "b_a", "threshold")


def with_gradients(case: Case, function: Any) -> dict[str, Tensor]:
    """Results of `function`, and the gradients of all that has one."""
    case = replace(case, **{n: getattr(case, n).detach().clone() for n in LEAVES if getattr(case, n) is not None})
    leaves = {name: getattr(case, name).requires_grad_() for name in LEAVES if getattr(case, name) is not None}
    out, l1, l0 = function(case)
    gradients = torch.autograd.grad((out, l1), tuple(leaves.values()), (case.grad, case.grad_l1))
    actual = {"out": out.detach(), "l1": l1.detach(), "l0": l0}
    return actual | {f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}


def apart(result: Tensor) -> float:
    """How far two computations of results or gradients may be apart: they add up to D_SAE terms, forth and back."""
    return rounding(2 * ROUNDINGS, D_SAE**0.5 * float(result.abs().max()))


def ours(case: Case, backend: str) -> dict[str, Tensor]:
    device = "cuda" if backend != "reference" and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
    on_device = {n: v.to(device) for n, v in vars(case).items() if isinstance(v, (Tensor, SAEWeights))}
    actual = with_gradients(replace(case, **on_device), lambda c: fsrl_residual(**c.arguments(), backend=backend))
    return {name: value.cpu() for name, value in actual.items()}


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_exact_on_integers(backend: str, activation: str, kind: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Sums of small integers are exact in any order: results and gradients are equal, ties and all."""
    case = make_case(activation, kind, dtypes, integers=True)
    actual, wanted = ours(case, backend), with_gradients(case.in_dtype(torch.float64), dense)
    for name, value in actual.items():
        assert torch.equal(value, wanted[name].to(value.dtype)), name
    assert 0 < int(actual["l0"].sum()) < actual["l0"].numel() * D_SAE and bool((actual["out"] != case.h).any())


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    ("activation", "kind"), [(name, "jumprelu") for name in ACTIVATIONS] + [(ACTIVATIONS[0], "topk")]
)
@pytest.mark.usefixtures("blocks")
def test_some_rows(backend: str, activation: str, kind: str, dtypes: tuple[torch.dtype, ...], fraction: float) -> None:
    """Those in `rows` as by themselves. Any other keeps its bits, and moves no other."""
    rows = torch.tensor([False, True, False, True, True, False])
    case = make_case(activation, kind, dtypes, integers=True, fraction=fraction, rows=rows)
    case = replace(case, h=torch.where(case.h == 0, -0.0, case.h))
    out, l1, l0 = run_on(backend, fsrl_residual, **case.arguments())
    wanted = dense(replace(case, h=case.h[rows]).in_dtype(torch.float64))
    assert wanted[2].sum() > 0
    for ours, value in zip((out, l1, l0), wanted, strict=True):
        assert torch.equal(ours[rows], value.to(ours.dtype))
    assert same_bits(out[~rows], case.h[~rows]) and not l1[~rows].any() and not l0[~rows].any()


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_some_normalised_rows(backend: str, normalize: str) -> None:
    rows = torch.tensor([False, True, False, True, True, False])
    case = make_case("soft_threshold", normalize=normalize)
    case = replace(case, h=torch.where(case.h.abs() < 0.3, -0.0, case.h))
    some = run_on(backend, fsrl_residual, **replace(case, rows=rows).arguments())
    every = run_on(backend, fsrl_residual, **case.arguments())
    assert same_bits(some[0][~rows], case.h[~rows])
    for ours, other in zip(some, every, strict=True):
        torch.testing.assert_close(ours[rows], other[rows])


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.usefixtures("blocks")
def test_rows_that_are_not_moved_may_be_anything(backend: str, normalize: str) -> None:
    rows = torch.tensor([False, True, False, True, True, False])
    case = make_case("soft_threshold", normalize=normalize, rows=rows)
    clean, *clean_sums = run_on(backend, fsrl_residual, **case.arguments())
    case.h[0, 3], case.h[2, 5], case.h[5] = float("nan"), float("inf"), 0
    out, l1, l0 = run_on(backend, fsrl_residual, **case.arguments())
    assert same_bits(out[~rows], case.h[~rows]) and same_bits(out[rows], clean[rows])
    assert same_bits(l1, clean_sums[0]) and same_bits(l0, clean_sums[1])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="loads are counted in Triton's interpreter")
@pytest.mark.parametrize(("n", "few"), [(6, True), (40, False)])
def test_tiles_of_rows_that_are_not_moved_read_no_weights(n: int, few: bool) -> None:
    case = make_case("soft_threshold", n=n)
    read = []
    for rows in (torch.zeros(n, dtype=torch.bool), torch.arange(n) < 3, None):
        with loads() as meter:
            fsrl_residual(**case.arguments() | {"rows": rows}, backend="triton")
        read.append([meter.of(W) for W in (case.W_a, case.sae.encoder_rows, case.sae.W_dec)])
    assert read[0] == [0, 0, 0]
    assert read[1][0] == case.W_a.nbytes and read[1][1] > 0 and (read[1][2] > 0) == few
    assert read[2][0] == case.W_a.nbytes and read[2][1] > read[1][1]


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("blocks")
def test_accuracy(backend: str, activation: str, normalize: str) -> None:
    """As near to fp64 as the same formula in fp32."""
    case = make_case(activation, normalize=normalize)
    actual, plain, exact = ours(case, backend), with_gradients(case, dense), with_gradients(case.in_dtype(FP64), dense)
    for name in actual:
        assert_as_accurate(actual[name], plain[name].to(actual[name].dtype), exact[name])


FP64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("blocks")
def test_accuracy_in_sixteen_bits(backend: str, dtype: torch.dtype) -> None:
    case = make_case("soft_threshold", dtypes=(dtype, dtype, dtype))
    actual = ours(case, backend)
    plain = with_gradients(case.in_dtype(torch.float32), lambda c: dense(c, stored=dtype))
    exact = with_gradients(case.in_dtype(FP64), dense)
    for name in ("out", "d_h", "d_W_a"):
        assert actual[name].dtype == dtype
        assert_as_accurate(actual[name], plain[name].to(actual[name].dtype), exact[name])
    for name in ("l1", "d_b_a", "d_threshold"):
        assert actual[name].dtype == torch.float32
        assert_as_accurate(actual[name], plain[name].to(actual[name].dtype), exact[name])


@pytest.mark.parametrize(
    "others",
    [
        {"mask": torch.arange(D_SAE) % 3 > 0},
        {"mask": torch.zeros(D_SAE, dtype=torch.bool)},
        {"fraction": 0.25},
        {"fraction": 0.0},
        {"mask": torch.arange(D_SAE) % 3 > 0, "fraction": 0.1},
    ],
    ids=["mask", "nothing", "quarter", "none kept", "both"],
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("blocks")
def test_masks_and_fractions(backend: str, activation: str, others: dict[str, Any]) -> None:
    """Integers make ties of |v| at the edge of a fraction; the smaller index is kept."""
    case = make_case(activation, "topk", integers=True, n=4, **others)
    actual, wanted = ours(case, backend), with_gradients(case.in_dtype(FP64), dense)
    for name, value in actual.items():
        assert torch.equal(value, wanted[name].to(value.dtype)), name
    if others.get("fraction") == 0 or not others.get("mask", torch.ones(1)).any():
        assert same_bits(actual["out"], case.h) and not actual["l0"].any() and not actual["d_W_a"].any()


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@pytest.mark.usefixtures("blocks")
def test_what_is_not_positive_is_not_active(backend: str, kind: str) -> None:
    """Where a threshold is below 0, and where fewer than k latents are above it."""
    case = make_case("soft_threshold", kind, integers=True, n=4)
    sae = replace(case.sae, threshold=case.sae.threshold - 8, k=60 if kind == "topk" else 0)
    case = replace(case, sae=sae)
    actual, wanted = ours(case, backend), with_gradients(case.in_dtype(FP64), dense)
    for name, value in actual.items():
        assert torch.equal(value, wanted[name].to(value.dtype)), name


@pytest.mark.parametrize("n", [0, 1, 64, 65, 130])
def test_numbers_of_rows(backend: str, n: int) -> None:
    case = make_case("soft_threshold", integers=True, n=n)
    actual, wanted = ours(case, backend), with_gradients(case.in_dtype(FP64), dense)
    for name, value in actual.items():
        assert value.shape == wanted[name].shape and torch.equal(value, wanted[name].to(value.dtype)), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("blocks")
def test_an_adapter_of_zeros_changes_nothing(backend: str, activation: str) -> None:
    case = make_case(activation)
    zeros = replace(case, W_a=torch.zeros_like(case.W_a), b_a=torch.zeros_like(case.b_a))
    out, l1, l0 = run_on(backend, fsrl_residual, **zeros.arguments())
    assert same_bits(out, case.h) and not l1.any() and not l0.any()


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.usefixtures("blocks")
def test_accuracy_of_normalised_rows_in_sixteen_bits(backend: str, normalize: str) -> None:
    case = make_case("soft_threshold", dtypes=(torch.bfloat16,) * 3, normalize=normalize)
    actual = ours(case, backend)
    plain = with_gradients(case.in_dtype(torch.float32), lambda c: dense(c, stored=torch.bfloat16))
    exact = with_gradients(case.in_dtype(FP64), dense)
    # Three parts of the gradient of h are each rounded before autograd adds them up.
    for name in actual.keys() - {"d_h", "l0"}:
        assert_as_accurate(actual[name], plain[name].to(actual[name].dtype), exact[name])


@pytest.mark.usefixtures("blocks")
def test_ranks_are_those_of_normalised_rows(backend: str) -> None:
    case = make_case("soft_threshold", "topk", normalize="layer_norm")
    actual, plain, exact = ours(case, backend), with_gradients(case, dense), with_gradients(case.in_dtype(FP64), dense)
    for name in actual:
        assert_as_accurate(actual[name], plain[name].to(actual[name].dtype), exact[name])


@pytest.mark.usefixtures("blocks")
def test_the_change_of_normalised_rows_is_not_rounded_before_it_is_scaled(backend: str) -> None:
    case = make_case("soft_threshold", dtypes=(torch.bfloat16,) * 3)
    frozen = {name: getattr(case.sae, name) for name in ("encoder_rows", "b_enc", "k", "W_dec")}
    frozen["sae_threshold"] = case.sae.threshold
    adapter = {"W_a": case.W_a, "b_a": case.b_a, "threshold": case.threshold, "activation": case.activation}
    others = {"bandwidth": 1.0, "mask": None, "rows": None, "fraction": 1.0, "keep": False}

    def change(h: Tensor, *, backend: str, **operands: Any) -> Tensor:
        x = h.float()
        return torch.ops.dspa.fsrl_residual(h=h, x=x, **operands, backend=backend)[0]

    assert run_on(backend, change, h=case.h, **frozen, **adapter, **others).dtype == torch.float32


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("blocks")
def test_a_row_that_is_not_finite_spoils_no_other(backend: str, activation: str) -> None:
    """And shows in all that it gives, so that a training that went astray is seen to have."""
    case = make_case(activation, n=5)
    h = case.h.clone()
    h[1, 3], h[3, 4] = float("nan"), float("inf")
    actual = run_on(backend, fsrl_residual, **(case.arguments() | {"h": h}))
    for value, finite in zip(actual, run_on(backend, fsrl_residual, **case.arguments()), strict=True):
        assert torch.equal(value[::2], finite[::2])
    out, l1, _ = actual
    assert out[1].isnan().all() and l1[1].isnan()
    assert not out[3].isfinite().any() and not l1[3].isfinite()


@pytest.mark.usefixtures("blocks")
def test_a_row_of_which_nothing_is_moved_is_the_same_bits(backend: str) -> None:
    """Beside one of which something is, and with a -0.0, which a sum with 0 would change."""
    case = make_case("soft_threshold", n=3, dtypes=(torch.bfloat16,) * 3)
    h = case.h.clone()
    h[1] = -0.0
    out, _, l0 = run_on(backend, fsrl_residual, **(case.arguments() | {"h": h, "b_a": torch.zeros_like(case.b_a)}))
    assert int(l0[0]) and not int(l0[1]) and same_bits(out[1], h[1]) and not same_bits(out[0], h[0])


@pytest.mark.parametrize("level", [-1, 1])
def test_the_last_of_a_rank_is_active_however_it_was_rounded(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch that finds ranks may add up in another order than those that use them."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("compares with the reference on the CPU")
    case = make_case("soft_threshold", "topk")
    wanted = fsrl_residual(**case.arguments(), backend="triton")
    cutoffs = triton_impl._encoder_cutoffs
    offset = torch.tensor([[level], [0]], dtype=torch.int32)
    monkeypatch.setattr(triton_impl, "_encoder_cutoffs", lambda *arguments: cutoffs(*arguments) + offset)
    assert same_bits(fsrl_residual(**case.arguments(), backend="triton").h, wanted.h)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU has more programs than this")
@pytest.mark.parametrize("n", [1, 20, 64])
def test_more_programs_than_are_added_at_a_time(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And more chunks of columns than programs."""
    case = make_case("soft_threshold", integers=True, n=n)
    monkeypatch.setattr(triton_impl, "BLOCK_P", 2)
    monkeypatch.setattr(triton_impl, "BLOCK_D", 16)
    actual = fsrl_residual(**case.arguments(), backend="triton")
    for value, wanted in zip(actual, dense(case.in_dtype(FP64)), strict=True):
        assert torch.equal(value, wanted.to(value.dtype))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="looks into launches on the CPU")
@pytest.mark.parametrize(
    ("dtypes", "normalize", "multiply"),
    [
        ((torch.bfloat16, torch.bfloat16, torch.bfloat16), "none", 0),
        ((torch.bfloat16, torch.bfloat16, torch.bfloat16), "layer_norm", 1),
        ((torch.bfloat16, torch.float32, torch.bfloat16), "none", 2),
        ((torch.float16, torch.float16, torch.float16), "none", 2),
    ],
)
def test_launches_have_room_for_their_largest_product(
    dtypes: tuple[torch.dtype, ...], normalize: str, multiply: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 16-bit numbers that are too large in fp32 would not fit on a multiprocessor together."""
    asked = []
    parameters = triton_impl.launch_parameters
    monkeypatch.setattr(triton_impl, "launch_parameters", lambda *given: asked.append(given) or parameters(*given))
    fsrl_residual(**make_case("soft_threshold", dtypes=dtypes, normalize=normalize).arguments(), backend="triton")
    assert [(kernel, precision) for kernel, _, _, _, precision, _ in asked] == [("fsrl_step", multiply)]


@pytest.mark.parametrize("result", ["out", "l1"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_loss_of_one_result_alone(backend: str, activation: str, result: str) -> None:
    case = make_case(activation, integers=True, n=3)
    nothing = {"grad": torch.zeros_like(case.grad)} if result == "l1" else {"grad_l1": torch.zeros_like(case.grad_l1)}
    wanted = with_gradients(replace(case, **nothing).in_dtype(FP64), dense)["d_W_a"]
    W_a = case.W_a.clone().requires_grad_()
    actual = fsrl_residual(**(case.arguments() | {"W_a": W_a}), backend=backend)
    (actual.h * case.grad if result == "out" else actual.l1 * case.grad_l1).sum().backward()
    assert torch.equal(W_a.grad.double(), wanted)


def test_autocast_changes_nothing() -> None:
    case = make_case("soft_threshold", normalize="layer_norm")
    plain = with_gradients(case, lambda c: fsrl_residual(**c.arguments()))
    with torch.autocast("cpu", torch.bfloat16):
        actual = with_gradients(case, lambda c: fsrl_residual(**c.arguments()))
    for name, value in actual.items():
        assert same_bits(value, plain[name]), name


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("soft_threshold", "topk", integers=True, n=70, fraction=0.5)
    whole = ours(case, "reference")
    monkeypatch.setattr(formulas, "MAX_ELEMENTS", 30 * D_SAE)
    for name, value in ours(case, "reference").items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("others", [{}, {"mask": torch.arange(8) > 1}, {"fraction": 0.5}], ids=["", "mask", "fraction"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str, kind: str, others: dict[str, Any]) -> None:
    """Numerical gradients in fp64. A JumpReLU's thresholds have none but at jumps, which are kept out of reach."""
    g = torch.Generator().manual_seed(3)
    normalize = {"jumprelu": "none", "relu": "layer_norm", "topk": "constant_norm_rescale"}[kind]
    sae = random_sae(kind, 5, 8, dtype=FP64, normalize=normalize, k=3)
    h, W_a, b_a = (torch.randn(shape, generator=g, dtype=FP64).requires_grad_() for shape in ((3, 5), (8, 5), (8,)))
    threshold = None if activation == "relu" else torch.rand(8, generator=g, dtype=FP64).requires_grad_()

    def call(h: Tensor, W_a: Tensor, b_a: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor]:
        out, l1, l0 = fsrl_residual(h, sae, W_a, b_a, threshold, activation, bandwidth=1e-5, **others)
        assert l0.any()
        return out, l1

    assert torch.autograd.gradcheck(call, (h, W_a, b_a, threshold))


def test_what_needs_no_gradient_gets_none() -> None:
    case = make_case("soft_threshold")
    case.W_a.requires_grad_()
    out, l1, l0 = fsrl_residual(**case.arguments())
    assert not l0.requires_grad
    (out.sum() + l1.sum()).backward()
    assert case.W_a.grad is not None and case.h.grad is None and case.b_a.grad is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_byte_a_latent_is_kept_for_the_backward_and_nothing_else(activation: str) -> None:
    kept: list[Tensor] = []
    case = make_case(activation, n=200)
    case.W_a.requires_grad_()
    inputs = {
        tensor.data_ptr() for tensor in (*vars(case).values(), *vars(case.sae).values()) if isinstance(tensor, Tensor)
    }
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fsrl_residual(**case.arguments())
    added = [tensor for tensor in kept if tensor.data_ptr() not in inputs]
    assert [(tensor.shape, tensor.dtype) for tensor in added] == [((200, D_SAE), torch.uint8)]


def test_nothing_is_kept_without_gradients() -> None:
    class Outputs(TorchDispatchMode):
        results: tuple[Tensor, ...] = ()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = func(*args, **(kwargs or {}))
            if func is torch.ops.dspa.fsrl_residual.default:
                Outputs.results = results
            return results

    case = make_case("jumprelu")
    for requires_grad, grad, n_kept in ((False, True, 0), (True, False, 0), (True, True, case.h.shape[0] * D_SAE)):
        case.W_a.requires_grad_(requires_grad)
        with Outputs(), torch.set_grad_enabled(grad):
            fsrl_residual(**case.arguments())
        assert Outputs.results[3].numel() == n_kept


@pytest.mark.parametrize(("activation", "normalised"), [*((a, False) for a in ACTIVATIONS), ("soft_threshold", True)])
def test_opcheck_with_gradients(activation: str, normalised: bool) -> None:
    """Schema, fakes, and the registered autograd under AOT dispatch, with dynamic shapes; normalised rows are fp32."""
    case = make_case(activation, "topk", (torch.bfloat16,) * 3 if normalised else DTYPES[0], n=5)
    frozen = {name: getattr(case.sae, name) for name in ("encoder_rows", "b_enc", "k", "W_dec")}
    frozen["sae_threshold"] = case.sae.threshold
    adapter = {"threshold": case.threshold, "activation": activation, "bandwidth": 1.0, "mask": None, "fraction": 0.5}
    for name in ("h", "W_a", "b_a"):
        adapter[name] = getattr(case, name).requires_grad_()
    x = case.h.detach().float().requires_grad_() if normalised else None
    others = {"x": x, "rows": None, "keep": True, "backend": "reference"}
    torch.library.opcheck(torch.ops.dspa.fsrl_residual.default, (), frozen | adapter | others)


def test_compiled_forward_and_backward() -> None:
    torch._dynamo.reset()
    case = make_case("soft_threshold", normalize="layer_norm", n=9)

    def call(c: Case) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(fsrl_residual(**c.arguments()))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    actual, wanted = with_gradients(case, compiled), with_gradients(case, call)
    for name in actual:
        assert torch.allclose(actual[name], wanted[name], rtol=0, atol=apart(wanted[name])), name


@contextmanager
def loads() -> Iterator[Any]:
    from .test_steer_bytes import counted

    with counted() as meter:
        yield meter


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="loads are counted in Triton's interpreter")
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_step_reads_the_encoder_only_where_it_pushes_down(activation: str, n: int) -> None:
    """Latents 0 to 9 go up, 10 to 14 down, where 12 to 14 are inactive; the others stay."""
    case = make_case(activation, n=n)
    W_a, b_a = torch.zeros(D_SAE, D_IN), torch.zeros(D_SAE)
    b_a[:10], b_a[10:15] = 2, -2
    b_enc = torch.full((D_SAE,), -100.0)
    b_enc[10:12] = 100
    sae = replace(case.sae, b_enc=b_enc, threshold=torch.zeros(D_SAE))
    arguments = case.arguments() | {"sae": sae, "W_a": W_a, "b_a": b_a}
    row = D_IN * 4
    with loads() as meter:
        _, _, l0 = fsrl_residual(**arguments, backend="triton")
    down = 5 if activation == "soft_threshold" else 0
    changed = 12 if activation == "soft_threshold" else 10
    assert l0.tolist() == [10 + down] * n
    assert meter.of(sae.encoder_rows) == down * row
    assert meter.of(sae.W_dec) == changed * row
    assert meter.of(W_a) == D_SAE * row


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "launches"), [(1, 1), (16, 1), (17, 0)])
def test_programs_keep_sums_of_their_own_for_few_rows_only(
    monkeypatch: pytest.MonkeyPatch, n: int, launches: int
) -> None:
    step = mock.Mock(wraps=triton_impl._step)
    monkeypatch.setattr(triton_impl, "_step", step)
    case = make_case("soft_threshold", integers=True, n=n)
    out, _, _ = run_on("triton", fsrl_residual, **case.arguments())
    assert step.call_count == launches
    assert torch.equal(out, fsrl_residual(**case.arguments(), backend="reference").h)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(2, 3, D_IN)}, r"`h` is of shape \[2, 3, 19\]"),
        ({"h": torch.zeros(2, D_IN, dtype=torch.int32)}, "`h` is of dtype torch.int32"),
        ({"W_a": torch.zeros(D_IN, D_SAE)}, r"`W_a` is of shape \[19, 67\]; accepted: shape \[67, 19\]"),
        (
            {"b_a": torch.zeros(D_SAE, dtype=torch.bfloat16)},
            "`b_a` is of dtype torch.bfloat16; accepted: torch.float32",
        ),
        ({"threshold": None}, "`threshold` is None; accepted: None for relu"),
        ({"activation": "relu"}, "`threshold` is a tensor; accepted: None for relu"),
        ({"activation": "gelu"}, "`activation` is 'gelu'; accepted: soft_threshold, relu, jumprelu"),
        ({"mask": torch.ones(D_SAE)}, "`mask` is of dtype torch.float32; accepted: torch.bool"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"`mask` is of shape \[3\]"),
        ({"rows": torch.ones(6)}, "`rows` is of dtype torch.float32; accepted: torch.bool"),
        ({"rows": torch.ones(5, dtype=torch.bool)}, r"`rows` is of shape \[5\]; accepted: shape \[6\]"),
        ({"rows": torch.ones(6, dtype=torch.bool, device="meta")}, "`rows` is on meta; accepted: cpu"),
        (
            {"rows": torch.ones(6, dtype=torch.bool), "W_a": torch.zeros(D_SAE, D_IN, requires_grad=True)},
            "`rows` is a tensor; accepted: None where a gradient is needed",
        ),
        ({"fraction": 1.5}, "`fraction` is 1.5; accepted: 0"),
        ({"fraction": float("nan")}, "`fraction` is nan"),
        ({"bandwidth": 0.0}, "`bandwidth` is 0.0"),
        ({"bandwidth": float("inf")}, "`bandwidth` is inf"),
        ({"b_a": torch.zeros(D_SAE, dtype=torch.float64)}, "`b_a` is of dtype torch.float64; accepted: torch.float32"),
        ({"W_a": torch.zeros(D_SAE, D_IN, device="meta")}, "`W_a` is on meta; accepted: cpu"),
        ({"sae": random_sae("relu", D_IN, D_SAE).to("meta")}, "`sae` is on meta; accepted: cpu"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    case = make_case("soft_threshold")
    with pytest.raises(InputError, match=message):
        fsrl_residual(**(case.arguments() | change))


def test_a_backward_of_the_backward_is_refused() -> None:
    case = make_case("relu")
    case.W_a.requires_grad_()
    grad = case.grad.clone().requires_grad_()
    out, _, _ = fsrl_residual(**case.arguments())
    (d_W_a,) = torch.autograd.grad(out, case.W_a, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        d_W_a.sum().backward()


def test_views_are_as_good(backend: str) -> None:
    case = make_case("soft_threshold", integers=True)
    views = {"h": case.h.T.contiguous().T, "W_a": case.W_a.repeat_interleave(2, dim=1)[:, ::2]}
    for name, value in zip(
        ("out", "l1", "l0"), run_on(backend, fsrl_residual, **(case.arguments() | views)), strict=True
    ):
        assert torch.equal(value, ours(case, backend)[name]), name


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.usefixtures("blocks")
def test_gradients_of_views_are_as_good(backend: str, normalize: str) -> None:
    """Every operand strided, and gradients that come expanded, as those of sums do."""

    def strided(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=-1)[..., ::2]

    mask = torch.arange(D_SAE) % 3 > 0
    case = make_case("soft_threshold", normalize=normalize, mask=mask)
    first = {name: getattr(case, name)[:1] for name in ("grad", "grad_l1")}
    wanted = ours(replace(case, **{name: torch.cat([row] * len(case.h)) for name, row in first.items()}), backend)

    def call(c: Case) -> Any:
        names = ("W_a", "b_a", "threshold", "mask")
        views = {name: strided(getattr(c, name)) for name in names} | {"h": c.h.T.contiguous().T}
        return fsrl_residual(**(c.arguments() | views), backend=backend)

    device = "cpu" if backend == "reference" or os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    moved = {n: v.to(device) for n, v in vars(case).items() if isinstance(v, (Tensor, SAEWeights))}
    moved |= {name: moved[name][:1].expand(moved[name].shape) for name in first}
    actual = with_gradients(replace(case, **moved), call)
    for name, value in actual.items():
        assert torch.allclose(value.cpu(), wanted[name], rtol=0, atol=apart(wanted[name])), name


@pytest.mark.usefixtures("blocks")
def test_weights_of_sixteen_bits_round_no_fp32_residual(backend: str) -> None:
    case = make_case("soft_threshold", dtypes=(torch.float32, torch.bfloat16, torch.bfloat16))
    actual = ours(case, backend)
    plain, exact = with_gradients(case.in_dtype(torch.float32), dense), with_gradients(case.in_dtype(FP64), dense)
    for name in ("out", "l1", "d_h", "d_b_a", "d_threshold"):
        assert_as_accurate(actual[name], plain[name].to(actual[name].dtype), exact[name])


@pytest.mark.usefixtures("blocks")
def test_gradients_are_kept_in_the_dtype_of_the_adapter(backend: str) -> None:
    """A bf16 residual does not round what an fp32 adapter gets."""
    case = make_case("soft_threshold", dtypes=(torch.bfloat16, torch.bfloat16, torch.float32))
    actual = ours(case, backend)
    plain = with_gradients(case.in_dtype(torch.float32), dense)
    exact = with_gradients(case.in_dtype(FP64), dense)
    for name in ("l1", "d_W_a", "d_b_a", "d_threshold"):
        assert_as_accurate(actual[name], plain[name].to(actual[name].dtype), exact[name])


def test_an_unused_mock_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense formulation is not the reference under another name: a wrong reference fails the comparison."""
    from dspa_kernels.ops.fsrl_residual import reference

    case = make_case("soft_threshold", integers=True)
    with mock.patch.object(reference, "activate", lambda u, threshold, _: (u - threshold).clamp(min=0)):
        actual = ours(case, "reference")
    assert not torch.equal(actual["out"].double(), dense(case.in_dtype(FP64))[0])
