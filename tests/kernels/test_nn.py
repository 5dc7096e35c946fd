"""`FusedSAE` against the SAELens SAE whose place it takes."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dspa import FrozenSAE
from dspa_kernels import BackendError, InputError, SAEWeights, SparseLatents
from dspa_kernels.nn import FusedSAE
from dspa_kernels.testing import random_sae, same_bits

from ..fusing.saes import make_sae
from ..rounding import rounding
from .cases import ROUNDINGS
from .test_ops_contract import recorded

D_IN, D_SAE, K = 24, 96, 7
CLASSES = {"standard": "Standard", "jumprelu": "JumpReLU", "topk": "TopK"}
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")


def sae_lens_sae(arch: str, **cfg: Any) -> Any:
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: FusedSAE has nothing to compare with")
    cfg |= {"k": K} if arch == "topk" else {}
    sae = getattr(sae_lens, f"{CLASSES[arch]}SAE")(
        getattr(sae_lens, f"{CLASSES[arch]}SAEConfig")(d_in=D_IN, d_sae=D_SAE, **cfg)
    )
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) / D_IN**0.5)
        if arch == "jumprelu":
            sae.threshold.abs_()
    return sae


def fused(sae: Any, **options: Any) -> FusedSAE:
    return FusedSAE.from_sae_lens(sae, **options)


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.5 + 2 * torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(1))).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, n_terms: int) -> None:
    """Raise unless these are equal up to fp32 rounding, as sums of terms of either sign."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=rounding(ROUNDINGS, n_terms**0.5 * largest))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("arch", CLASSES)
def test_returns_what_sae_lens_returns(arch: str, normalize: str, backend: str) -> None:
    theirs = sae_lens_sae(arch, normalize_activations=normalize, apply_b_dec_to_input=True)
    ours = fused(theirs, backend=backend)
    x = rows(2, 3)
    with torch.no_grad():
        f = theirs.encode(x)
        recon, whole = theirs.decode(f), theirs(x)
    assert 0 < (f != 0).float().mean() < 0.7
    assert_close(ours.encode(x), f, D_IN)
    assert_close(ours.decode(f), recon, D_SAE)  # the rows encoded last
    assert_close(ours.decode(f, like=x), recon, D_SAE)
    assert_close(ours.decode(ours.encode_sparse(x, capacity=D_SAE)), recon, D_SAE)
    assert_close(ours(x), whole, D_SAE)
    assert (ours.encode(x).dtype, ours(x).dtype) == (f.dtype, whole.dtype)


@pytest.mark.parametrize("arch", CLASSES)
@pytest.mark.parametrize("shape", [(), (5,), (0,), (2, 0, 3), (2, 1, 2)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...], arch: str) -> None:
    theirs = sae_lens_sae(arch)
    ours = fused(theirs, capacity=D_SAE)
    x = rows(*shape)
    with torch.no_grad():
        assert_close(ours.encode(x), theirs.encode(x), D_IN)
        assert_close(ours(x), theirs(x), D_SAE)
    latents = ours.encode_sparse(x)
    assert latents.indices.shape == latents.values.shape == (*shape, D_SAE) and latents.counts.shape == shape
    assert ours.decode(latents).shape == x.shape


@pytest.mark.parametrize("arch", CLASSES)
def test_bf16(arch: str) -> None:
    """Inputs are rounded to the SAE's dtype, as theirs; they round pre-activations too."""
    theirs = sae_lens_sae(arch)
    ours = fused(theirs).to(torch.bfloat16)
    theirs.to(torch.bfloat16)
    x = rows(50)
    with torch.no_grad():
        f, whole = theirs.encode(x), theirs(x)
    assert ours.encode(x).dtype == ours(x).dtype == f.dtype == whole.dtype == torch.bfloat16
    assert ((ours.encode(x) != 0) == (f != 0)).float().mean() > 0.98
    assert (ours(x) - whole).float().norm() < 0.05 * whole.float().norm()


