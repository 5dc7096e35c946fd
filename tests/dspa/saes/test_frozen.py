"""FrozenSAE against formulas written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dspa.errors import SAEError
from dspa.saes.frozen import FrozenSAE

from ..support.saes import (
    D_IN,
    D_SAE,
    JUMPRELU,
    NORMALIZATIONS,
    STANDARD,
    K,
    close,
    decoded_rounding,
    make,
    named,
    tensors,
)

# What is computed, written out


def test_jumprelu_needs_the_threshold_and_zero_strictly() -> None:
    sae = FrozenSAE(
        "jumprelu", torch.eye(4), torch.zeros(4), torch.eye(4), threshold=torch.tensor([1.0, -1.0, 0.0, torch.inf])
    )
    h = torch.tensor([[1.0, -0.5, 0.0, 1e9], [1.5, 0.5, 1e-6, 1e30]])
    assert sae.encode(h).tolist() == [[0, 0, 0, 0], [1.5, 0.5, pytest.approx(1e-6), 0]]


def test_topk_takes_the_smaller_index_of_equals_and_nothing_below_zero() -> None:
    sae = FrozenSAE("topk", torch.eye(5), torch.zeros(5), torch.eye(5), k=2)
    h = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0], [-1.0, -2.0, 2.0, -3.0, -1.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    assert sae.encode(h).tolist() == [[1, 3, 0, 0, 0], [0, 0, 2, 0, 0], [2, 2, 0, 0, 0]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, whose sort is not stable by itself")
def test_topk_ties_on_a_gpu(h: Tensor) -> None:
    sae = FrozenSAE("topk", torch.zeros(2, 5000), torch.ones(5000), torch.ones(5000, 2), k=7).to("cuda")
    assert sae.encode(torch.zeros(3, 2, device="cuda")).nonzero()[:, 1].tolist() == list(range(7)) * 3
    assert make().to("cuda").fingerprint == make().fingerprint
    close(make().to("cuda").encode(h.cuda()).cpu(), make().encode(h))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("apply_b_dec", [False, True])
@pytest.mark.parametrize("arch", ["standard", "jumprelu", "topk"])
def test_formula(h: Tensor, arch: str, apply_b_dec: bool, rescale: bool, normalize: str) -> None:
    sae = make(
        arch,
        apply_b_dec_to_input=apply_b_dec,
        rescale_acts_by_decoder_norm=rescale,
        normalize_activations=normalize,
    )
    t = tensors(dtype=torch.float64)
    x, mean, scale = h.double(), torch.zeros(()), torch.ones(())
    if normalize == "layer_norm":
        mean, scale = x.mean(-1, keepdim=True), x.var(-1, keepdim=True).sqrt()
        x = (x - mean) / (scale + 1e-5)
    elif normalize == "constant_norm_rescale":
        scale = (x * x).sum(-1, keepdim=True).sqrt() / D_IN**0.5
        x = x / scale
    norm = t["W_dec"].pow(2).sum(1).sqrt() if rescale else torch.ones(D_SAE)
    pre = ((x - t["b_dec"] * apply_b_dec) @ t["W_enc"] + t["b_enc"]) * norm
    f = pre.clamp(min=0)
    if arch == "jumprelu":
        f = f * (pre > t["threshold"])
    if arch == "topk":
        f = f * (pre >= pre.sort(-1).values[..., -K, None])
    close(sae.encode(h).double(), f)
    recon = ((f / norm) @ t["W_dec"] + t["b_dec"]) * scale + mean
    atol = decoded_rounding(f / norm, t["W_dec"], float(scale.max()))
    torch.testing.assert_close(sae.decode(sae.encode(h), like=h).double(), recon, rtol=0, atol=atol)
    names = ["apply_b_dec_to_input"] * apply_b_dec + ["rescale_acts_by_decoder_norm"] * rescale
    assert sae.folded == tuple(names)


def test_a_latent_without_direction_never_fires(h: Tensor) -> None:
    t = named(*STANDARD)
    t["W_dec"][3] = 0
    t["b_enc"][3] = 100.0
    sae = FrozenSAE("topk", **t, k=K, rescale_acts_by_decoder_norm=True)
    assert not sae.encode(h)[..., 3].any()
    assert sae.decode(sae.encode(h)).isfinite().all()


def test_shapes_dtypes_and_views() -> None:
    t = named(*JUMPRELU)
    sae = FrozenSAE("jumprelu", **t, layer=3, model_name="m")
    assert (sae.d_in, sae.d_sae, sae.layer, sae.model_name, sae.arch) == (D_IN, D_SAE, 3, "m", "jumprelu")
    assert sae.weights.encoder_rows.shape == (D_SAE, D_IN) and sae.weights.encoder_rows.is_contiguous()
    assert sae.W_enc.data_ptr() == sae.weights.encoder_rows.data_ptr()
    assert all(torch.equal(getattr(sae, name), t[name]) for name in JUMPRELU)
    assert (sae.device, sae.dtype) == (torch.device("cpu"), torch.float32)
    text = repr(sae)
    assert "\n" not in text and all(part in text for part in ("jumprelu", "12", "40", "layer=3", "float32"))
    assert f"k={K}, layer_norm" in repr(make("topk", normalize_activations="layer_norm"))


def test_it_owns_its_tensors() -> None:
    t = named(*JUMPRELU)
    # A transposed view of rows that are contiguous already is the case where no copy would be needed.
    t["W_enc"] = t["W_enc"].T.contiguous().T
    sae, same = FrozenSAE("jumprelu", **t), FrozenSAE("jumprelu", **named(*JUMPRELU))
    for tensor in t.values():
        tensor.zero_()
    assert all(torch.equal(getattr(sae, name), getattr(same, name)) for name in JUMPRELU)
    assert sae.fingerprint == same.fingerprint


def test_parameters_are_detached_and_encode_is_differentiable_in_h(h: Tensor) -> None:
    t = {name: torch.nn.Parameter(tensor) for name, tensor in named(*JUMPRELU).items()}
    sae = FrozenSAE("jumprelu", **t, apply_b_dec_to_input=True)
    assert not any(getattr(sae, name).requires_grad for name in JUMPRELU)
    x = h.double().requires_grad_()
    sae.to(dtype=torch.float64).encode(x).sum().backward()
    f = sae.encode(h)
    expected = (f > 0).double() @ sae.W_enc.T.double()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize(
    ("weights", "x", "computed"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_dtypes(h: Tensor, weights: torch.dtype, x: torch.dtype, computed: torch.dtype) -> None:
    sae = make(layer=2).to(dtype=weights)
    full = torch.float64 if weights == torch.float64 else torch.float32
    assert {tensor.dtype for tensor in (sae.W_enc, sae.W_dec, sae.b_dec)} == {weights}
    assert sae.b_enc.dtype == sae.threshold.dtype == full
    assert torch.equal(sae.b_enc, make().b_enc.to(full)) and torch.equal(sae.threshold, make().threshold.to(full))
    f = sae.encode(h.to(x))
    assert f.dtype == sae.decode(f).dtype == computed
    pre = h.to(x).double() @ sae.W_enc.double() + sae.b_enc.double()
    close(f.double(), pre * ((pre > sae.threshold) & (pre > 0)))
    assert (sae.layer, sae.fingerprint) == (2, make().fingerprint)


def test_narrow_weights_keep_the_bits_of_bias_and_threshold() -> None:
    t = named(*JUMPRELU)
    narrow = {name: t[name].bfloat16() for name in ("W_enc", "W_dec", "b_dec")}
    sae = FrozenSAE("jumprelu", **(t | narrow))
    assert torch.equal(sae.b_enc, t["b_enc"]) and torch.equal(sae.threshold, t["threshold"])
    assert make().to(dtype=torch.float32).b_enc.dtype == torch.float32


def test_to_is_a_new_sae_or_itself() -> None:
    sae = make()
    assert sae.to() is sae and sae.to("cpu", torch.float32) is sae
    narrow = sae.to(dtype=torch.bfloat16)
    assert sae.dtype == torch.float32 and narrow.dtype == torch.bfloat16
    moved = sae.to(dtype=torch.float64).to(dtype=torch.float32)
    assert torch.equal(moved.W_enc, sae.W_enc) and moved.fingerprint == sae.fingerprint


@pytest.mark.parametrize("name", ["expected_average_only_in", "covariance_whitening"])
def test_normalisations_of_training_do_nothing_and_say_so(h: Tensor, name: str) -> None:
    with pytest.warns(UserWarning, match=f"{name}.* does nothing at inference"):
        sae = make(normalize_activations=name)
    assert torch.equal(sae.encode(h), make().encode(h))
    assert sae.fingerprint == make().fingerprint


# Fingerprints


def test_fingerprint_is_of_the_source_and_of_all_of_it() -> None:
    assert make().fingerprint == make(layer=4, model_name="m").fingerprint
    assert len(make().fingerprint) == 16 and int(make().fingerprint, 16) >= 0
    others = [
        make("standard"),
        make("topk"),
        make("topk", k=K + 1),
        make(normalize_activations="layer_norm"),
        make(apply_b_dec_to_input=True),
        make(rescale_acts_by_decoder_norm=True),
    ]
    for name in JUMPRELU:
        t = named(*JUMPRELU)
        t[name].view(-1)[-1] += 1e-3
        others.append(FrozenSAE("jumprelu", **t))
    assert len({sae.fingerprint for sae in [make(), *others]}) == len(others) + 1


def test_fingerprint_is_of_values_not_of_storage() -> None:
    t = {name: tensor.bfloat16() for name, tensor in named(*JUMPRELU).items()}
    wide = {name: tensor.float() for name, tensor in t.items()}
    strided = wide | {"W_enc": wide["W_enc"].T.contiguous().T}
    assert len({FrozenSAE("jumprelu", **stored).fingerprint for stored in (t, wide, strided)}) == 1


# What is refused


def bad_tensor(name: str, value: Any) -> dict[str, Tensor]:
    return named(*JUMPRELU) | {name: value}


@pytest.mark.parametrize(
    ("arch", "kwargs", "message"),
    [
        ("relu", named(*STANDARD), "`arch` is 'relu'; accepted: standard, jumprelu, topk"),
        ("gated", named(*STANDARD), "`arch` is 'gated'.*become jumprelu in FrozenSAE.load"),
        ("jumprelu", named(*STANDARD), "`threshold` of a jumprelu SAE is None; accepted: a tensor"),
        ("standard", named(*JUMPRELU), "`threshold` of a standard SAE is given"),
        ("topk", named(*STANDARD), "`k` of a topk SAE is None"),
        ("standard", named(*STANDARD) | {"k": 3}, "`k` of a standard SAE is 3"),
        ("topk", named(*STANDARD) | {"k": 0}, "`k` is 0; accepted: 1 to d_sae = 40"),
        ("topk", named(*STANDARD) | {"k": 41}, "`k` is 41; accepted: 1 to d_sae = 40"),
        ("topk", named(*STANDARD) | {"k": 2.5}, "`k` is 2.5; accepted: 1 to d_sae = 40"),
        ("standard", named(*STANDARD) | {"layer": -1}, "`layer` is -1; accepted: a whole number >= 0"),
        ("standard", named(*STANDARD) | {"layer": "3"}, "`layer` is '3'"),
        ("jumprelu", bad_tensor("W_enc", torch.ones(D_IN)), r"`W_enc` is of shape \[12\]; .*\[d_in, d_sae\]"),
        ("jumprelu", bad_tensor("b_enc", torch.ones(3)), r"`b_enc` is of shape \[3\]; accepted: shape \[40\]"),
        ("jumprelu", bad_tensor("threshold", torch.ones(3)), r"`threshold` is of shape \[3\]"),
        ("jumprelu", bad_tensor("b_dec", torch.ones(3)), r"`b_dec` is of shape \[3\]; accepted: shape \[12\]"),
        ("jumprelu", bad_tensor("W_dec", torch.ones(D_IN, D_SAE)), r"`W_dec` is of shape \[12, 40\]; .*\[40, 12\]"),
        ("jumprelu", bad_tensor("W_enc", torch.ones(D_IN, D_SAE).int()), "`W_enc` is of dtype torch.int32"),
        ("jumprelu", bad_tensor("W_dec", torch.ones(D_SAE, D_IN).half()), "`W_dec` is of dtype torch.float16"),
        ("jumprelu", bad_tensor("W_enc", torch.full((D_IN, D_SAE), torch.nan)), "`W_enc` is NaN or infinite in 480"),
        ("jumprelu", bad_tensor("b_enc", torch.full((D_SAE,), torch.inf)), "`b_enc` is NaN or infinite in 40 of 40"),
        ("jumprelu", bad_tensor("b_dec", torch.full((D_IN,), -torch.inf)), "`b_dec` is NaN or infinite"),
        ("jumprelu", bad_tensor("threshold", torch.full((D_SAE,), torch.nan)), "`threshold` is NaN or infinite"),
        ("jumprelu", bad_tensor("threshold", torch.full((D_SAE,), -torch.inf)), "`threshold` is NaN or infinite"),
        ("standard", named(*STANDARD) | {"normalize_activations": "l2"}, "'l2'; accepted: none, layer_norm"),
    ],
)
def test_constructor_refuses(arch: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrozenSAE(arch, **kwargs)


def test_encode_decode_and_to_refuse(h: Tensor) -> None:
    sae = make(normalize_activations="layer_norm")
    with pytest.raises(SAEError, match=r"`h` is of shape \[3, 7, 5\]; accepted: shape \[..., 12\]"):
        sae.encode(h[..., :5])
    with pytest.raises(SAEError, match=r"`f` is of shape \[3, 7, 12\]; accepted: shape \[..., 40\]"):
        sae.decode(h)
    with pytest.raises(SAEError, match=r"`like` is None.*layer_norm.*decode\(f, like=h\)"):
        sae.decode(sae.encode(h))
    with pytest.raises(SAEError, match=r"`like` is of shape"):
        sae.decode(sae.encode(h), like=h[..., :5])
    with pytest.raises(SAEError, match=r"`dtype` is torch.int8; accepted: torch.float32"):
        sae.to(dtype=torch.int8)
    with pytest.raises(SAEError, match=r"`b_dec` is NaN or infinite in 12 of 12 places \(torch.float16\)"):
        FrozenSAE("standard", **(named(*STANDARD) | {"b_dec": torch.full((D_IN,), 1e6)})).to(dtype=torch.float16)


W = torch.ones(D_IN, D_SAE)
KINDS: list[tuple[str, Any]] = [
    ("W_enc", None),
    ("W_enc", W.tolist()),
    ("W_enc", W.numpy()),
    ("W_enc", W.to_sparse()),
    ("b_enc", torch.ones(D_SAE, dtype=torch.complex64)),
    ("b_enc", torch.ones(D_SAE, dtype=torch.bool)),
    ("b_dec", torch.ones(D_IN, dtype=torch.int64)),
    ("W_dec", W.T.to(torch.float8_e4m3fn)),
    ("apply_b_dec_to_input", "false"),
    ("rescale_acts_by_decoder_norm", 2),
    ("center_writing_weights", "no"),
    ("model_name", 3),
]


@pytest.mark.parametrize(("name", "value"), KINDS, ids=[f"{name}-{type(value).__name__}" for name, value in KINDS])
def test_an_argument_of_another_kind_is_refused(name: str, value: Any) -> None:
    arguments = {"W_enc": W, "b_enc": torch.ones(D_SAE), "W_dec": W.T, "layer": 1} | {name: value}
    with pytest.raises(SAEError, match=f"`{name}` is .*; accepted: "):
        FrozenSAE("standard", **arguments)


@pytest.mark.parametrize("h", [[0.0] * D_IN, torch.ones(D_IN, dtype=torch.complex64), None])
def test_residuals_that_are_no_tensor_of_real_numbers(h: Any) -> None:
    with pytest.raises(SAEError, match=r"`h` is .*; accepted: a tensor of real numbers"):
        FrozenSAE("standard", W, torch.ones(D_SAE), W.T, layer=1).encode(h)
