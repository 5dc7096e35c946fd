from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dspa_kernels import (
    EncoderStream,
    InputError,
    MapWeights,
    SAEWeights,
    SteeringPlan,
    fsrl_residual,
    sparse_decode,
    sparse_encode,
)
from dspa_kernels.testing import KINDS, random_sae
from dspa_kernels.weights import NORMALIZATIONS
from tests.kernels.cases import D_IN as CASE_D_IN
from tests.kernels.cases import D_SAE as CASE_D_SAE
from tests.kernels.cases import DTYPES, residual

D_IN, D_SAE, C = 5, 12, 3
SAE = random_sae("jumprelu", D_IN, D_SAE)
COLUMNS, VALUES = torch.tensor([1, 4, 11]), torch.arange(12.0).reshape(4, C)
CDMAP = MapWeights.gather(COLUMNS, VALUES, SAE)
PLAN = SteeringPlan(
    slots=torch.tensor([[2, -1], [0, 1]], dtype=torch.int32),
    signs=torch.tensor([[1, 0], [-1, 1]], dtype=torch.int8),
)


def remade(weights: Any, change: dict[str, Any]) -> Any:
    arguments = {field.name: getattr(weights, field.name) for field in fields(weights)}
    return type(weights)(**(arguments | change))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sae(dtype: torch.dtype) -> None:
    sae = random_sae("topk", D_IN, D_SAE, dtype=dtype, k=4)
    assert (sae.d_in, sae.d_sae, sae.k, sae.normalize) == (D_IN, D_SAE, 4, "none")
    assert sae.encoder_rows.dtype == sae.W_dec.dtype == dtype
    assert sae.b_enc.dtype == sae.threshold.dtype == torch.promote_types(dtype, torch.float32)
    assert list(sae.encoder()) == ["encoder_rows", "b_enc", "threshold", "k", "normalize"]


def test_gather_takes_the_rows_of_the_sae() -> None:
    assert CDMAP.columns.tolist() == [1, 4, 11] and CDMAP.columns.dtype == torch.int32
    assert torch.equal(CDMAP.values, VALUES) and CDMAP.values.dtype == torch.float32
    for name in ("encoder_rows", "b_enc", "threshold", "W_dec"):
        assert torch.equal(getattr(CDMAP, name), getattr(SAE, name)[COLUMNS])


def test_gather_of_no_columns() -> None:
    empty = MapWeights.gather(COLUMNS[:0], VALUES[:, :0], SAE)
    assert empty.columns.shape == (0,) and empty.encoder_rows.shape == empty.W_dec.shape == (0, D_IN)


def test_plan_names_latents() -> None:
    latents = PLAN.latents(CDMAP.columns)
    assert latents.tolist() == [[11, -1], [1, 4]] and latents.dtype == torch.int32
    nothing = SteeringPlan(torch.full((2, 2), -1, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int8))
    assert nothing.latents(CDMAP.columns[:0]).tolist() == [[-1, -1], [-1, -1]]