@pytest.mark.parametrize(("arch", "capacity"), [("topk", None), ("jumprelu", 60), ("standard", 80)])
def test_a_bounded_call_makes_no_dense_latents(arch: str, capacity: int | None) -> None:
    ours = fused(sae_lens_sae(arch), capacity=capacity)
    run = recorded(ours, x=rows(400))
    assert run.largest <= 400 * max(D_IN, capacity or K) < 400 * D_SAE
    assert recorded(ours.encode, x=rows(400)).largest >= 400 * D_SAE, "the meter sees nothing"


def test_a_row_over_capacity_is_nan_and_the_others_are_whole() -> None:
    ours = fused(sae_lens_sae("jumprelu"))
    x = rows(40)
    f, counts = ours.encode(x), (ours.encode(x) > 0).sum(dim=1)
    capacity = int(counts.median())
    narrow = fused(sae_lens_sae("jumprelu"), capacity=capacity)
    over = counts > capacity
    assert over.any() and not over.all()
    assert narrow.encode(x)[over].isnan().all() and narrow(x)[over].isnan().all()
    assert_close(narrow.encode(x)[~over], f[~over], D_IN)
    assert_close(narrow(x)[~over], ours(x)[~over], D_SAE)


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_fewer_places_than_k(backend: str) -> None:
    theirs = sae_lens_sae("topk")
    with torch.no_grad():
        theirs.b_enc -= 4
    x = rows(40)
    over = (theirs.encode(x) > 0).sum(dim=1) > K - 2
    assert over.any() and not over.all()
    ours = fused(theirs, capacity=K - 2, backend=backend)
    for out in (ours.encode(x), ours(x), ours.encode_sparse(x).values):
        assert torch.equal(out.isnan().all(dim=1), over) and torch.equal(out.isnan().any(dim=1), over)


def test_a_row_that_is_not_finite_is_nan() -> None:
    ours = fused(sae_lens_sae("jumprelu"))
    x = rows(3)
    x[1, 4] = float("inf")
    assert ours.encode(x)[1].isnan().all() and ours(x)[1].isnan().all()
    assert ours.encode(x)[[0, 2]].isfinite().all() and ours(x)[[0, 2]].isfinite().all()


def test_moves_saves_and_loads_as_a_module() -> None:
    ours = fused(sae_lens_sae("jumprelu"))
    x = rows(6)
    expected = ours(x)
    assert sorted(ours.state_dict()) == ["W_dec", "b_dec", "b_enc", "encoder_rows", "threshold"]
    assert not list(ours.parameters())

    for assign in (False, True):
        other = FusedSAE(random_sae("jumprelu", D_IN, D_SAE, seed=9))
        assert not torch.equal(other(x), expected)
        other.load_state_dict(ours.state_dict(), assign=assign)
        assert same_bits(other(x), expected)
    assert same_bits(copy.deepcopy(ours)(x), expected)

    half = copy.deepcopy(ours).to(torch.bfloat16)
    assert {half.encoder_rows.dtype, half.W_dec.dtype, half.b_dec.dtype} == {torch.bfloat16}
    assert same_bits(half.b_enc, ours.b_enc) and same_bits(half.threshold, ours.threshold)
    assert half.weights.encoder_rows is half.encoder_rows and half.weights is half.weights
    assert ours.to("meta").weights.encoder_rows.device.type == "meta"


def test_statistics_are_taken_once() -> None:
    ours = fused(sae_lens_sae("standard", normalize_activations="layer_norm"))
    f = ours.encode(rows(4))
    ours.decode(f)
    with pytest.raises(InputError) as error:
        ours.decode(f)
    assert all(part in str(error.value) for part in ("`like`", "layer_norm", "[..., 24]")), error.value
    ours.encode(rows(3))
    with pytest.raises(InputError, match=r"`latents` is of shape \[4, 1\]; accepted: shape \[3, 1\]"):
        ours.decode(f)


