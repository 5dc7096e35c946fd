"""`fuse` and `unfuse` against the SAE of SAELens that is not fused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import dspa_kernels
from dspa_kernels import InputError, eager, fuse, fusing, unfuse
from dspa_kernels.nn import FusedSAE
from dspa_kernels.testing import same_bits

from ..kernels.test_ops_contract import recorded
from ..rounding import rounding
from .saes import ARCHITECTURES, D_HEAD, D_IN, D_SAE, SAES, TRANSCODERS, K, make_sae, rows

NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HOOKS = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_output")
# With places for active latents in `sae(x)`, as arguments of `fuse`.
SPARSE = {
    "topk": {},
    "standard": {"capacity": 64},
    "jumprelu": {"capacity": 64},
    "transcoder": {"capacity": 64},
    "jumprelu_skip_transcoder": {"capacity": 64},
}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Raise unless these differ by rounding alone, and have one dtype and shape."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=rounding(8, largest, expected.dtype))


def assert_same_latents(actual: Tensor, expected: Tensor) -> None:
    assert same_bits(actual, expected), f"{(actual != expected).sum()} differ"


def assert_same(ours: Any, theirs: Any, x: Tensor) -> None:
    f = theirs.encode(x)
    assert 0.001 < (f != 0).float().mean() < 0.1
    assert_same_latents(ours.encode(x), f)
    assert_close(ours.decode(f), theirs.decode(f))
    assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_and_dtype(arch: str, dtype: torch.dtype, grad: bool) -> None:
    theirs, ours = make_sae(arch, dtype), fuse(make_sae(arch, dtype))
    with torch.set_grad_enabled(grad):
        assert_same(ours, theirs, rows(2, 40, dtype=dtype))


@pytest.mark.parametrize("normalize", NORMALIZATIONS[1:])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_normalisation(arch: str, normalize: str) -> None:
    theirs, ours = (make_sae(arch, normalize_activations=normalize) for _ in range(2))
    fuse(ours)
    x = rows(40)
    with torch.no_grad():
        f = theirs.encode(x)
        assert_same_latents(ours.encode(x), f)
        assert_close(ours.decode(f), theirs.decode(f))
        assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("arch", SAES)
def test_hook_z(arch: str) -> None:
    settings = {"reshape_activations": "hook_z", "hook_name": "blocks.0.attn.hook_z"}
    theirs, ours = make_sae(arch, **settings), fuse(make_sae(arch, **settings))
    x = rows(2, 20, D_IN // D_HEAD, width=D_HEAD)
    with torch.no_grad():
        assert_same(ours, theirs, x)
        assert ours.encode(x).shape == (2, 20, D_SAE) and ours(x).shape == x.shape
        assert_close(fuse(ours, backend="reference")(x), theirs(x))


@pytest.mark.parametrize("arch", ["standard", "topk", "gated"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (2, 1, 2)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...], arch: str) -> None:
    theirs, ours, sparse = make_sae(arch), fuse(make_sae(arch)), fuse(make_sae(arch), backend="reference")
    x = rows(*shape)
    with torch.no_grad():
        assert_same_latents(ours.encode(x), theirs.encode(x))
        assert_close(ours(x), theirs(x))
        assert_close(sparse(x), theirs(x))


def test_other_input_dtypes_and_many_active_latents() -> None:
    theirs, ours = make_sae("standard"), fuse(make_sae("standard"))
    x = rows(40)
    with torch.no_grad():
        for sae in (theirs, ours):
            sae.b_enc.add_(2.3)
        assert (theirs.encode(x) != 0).float().mean() > 0.4
        assert_close(ours(x), theirs(x))
        assert same_bits(ours.encode(x.bfloat16()), theirs.encode(x.bfloat16()))


@pytest.mark.parametrize("n_rows", [4, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_active_latents_are_decoded_alone(dtype: torch.dtype, n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = make_sae("topk", dtype), fuse(make_sae("topk", dtype))
    calls = []
    decode_active = eager.decode_active
    monkeypatch.setattr(eager, "decode_active", lambda *arguments: calls.append(1) or decode_active(*arguments))
    f = torch.zeros(n_rows, D_SAE, dtype=dtype)
    f[:, 5], f[:, 700] = 1.5, -0.5
    with torch.no_grad():
        assert_close(ours.decode(f), theirs.decode(f))
    assert calls
    grads = []
    for sae in (theirs, ours):
        leaf = f.clone().requires_grad_()
        out = sae.decode(leaf)
        grads.append(torch.autograd.grad((out * out.detach()).sum(), [leaf, sae.W_dec, sae.b_dec]))
    assert (grads[1][0] != 0).float().mean() > 0.9, "inactive latents have a gradient"
    for grad, expected in zip(grads[1], grads[0], strict=True):
        assert_close(grad, expected)


def test_rows_that_are_not_finite() -> None:
    theirs, ours = make_sae("jumprelu"), fuse(make_sae("jumprelu"))
    x = rows(3)
    x[1, 4] = float("nan")
    with torch.no_grad():
        assert torch.equal(ours.encode(x).isnan(), theirs.encode(x).isnan())
        assert torch.equal(ours(x).isnan(), theirs(x).isnan())


def test_autocast() -> None:
    for arch in ("standard", "jumprelu", "topk", "gated"):
        theirs, ours = make_sae(arch), fuse(make_sae(arch))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            f, expected = theirs.encode(rows(40)), theirs(rows(40))
            assert ours.encode(rows(40)).dtype == f.dtype and ours(rows(40)).dtype == expected.dtype
            assert same_bits(ours.encode(rows(40)), f)
            assert (ours(rows(40)) - expected).norm() < 0.02 * expected.norm()


def changed(tensor: Tensor, hook: Any) -> Tensor:
    return 1.5 * tensor + 0.25


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_hook_that_changes_what_it_sees(arch: str, hook: str) -> None:
    theirs, ours = make_sae(arch), fuse(make_sae(arch), backend="reference")
    x = rows(40)
    with torch.no_grad():
        before = ours(x)
        expected = theirs.run_with_hooks(x, fwd_hooks=[(hook, changed)])
        assert_close(ours.run_with_hooks(x, fwd_hooks=[(hook, changed)]), expected)
        # A transcoder of SAELens calls no hook_sae_output.
        assert (hook == "hook_sae_output" and arch in TRANSCODERS) or not torch.allclose(expected, before)
        assert same_bits(ours(x), before), "the hook is gone"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cache(arch: str) -> None:
    theirs, ours = make_sae(arch), fuse(make_sae(arch))
    x = rows(20)
    with torch.no_grad():
        (out, cache), (our_out, our_cache) = theirs.run_with_cache(x), ours.run_with_cache(x)
        _, one = ours.run_with_cache(x, names_filter=["hook_sae_acts_post"])
    assert_close(our_out, out)
    assert list(our_cache) == list(cache)
    for name in cache:
        assert_close(our_cache[name], cache[name])
    assert list(one) == ["hook_sae_acts_post"]
    assert_same_latents(one["hook_sae_acts_post"], cache["hook_sae_acts_post"])


@pytest.mark.parametrize("options", [{}, {"backend": "reference"}], ids=str)
@pytest.mark.parametrize("arch", SAES)
def test_error_term(arch: str, options: dict[str, Any]) -> None:
    """The call returns its input, and a hook's effect on the reconstruction in addition."""
    theirs, ours = make_sae(arch), fuse(make_sae(arch), **options)
    theirs.use_error_term = ours.use_error_term = True
    x = rows(40)
    hooks = [("hook_sae_acts_post", lambda f, hook: f * 0)]
    with torch.no_grad():
        assert_close(ours(x), x)
        assert_close(ours.run_with_hooks(x, fwd_hooks=hooks), theirs.run_with_hooks(x, fwd_hooks=hooks))
        (_, cache), (_, our_cache) = theirs.run_with_cache(x), ours.run_with_cache(x)
        assert_close(our_cache["hook_sae_error"], cache["hook_sae_error"])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients(arch: str) -> None:
    theirs, ours = make_sae(arch), fuse(make_sae(arch), backend="reference")
    weights = rows(40, width=theirs(rows(1)).shape[-1], seed=2)
    grads = []
    for sae in (theirs, ours):
        x = rows(40).requires_grad_()
        f = sae.encode(x)
        f.retain_grad()
        ((sae.decode(f) + sae(x)) * weights).sum().backward()
        grads.append({"x": x.grad, "f": f.grad} | {name: p.grad for name, p in sae.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert (grad is None) == (grads[1][name] is None), name
        if grad is not None:
            assert_close(grads[1][name], grad)


def test_backward_hooks_and_second_gradients() -> None:
    seen: list[list[Tensor]] = []
    for sae in (make_sae("jumprelu"), fuse(make_sae("jumprelu"))):
        grads: list[Tensor] = []
        x = rows(40).requires_grad_()
        with sae.hooks(bwd_hooks=[("hook_sae_acts_post", lambda grad, hook, grads=grads: grads.append(grad))]):
            loss = sae(x).square().sum()
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
            first.square().sum().backward()
        seen.append([*grads, first.detach(), x.grad])
    assert len(seen[0]) == len(seen[1]) >= 3
    for ours, theirs in zip(seen[1], seen[0], strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("arch", SPARSE)
def test_sparse_calls(arch: str, backend: str) -> None:
    theirs, ours = make_sae(arch), fuse(make_sae(arch), backend=backend, **SPARSE[arch])
    with torch.no_grad():
        assert_close(ours(rows(2, 20)), theirs(rows(2, 20)))
        assert not ours.W_enc.is_contiguous(), "the call was not sparse"


@pytest.mark.parametrize("arch", SPARSE)
def test_sparse_calls_make_no_dense_latents(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = fuse(make_sae(arch), backend="reference", **SPARSE[arch])
    # The mode that records what is made would make calls dense.
    monkeypatch.setattr(fusing, "is_intercepted", lambda values: False)
    with torch.no_grad():
        sae(rows(1))
        # The meter takes views of parameters for tensors that were made.
        assert recorded(sae, x=rows(400)).largest <= sae.W_dec.numel() < 400 * D_SAE
        assert recorded(sae.encode, x=rows(400)).largest >= 400 * D_SAE, "the meter sees nothing"


def test_a_row_over_capacity_is_nan() -> None:
    sae = make_sae("jumprelu")
    x = rows(40)
    with torch.no_grad():
        whole, counts = sae(x), (sae.encode(x) > 0).sum(dim=1)
        capacity = int(counts.median())
        out = fuse(sae, capacity=capacity, backend="reference")(x)
    over = counts > capacity
    assert over.any() and not over.all()
    assert out[over].isnan().all()
    assert_close(out[~over], whole[~over])


def double_(sae: Any) -> None:
    with torch.no_grad():
        sae.W_enc.mul_(2)
        sae.b_dec.add_(1)


def replace_data(sae: Any) -> None:
    sae.W_enc.data = (sae.W_enc.data * 2).contiguous()
    sae.b_enc.data = sae.b_enc.data + 0.1


def load(sae: Any, assign: bool = False) -> None:
    sae.load_state_dict({name: 1.25 * tensor for name, tensor in sae.state_dict().items()}, assign=assign)


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": double_,
    "data": replace_data,
    "load": load,
    "assign": lambda sae: load(sae, assign=True),
    "fold": lambda sae: sae.fold_W_dec_norm(),
    "scale": lambda sae: sae.fold_activation_norm_scaling_factor(1.5),
    "to": lambda sae: sae.to(torch.float64),
    "parameter": lambda sae: setattr(sae, "W_dec", nn.Parameter(sae.W_dec.detach() * 2)),
}


@pytest.mark.parametrize("options", [{}, {"backend": "reference", "capacity": 256}], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_after_fusing_count(change: str, options: dict[str, Any]) -> None:
    theirs, ours = make_sae("jumprelu"), fuse(make_sae("jumprelu"), **options)
    x = rows(40)
    with torch.no_grad():
        before = ours(x)
        for sae in (theirs, ours):
            CHANGES[change](sae)
        assert_close(ours(x), theirs(x))
        # A sparse call changes the strides of W_enc, and with them the order of sums.
        compare = assert_close if options else assert_same_latents
        compare(ours.encode(x), theirs.encode(x))
        assert change == "fold" or not same_bits(ours(x).to(before.dtype), before)


def test_stays_the_same_object(tmp_path: Any) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    theirs, sae = make_sae("topk"), make_sae("topk")
    cfg, parameters = sae.cfg, dict(sae.named_parameters())
    assert fuse(sae, backend="triton") is sae and fuse(fuse(sae), backend="triton") is sae
    assert isinstance(sae, sae_lens.TopKSAE) and sae.cfg is cfg and type(sae).__name__ == "FusedTopKSAE"
    x = rows(6)
    with torch.no_grad():
        expected = sae(x)
        assert not sae.W_enc.is_contiguous(), "the sparse call lays it out by latents"
        twin = copy.deepcopy(sae)
        assert type(twin) is type(sae) and twin.W_enc is not sae.W_enc and same_bits(twin(x), expected)
        state = sae.state_dict()
        assert list(state) == list(theirs.state_dict())
        for name, tensor in theirs.state_dict().items():
            assert state[name].is_contiguous() and same_bits(state[name], tensor)
        sae.save_model(tmp_path)
        loaded = sae_lens.SAE.load_from_disk(tmp_path)
        assert type(loaded) is sae_lens.TopKSAE and same_bits(loaded(x), theirs(x))
        assert unfuse(sae) is sae and unfuse(sae) is sae
        assert type(sae) is sae_lens.TopKSAE and same_bits(sae(x), theirs(x))
    assert sae.W_enc.is_contiguous() and vars(sae).keys() == vars(theirs).keys()
    assert all(parameters[name] is parameter for name, parameter in sae.named_parameters())


def test_a_decoder_that_was_loaded_transposed() -> None:
    """As loaders of SAELens assign some."""
    theirs, ours = make_sae("topk"), fuse(make_sae("topk"), backend="reference")
    state = {
        name: tensor.T.contiguous().T if name == "W_dec" else tensor for name, tensor in theirs.state_dict().items()
    }
    ours.load_state_dict(state, assign=True)
    assert not ours.W_dec.is_contiguous()
    with torch.no_grad():
        assert_close(ours(rows(40)), theirs(rows(40)))
    assert ours.W_dec.is_contiguous(), "every call copies the decoder"


def test_inference_mode_leaves_parameters_that_can_be_trained() -> None:
    sae = fuse(make_sae("topk"), backend="reference")
    with torch.inference_mode():
        sae(rows(3))
        assert not sae.W_enc.is_contiguous(), "the call was not sparse"
    sae(rows(3)).sum().backward()
    with torch.inference_mode():
        unfuse(sae)
    sae(rows(3)).sum().backward()
    assert sae.W_enc.grad.any()


def test_gradients_of_a_replica() -> None:
    """The parameters of a replica of torch.nn.DataParallel are no parameters, but tensors with a gradient."""
    sae = fuse(make_sae("topk"), backend="reference")
    replica = sae._replicate_for_data_parallel()
    for name, parameter in sae.named_parameters():
        setattr(replica, name, parameter * 1)
    replica(rows(5)).sum().backward()
    assert all(parameter.grad.any() for parameter in sae.parameters())


@pytest.mark.parametrize("arch", ["jumprelu", "topk"])
def test_forward_mode_derivatives(arch: str) -> None:
    tangents = []
    for sae in (make_sae(arch), fuse(make_sae(arch), backend="reference"), fuse(make_sae(arch))):
        with torch.no_grad(), forward_ad.dual_level():
            out = sae(forward_ad.make_dual(rows(40), rows(40, seed=2)))
            tangents.append(forward_ad.unpack_dual(out).tangent)
    for tangent in tangents[1:]:
        assert_close(tangent, tangents[0])


def test_a_hook_on_the_activation_function() -> None:
    for options in ({}, {"backend": "reference"}):
        sae, seen = fuse(make_sae("topk"), **options), []
        handle = sae.activation_fn.register_forward_hook(lambda _, args, f, seen=seen: seen.append((args[0], f)))
        with torch.no_grad():
            sae(rows(4))
            handle.remove()
            sae(rows(4))
            assert len(seen) == 1 and same_bits(seen[0][1], sae.encode(rows(4)))


def test_print_of_what_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, other = fuse(make_sae("topk"), backend="triton"), fuse(make_sae("standard"), capacity=9)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "backend=triton (cannot run)" in str(sae)
    other.activation_fn = nn.GELU()
    assert "backend=auto (cannot run), capacity=9" in str(other)


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("arch", [*SAES, "skip_transcoder"])
def test_pickles(arch: str, normalize: str) -> None:
    sae = fuse(make_sae(arch, normalize_activations=normalize), backend="reference")
    twin, file = pickle.loads(pickle.dumps(sae)), io.BytesIO()
    torch.save(sae, file)
    file.seek(0)
    with torch.no_grad():
        expected = sae(rows(5))
        for other in (twin, torch.load(file, weights_only=False), copy.deepcopy(sae)):
            assert type(other) is type(sae) and other.fused_backend == "reference"
            assert same_bits(other(rows(5)), expected)
            assert same_bits(unfuse(other).encode(rows(5)), sae.encode(rows(5)))


def test_a_pickle_keeps_heads_and_own_functions() -> None:
    settings = {"reshape_activations": "hook_z", "hook_name": "blocks.0.attn.hook_z"}
    sae, x = fuse(make_sae("topk", **settings)), rows(2, D_IN // D_HEAD, width=D_HEAD)
    with torch.no_grad():
        assert same_bits(pickle.loads(pickle.dumps(sae))(x), sae(x))
        sae.run_time_activation_norm_fn_in = torch.relu
        assert same_bits(pickle.loads(pickle.dumps(sae))(x), sae(x))


def test_sparse_activations_that_are_switched_on() -> None:
    theirs, ours = make_sae("topk"), fuse(make_sae("topk"))
    theirs.activation_fn.use_sparse_activations = ours.activation_fn.use_sparse_activations = True
    with torch.no_grad():
        f = ours.encode(rows(5))
        assert f.is_sparse and same_bits(f.to_dense(), theirs.encode(rows(5)).to_dense())
        assert_close(ours(rows(5)), theirs(rows(5)))


def test_a_module_of_this_package_is_refused_with_advice() -> None:
    with pytest.raises(InputError, match=r"FusedSAE; .*runs on the kernels already.*fuse the SAE of SAELens"):
        fuse(FusedSAE.from_sae_lens(make_sae("topk")))


def test_print() -> None:
    text = str(fuse(make_sae("topk")))
    assert text.startswith("FusedTopKSAE(") and "gradients" not in text
    for part in (f"d_in={D_IN}, d_sae={D_SAE}, k={K}", "float32 on cpu", "backend=auto (dense)"):
        assert part in text, text
    assert "capacity" not in text
    sae = fuse(make_sae("transcoder", torch.bfloat16), capacity=9, backend="triton")
    parts = ("d_out=320", "bfloat16", "backend=triton (triton)", "capacity=9", "dense where gradients are recorded")
    for part in parts:
        assert part in str(sae), sae
    assert "gradients" not in str(sae.requires_grad_(False))


def test_compiled() -> None:
    sae = fuse(make_sae("topk"), backend="reference")
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(sae, backend="aot_eager", fullgraph=True)
        assert_close(compiled(rows(5)), sae(rows(5)))


def own_encode(sae_lens: Any) -> Any:
    class MySAE(sae_lens.StandardSAE):
        def encode(self, x: Tensor) -> Tensor:
            return super().encode(x) * 2

    return MySAE(sae_lens.StandardSAEConfig(d_in=8, d_sae=16))


def own_activation(sae_lens: Any) -> Any:
    sae = make_sae("standard")
    sae.activation_fn = nn.GELU()
    return sae


def own_class_of_the_same_name(sae_lens: Any) -> Any:
    class ReLU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu() ** 2

    sae = make_sae("standard")
    sae.activation_fn = ReLU()
    return sae


def sae_of(name: str, **settings: Any) -> Callable[[Any], Any]:
    return lambda sae_lens: getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(d_in=8, d_sae=16, **settings))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda sae_lens: nn.Linear(3, 3), ("torch.nn.modules.linear.Linear", "of sae-lens 6", "fuse its SAEs")),
        (lambda sae_lens: None, ("builtins.NoneType", "FusedSAE")),
        (lambda sae_lens: object(), ("builtins.object",)),
        (sae_of("BatchTopKTrainingSAE", k=2), ("BatchTopKTrainingSAE, which is for training", "save_inference_model")),
        (sae_of("StandardTrainingSAE"), ("StandardTrainingSAE, which is for training",)),
        (sae_of("MatchingPursuitSAE"), ("MatchingPursuitSAE.encode", "not by a kernel", "standard, jumprelu, topk")),
        (lambda sae_lens: sae_lens.TemporalSAE(sae_lens.TemporalSAEConfig(d_in=8, d_sae=512)), ("TemporalSAE",)),
        (own_encode, ("MySAE, whose own `encode`", "Fuse an SAE without MySAE")),
        (own_activation, ("StandardSAE", "GELU")),
        (own_class_of_the_same_name, ("StandardSAE", "test_fuse.own_class_of_the_same_name.<locals>.ReLU")),
    ],
    ids=lambda value: "" if callable(value) else value[0],
)
def test_refused(make: Callable[[Any], Any], parts: tuple[str, ...]) -> None:
    sae = make(pytest.importorskip("sae_lens"))
    with pytest.raises(InputError) as error:
        fuse(sae)
    assert all(part in str(error.value) for part in ("`sae`", *parts)), error.value
    assert unfuse(sae) is sae


@pytest.mark.parametrize(
    ("arch", "options", "parts"),
    [
        ("jumprelu", {"capacity": 0}, ("`capacity`", "is 0")),
        ("jumprelu", {"capacity": D_SAE + 1}, ("`capacity`", "1025", "1024")),
        ("topk", {"capacity": 5}, ("`capacity`", "5 for a TopKSAE", "ReLU")),
        ("gated", {"capacity": 5}, ("`capacity`", "GatedSAE")),
        ("topk", {"backend": "best"}, ("`backend`", "'best'", "triton")),
    ],
)
def test_options_that_are_refused(arch: str, options: dict[str, Any], parts: tuple[str, ...]) -> None:
    sae = make_sae(arch)
    with pytest.raises(InputError) as error:
        fuse(sae, **options)
    assert all(part in str(error.value) for part in parts), error.value
    assert not hasattr(sae, "fused_backend"), "a refusal changes nothing"


def test_an_activation_that_is_put_in_later_is_refused() -> None:
    sae = fuse(make_sae("standard"))
    sae.activation_fn = nn.GELU()
    with pytest.raises(InputError, match="GELU"):
        sae.encode(rows(2))


def test_a_backend_that_cannot_run() -> None:
    with pytest.raises(dspa_kernels.BackendError, match="no such kernel"):
        fuse(make_sae("topk"), backend="cuda")