@pytest.mark.parametrize("weights", [SAE, CDMAP, PLAN], ids=lambda weights: type(weights).__name__)
def test_to_moves_every_tensor_and_nothing_changes(weights: Any) -> None:
    moved = weights.to("meta")
    for field in fields(weights):
        before, after = getattr(weights, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            assert after.device.type == "meta" and (after.shape, after.dtype) == (before.shape, before.dtype)
        else:
            assert before == after
    with pytest.raises(FrozenInstanceError):
        setattr(weights, fields(weights)[0].name, None)


def dense(h: torch.Tensor, sae: SAEWeights) -> torch.Tensor:
    """The latents that `sparse_encode` returns, in their places."""
    latents = sparse_encode(h, sae, capacity=sae.d_sae, backend="reference")
    f = torch.zeros(len(h), sae.d_sae + 1, dtype=latents.values.dtype)
    return f.scatter_(1, latents.indices.long() % f.shape[1], latents.values)[:, :-1]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_those_of_the_ops(kind: str, normalize: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Bit for bit, ties at the edge of the top k included, whatever the leading dimensions are."""
    h_dtype, W_dtype = dtypes
    integers = normalize == "none"
    sae = random_sae(kind, CASE_D_IN, CASE_D_SAE, dtype=W_dtype, integers=integers, normalize=normalize)
    h = residual(6, h_dtype, integers=integers)
    f = sae.latents(h)
    assert f.dtype == torch.promote_types(torch.promote_types(h_dtype, W_dtype), torch.float32) and f.any()
    assert torch.equal(f, dense(h, sae))
    assert torch.equal(sae.latents(h.view(2, 3, CASE_D_IN)), f.view(2, 3, CASE_D_SAE))
    assert sae.latents(h[:0]).shape == (0, CASE_D_SAE) and sae.latents(h[0]).shape == (CASE_D_SAE,)


def test_latents_next_to_a_nan_are_those_of_the_ops() -> None:
    """An infinite residual times a weight of 0 is NaN, times any other infinite: then the top k is full of ties."""
    sae = random_sae("topk", D_IN, D_SAE, k=4)
    rows = sae.encoder_rows.clone()
    rows[:2, 3], rows[2:, 3] = 0, 1
    sae = SAEWeights(rows, sae.b_enc, sae.threshold, sae.W_dec, k=4)
    h = torch.zeros(1, D_IN)
    h[0, 3] = torch.inf
    latents = sparse_encode(h, sae, capacity=4, backend="reference")
    assert sae.latents(h)[0].isposinf().nonzero().flatten().tolist() == latents.indices[0].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_normalise_returns_what_it_removed(normalize: str) -> None:
    sae = random_sae("relu", CASE_D_IN, CASE_D_SAE, dtype=torch.float64, normalize=normalize)
    h = residual(6, torch.float64).view(2, 3, CASE_D_IN)
    normalised = sae.normalise(h)
    assert normalised.mean.shape == normalised.scale.shape == (2, 3, 1)
    # SAELens adds 1e-5 to the standard deviation by which it divides, and not to that by which it multiplies.
    scale = normalised.scale + 1e-5 * (normalize == "layer_norm")
    torch.testing.assert_close(normalised.rows * scale + normalised.mean, h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_differentiable(kind: str, normalize: str) -> None:
    sae = random_sae(kind, D_IN, D_SAE, dtype=torch.float64, normalize=normalize)
    h = torch.randn(3, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    assert torch.autograd.gradcheck(sae.latents, (h,)) and sae.latents(h).any()


@pytest.mark.parametrize("method", ["latents", "normalise"])
@pytest.mark.parametrize("shape", [(2, D_IN + 1), (1,), ()])
def test_rows_of_another_width_are_refused(method: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=rf"`h` is of shape .*; accepted: shape \[(.*, )?{D_IN}\]") as error:
        getattr(SAE, method)(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)


class Operators(TorchDispatchMode):
    """Records the name of each operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_weights_are_a_value() -> None:
    """Making, replacing and moving them, and their default stream, allocates nothing."""
    with Operators() as operators:
        sae = SAEWeights(**{field.name: getattr(SAE, field.name) for field in fields(SAE)})
        moved = replace(sae, k=3).to("cpu")
        stream = sae.stream
    assert operators.names == []
    assert stream.encoder_rows is sae.encoder_rows and (stream.k, moved.stream.k) == (0, 3)


ROWS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"b_enc": torch.zeros(99)}, ("`b_enc`", "[99]")),
    ({"threshold": torch.zeros(1)}, ("`threshold`", "[1]")),
    ({"W_dec": torch.zeros(99, D_IN)}, ("`W_dec`", "[99, 5]")),
    ({"W_dec": torch.zeros(2, D_IN).T}, ("`W_dec`", "[5, 2]")),
]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        *ROWS,
        ({"encoder_rows": torch.zeros(D_SAE)}, ("`encoder_rows`", "[12]", "[d_sae, d_in]")),
        (
            {"encoder_rows": torch.zeros(D_SAE, D_IN, dtype=torch.int8)},
            ("`encoder_rows`", "torch.int8", "torch.bfloat16"),
        ),
        (
            {"encoder_rows": torch.zeros(D_IN, D_SAE).T},
            ("`encoder_rows`", "not contiguous", "encoder_rows.contiguous()"),
        ),
        ({"W_dec": torch.zeros(D_IN, D_SAE).T}, ("`W_dec`", "not contiguous", "W_dec.contiguous()")),
        ({"b_enc": torch.zeros(D_SAE, 2)[:, 0]}, ("`b_enc`", "not contiguous", "[2]", "b_enc.contiguous()")),
        ({"threshold": torch.zeros(1).expand(D_SAE)}, ("`threshold`", "not contiguous", "[0]")),
        ({"W_dec": SAE.W_dec.bfloat16()}, ("`W_dec`", "torch.bfloat16", "torch.float32", "W_dec.to(")),
        ({"b_enc": SAE.b_enc.bfloat16()}, ("`b_enc`", "torch.bfloat16", "torch.float32")),
        ({"threshold": SAE.threshold.half()}, ("`threshold`", "torch.float16", "torch.float32")),
        ({"b_enc": SAE.b_enc.to("meta")}, ("`b_enc`", "meta", "cpu", "`encoder_rows`")),
        ({"threshold": SAE.threshold.to("meta")}, ("`threshold`", "meta", "cpu", "`encoder_rows`")),
        ({"W_dec": SAE.W_dec.to("meta")}, ("`W_dec`", "meta", "cpu", "`encoder_rows`")),
        ({"k": -1}, ("`k`", "-1", "from 0 to 12, d_sae")),
        ({"k": 13}, ("`k`", "13", "from 0 to 12, d_sae")),
        ({"normalize": "layernorm"}, ("`normalize`", "'layernorm'", "none, layer_norm, constant_norm_rescale")),
    ],
)
def test_sae_errors(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        remade(SAE, change)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        *ROWS,
        ({"columns": CDMAP.columns[None]}, ("`columns`", "[1, 3]", "[C]")),
        ({"columns": CDMAP.columns.long()}, ("`columns`", "torch.int64", "torch.int32")),
        ({"columns": CDMAP.columns.repeat_interleave(2)[::2]}, ("`columns`", "not contiguous", "columns.contiguous()")),
        ({"columns": CDMAP.columns.to("meta")}, ("`columns`", "meta", "cpu", "`encoder_rows`")),
        ({"values": VALUES[:, 1:]}, ("`values`", "[4, 2]", "[d_sae_in, 3]")),
        ({"values": VALUES.double()}, ("`values`", "torch.float64", "torch.float32")),
        ({"values": VALUES.to("meta")}, ("`values`", "meta", "cpu", "`encoder_rows`")),
        ({"encoder_rows": SAE.encoder_rows}, ("`encoder_rows`", "[12, 5]", "[3, d_in]")),
        ({"encoder_rows": torch.zeros(D_IN, C).T}, ("`encoder_rows`", "not contiguous")),
    ],
)
def test_map_errors(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        remade(CDMAP, change)
    assert all(part in str(error.value) for part in parts), error.value


def test_the_mean_of_a_screen_may_have_any_layout() -> None:
    stream = EncoderStream.of(SAE, screen="int5", mean=torch.arange(2.0 * D_IN)[::2])
    assert stream.screen_mean is not None and stream.screen_mean.is_contiguous()
    assert stream.screen_mean.tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("columns", [[4, 1, 11], [1, 1, 4], [-1, 4, 11], [1, 4, 12]], ids=str)
def test_gather_refuses_columns(columns: list[int]) -> None:
    with pytest.raises(InputError, match="strictly increasing") as error:
        MapWeights.gather(torch.tensor(columns), VALUES, SAE)
    assert str(columns) in str(error.value) and "d_sae = 12" in str(error.value)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"slots": PLAN.slots[0]}, ("`slots`", "[2]", "[B, S]")),
        ({"slots": PLAN.slots.long()}, ("`slots`", "torch.int64", "torch.int32")),
        ({"signs": PLAN.signs[:1]}, ("`signs`", "[1, 2]", "[2, 2]")),
        ({"signs": PLAN.signs.int()}, ("`signs`", "torch.int32", "torch.int8")),
        ({"signs": PLAN.signs.to("meta")}, ("`signs`", "meta", "cpu", "`slots`")),
    ],
)
def test_plan_errors(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        remade(PLAN, change)
    assert all(part in str(error.value) for part in parts), error.value


def test_ops_that_steer_refuse_a_transcoder() -> None:
    """It decodes to 5 dimensions, and reads 8. Ops that encode or decode take it."""
    sae = random_sae("jumprelu", 8, 16)
    transcoder = replace(sae, W_dec=torch.randn(16, 5))
    assert (transcoder.d_in, transcoder.d_out) == (8, 5)
    h = torch.randn(3, 8)
    assert sparse_decode(sparse_encode(h, transcoder, capacity=16), transcoder.W_dec).shape == (3, 5)
    with pytest.raises(InputError, match=r"`W_dec` is of shape \[2, 5\]; accepted: shape \[2, 8\]"):
        MapWeights.gather(torch.tensor([1, 4]), torch.zeros(16, 2), transcoder)
    with pytest.raises(InputError, match=r"`sae.W_dec` is of shape \[16, 5\].*A transcoder does not change the rows"):
        fsrl_residual(h, transcoder, torch.zeros(16, 8), torch.zeros(16), torch.ones(16))