WEIGHTS = random_sae("jumprelu", D_IN, D_SAE)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"b_dec": torch.zeros(D_IN + 1)}, ("`b_dec`", "[25]", "[24]")),
        ({"b_dec": torch.zeros(D_IN, dtype=torch.int32)}, ("`b_dec`", "torch.int32", "torch.float32")),
        ({"b_dec": torch.zeros(D_IN, device="meta")}, ("`b_dec`", "meta", "cpu")),
        ({"capacity": 0}, ("`capacity`", "is 0", "from 1 to 96")),
        ({"capacity": D_SAE + 1}, ("`capacity`", "97", "96")),
    ],
)
def test_input_errors_of_the_constructor(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        FusedSAE(WEIGHTS, **change)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda sae: sae(torch.zeros(3, D_IN + 1)), ("`x`", "[3, 25]", "[..., 24].")),
        (lambda sae: sae(torch.zeros(3, D_IN, dtype=torch.int64)), ("`x`", "torch.int64", "torch.float32")),
        (lambda sae: sae(torch.zeros(3, D_IN, device="meta")), ("`x`", "meta", "cpu", "`W_enc`")),
        (lambda sae: sae([[0.0] * D_IN]), ("`x`", "a list", "a tensor", "torch.tensor(x)")),
        (lambda sae: sae(torch.zeros(3, D_IN).numpy()), ("`x`", "a ndarray", "a tensor", "torch.from_numpy(x)")),
        (lambda sae: sae.decode([[0.0] * D_SAE]), ("`latents`", "a list", "a tensor")),
        (lambda sae: sae.encode_sparse(torch.zeros(3, D_IN)), ("`capacity`", "None", "1 to d_sae")),
        (lambda sae: sae.decode(torch.zeros(3, D_IN)), ("`latents`", "[3, 24]", "[3, 96]")),
        (
            lambda sae: sae.decode(SparseLatents(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2))),
            ("`latents.indices`", "torch.float32", "torch.int32"),
        ),
    ],
)
def test_input_errors_of_calls(call: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        call(FusedSAE(WEIGHTS))
    assert all(part in str(error.value) for part in parts), error.value


def test_autocast_changes_nothing() -> None:
    ours = fused(sae_lens_sae("jumprelu"))
    x = rows(9)
    expected = ours.encode(x), ours(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(ours.encode(x), expected[0], D_IN)


@pytest.mark.parametrize("capacity", [None, D_SAE])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_call_has_the_statistics_of_its_own_rows(monkeypatch, capacity: int | None, backend: str) -> None:
    sae = replace(WEIGHTS, normalize="layer_norm")
    module = FusedSAE(sae, capacity=capacity, backend=backend)
    x, other = rows(3), 5 * rows(3) + 7
    expected, taken = module(x), FusedSAE._statistics

    def statistics(self: FusedSAE, *arguments: Any) -> Any:
        """Let another thread call the module after every use of the statistics."""
        result = taken(self, *arguments)
        with monkeypatch.context() as patch:
            patch.setattr(FusedSAE, "_statistics", taken)
            thread = threading.Thread(target=module.encode, args=(other,))
            thread.start()
            thread.join()
        return result

    monkeypatch.setattr(FusedSAE, "_statistics", statistics)
    assert torch.equal(module(x), expected)


PLACE = {"model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_post", "neuronpedia_id": "gpt2-small/3-x"}


def test_made_in_each_way(tmp_path: Any) -> None:
    theirs = sae_lens_sae("topk")
    for name, value in PLACE.items():
        theirs.cfg.metadata[name] = value
    theirs.save_model(tmp_path)
    x = rows(5)
    expected = theirs.encode(x), theirs(x)
    ways = {
        "from_sae_lens": FusedSAE.from_sae_lens(theirs),
        "load": FusedSAE.load(tmp_path),
        "frozen": FusedSAE(FrozenSAE.load(tmp_path)),
    }
    for name, ours in ways.items():
        assert_close(ours.encode(x), expected[0], D_IN)
        assert_close(ours(x), expected[1], D_SAE)
        assert (ours.d_in, ours.d_sae, ours.d_out, ours.dtype) == (D_IN, D_SAE, D_IN, theirs.dtype), name
        assert ours.device == theirs.device
        for attribute in ("d_in", "d_sae", "dtype", "device", "k", "normalize_activations", "reshape_activations"):
            assert getattr(ours.cfg, attribute) == getattr(theirs.cfg, attribute), attribute
        assert ours.cfg.architecture == theirs.cfg.architecture() == "topk"
        assert {key: getattr(ours.cfg.metadata, key) for key in PLACE} == PLACE
        for tensor in ("W_enc", "W_dec", "b_dec"):
            assert torch.equal(getattr(ours, tensor), getattr(theirs, tensor)), tensor


def test_from_pretrained_is_that_of_sae_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = sae_lens_sae("jumprelu")
    sae_lens = pytest.importorskip("sae_lens")
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda release, sae_id: theirs)
    ours = FusedSAE.from_pretrained("a-release", "layer_3", dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16 and ours.cfg.dtype == "bfloat16"
    assert_close(FusedSAE.from_pretrained("a-release", "layer_3").encode(rows(5)), theirs.encode(rows(5)), D_IN)


def test_centred_rows_are_the_callers_unless_the_frozen_sae_centres() -> None:
    """As SAELens, which leaves centring to the model; a FrozenSAE reads the residuals of transformers."""
    theirs = sae_lens_sae("jumprelu", apply_b_dec_to_input=True)
    theirs.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    x = rows(5)
    assert_close(FusedSAE.from_sae_lens(theirs).encode(x), theirs.encode(x), D_IN)
    frozen = FrozenSAE.from_sae_lens(theirs)
    centred = x - x.mean(dim=1, keepdim=True)
    ours = FusedSAE(frozen)
    assert_close(ours.encode(x), theirs.encode(centred), D_IN)
    assert_close(ours(x), theirs(centred) + x.mean(dim=1, keepdim=True), D_SAE)


@pytest.mark.parametrize("wrong", [torch.nn.Linear(2, 2), "gemma-scope", None, 3])
def test_another_object_is_refused_with_advice(wrong: Any) -> None:
    with pytest.raises(InputError, match=r"`sae` is a \w+; accepted: a dspa.FrozenSAE.*FusedSAE\.from_sae_lens\(sae\)"):
        FusedSAE(wrong)


def test_an_sae_of_sae_lens_is_refused_with_advice() -> None:
    with pytest.raises(InputError, match=r"a JumpReLUSAE; .* FusedSAE\.from_sae_lens\(sae\)"):
        FusedSAE(sae_lens_sae("jumprelu"))


@pytest.mark.parametrize("capacity", [None, D_SAE])
@pytest.mark.parametrize("call", [lambda sae, x: sae(x), lambda sae, x: sae.encode(x)])
def test_backward_names_what_has_gradients(call: Any, capacity: int | None) -> None:
    out = call(FusedSAE(WEIGHTS, capacity=capacity), rows(3).requires_grad_())
    with pytest.raises(BackendError, match=r"FusedSAE.* gradients with dspa_kernels\.fuse\(sae\)"):
        out.sum().backward()


def test_an_unknown_backend_is_refused_where_it_is_set() -> None:
    with pytest.raises(InputError, match=r"`backend` is 'fastest'; accepted: auto, cuda, triton, reference"):
        FusedSAE(WEIGHTS, backend="fastest")
    ours = FusedSAE(WEIGHTS, backend="reference")
    with pytest.raises(InputError, match="`backend` is None"):
        ours.backend = None
    assert ours.backend == "reference"
    ours.backend = "auto"
    assert "'auto' (reference)" in repr(ours)


@pytest.mark.parametrize("name", ["use_error_term", "hook_dict", "hook_sae_acts_post"])
def test_what_a_hooked_transformer_asks_for_names_fuse(name: str) -> None:
    ours = FusedSAE(WEIGHTS)
    assert not hasattr(ours, name)
    with pytest.raises(AttributeError, match=rf"'{name}'.*HookedSAETransformer with dspa_kernels\.fuse\(sae\)"):
        getattr(ours, name)


def test_a_module_on_the_meta_device_can_be_filled() -> None:
    ours = FusedSAE(WEIGHTS)
    empty = copy.deepcopy(ours).to("meta", torch.bfloat16).to(torch.float32).to_empty(device="cpu")
    assert empty.threshold.dtype == torch.float32
    empty.load_state_dict(ours.state_dict())
    assert same_bits(empty(rows(3)), ours(rows(3)))


@pytest.mark.parametrize("arch", CLASSES)
def test_rows_are_normalised_once(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = fused(sae_lens_sae(arch, normalize_activations="layer_norm"))
    calls, normalise = [], SAEWeights.normalise
    monkeypatch.setattr(SAEWeights, "normalise", lambda sae, h: calls.append(1) or normalise(sae, h))
    ours(rows(3))
    assert len(calls) == 1
    ours.encode(rows(3))
    assert len(calls) == 2


def test_prints_backend_and_shapes() -> None:
    shown = repr(fused(sae_lens_sae("topk", normalize_activations="layer_norm")))
    for part in (
        "topk",
        f"d_in={D_IN}",
        f"d_sae={D_SAE}",
        f"k={K}",
        "layer_norm",
        "float32 on cpu",
        "'auto' (reference)",
    ):
        assert part in shown, shown
    assert "capacity" not in shown
    assert ", capacity=9)" in repr(FusedSAE(WEIGHTS, capacity=9))


def test_prints_a_gated_sae_as_one() -> None:
    theirs = make_sae("gated")
    ours = FusedSAE.from_sae_lens(theirs)
    assert repr(ours).startswith("FusedSAE(gated, ") and ours.cfg.architecture == theirs.cfg.architecture()


TRANSCODERS = ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder")


def transcoder(name: str, d_out: int, **cfg: Any) -> Any:
    module = pytest.importorskip("sae_lens.saes.transcoder")
    config = getattr(module, f"{name}Config")(d_in=D_IN, d_sae=D_SAE, d_out=d_out, apply_b_dec_to_input=False, **cfg)
    theirs = getattr(module, name)(config)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) / D_IN**0.5)
    return theirs


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("d_out", [D_IN, D_IN + 16])
@pytest.mark.parametrize("name", TRANSCODERS)
def test_transcoders(name: str, d_out: int, normalize: str, backend: str) -> None:
    theirs = transcoder(name, d_out, normalize_activations=normalize)
    ours = FusedSAE.from_sae_lens(theirs, backend=backend)
    x = rows(2, 3)
    with torch.no_grad():
        f, whole = theirs.encode(x), theirs(x)
        recon = theirs.decode(f)
    assert_close(ours.encode(x), f, D_IN)
    assert_close(ours.decode(f), recon, D_SAE)
    assert_close(ours.decode(ours.encode_sparse(x, capacity=D_SAE)), recon, D_SAE)
    assert_close(ours(x), whole, D_SAE)
    assert (ours.d_out, ours.cfg.d_out) == (d_out, d_out) and f"d_out={d_out}" in repr(ours)
    assert (ours.W_skip is None) == ("Skip" not in name) == ("W_skip" not in repr(ours))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_attention_heads(normalize: str, backend: str) -> None:
    theirs = sae_lens_sae("jumprelu", normalize_activations=normalize, reshape_activations="hook_z")
    ours = FusedSAE.from_sae_lens(theirs, backend=backend)
    x = rows(2, 3).unflatten(-1, (4, D_IN // 4))
    with torch.no_grad():
        f, whole = theirs.encode(x), theirs(x)
    assert f.shape == (2, 3, D_SAE) and whole.shape == x.shape
    assert_close(ours.encode(x), f, D_IN)
    assert_close(ours.decode(f), whole, D_SAE)
    assert_close(ours(x), whole, D_SAE)
    assert_close(ours(x.flatten(-2)), whole.flatten(-2), D_SAE)
    assert ", hook_z, " in repr(ours)
    for encode in (ours, FrozenSAE.from_sae_lens(theirs).encode):
        with pytest.raises(ValueError, match=r"\[2, 3, 5, 7\].*\[\.\.\., n_heads, d_head\] with n_heads x d_head = 24"):
            encode(torch.zeros(2, 3, 5, 7))
    assert_close(ours.decode(f, like=x), whole, D_SAE)
