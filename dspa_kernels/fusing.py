"""`fuse`: SAEs of SAELens on the kernels of this package, as the same objects."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dspa_kernels import eager
from dspa_kernels.backends import BackendError, choose, is_auto, is_intercepted
from dspa_kernels.checks import InputError, refuse
from dspa_kernels.formulas import compute_dtype
from dspa_kernels.nn import FusedSAE
from dspa_kernels.ops.sparse_decode import sparse_decode
from dspa_kernels.ops.sparse_encode import sparse_encode
from dspa_kernels.weights import SAEWeights, check_k

T = TypeVar("T")
ACCEPTED = "an SAE or transcoder for inference of sae-lens 6: standard, jumprelu, topk, abstopk or gated"


def fuse(sae: T, *, capacity: int | None = None, backend: str = "auto") -> T:
    """Put `encode`, `decode` and the call of a SAELens SAE on fused kernels, in place.

        sae = dspa_kernels.fuse(SAE.from_pretrained(release, sae_id))

    It stays the same object, with its own `cfg`, parameters, `state_dict`, `to`, `fold_W_dec_norm`, hook points,
    `use_error_term`, `run_with_cache` and place in a `HookedSAETransformer`. Inputs and results have the shapes and
    dtypes of SAELens. Parameters are read at every call, so changes made after fusing count.

    - `encode` is one matrix product, or two of a gated SAE, changed in place to latents. The latents are the same as
      SAELens' to the bit if products of the same matrices are, as on a CPU.
    - `decode` reads only the rows of active latents, on a CPU and if few are active. Otherwise it is one product.
    - `sae(x)` holds no `[..., d_sae]` on a GPU if k or `capacity` bounds the number of active latents. They are dense
      if `hook_sae_acts_post` has a hook, for `use_error_term`, for an AbsTopK SAE, and for a TopK SAE with
      `rescale_acts_by_decoder_norm`.

    A hook on `hook_sae_acts_pre` or `activation_fn` makes the calls that it sees encode as SAELens does. Gradients are
    those of SAELens. They need dense latents, and the parameters that SAELens loads require gradients: to save
    memory, call under `torch.no_grad()`. Calls traced by `torch.compile` are dense too. The first sparse call changes
    the strides of `W_enc` and `W_dec`, but not their shapes or what `state_dict` returns.

    Args:
        sae: an SAE or transcoder of sae-lens 6. One that is already fused takes the new options.
        capacity: places per row for active latents in `sae(x)`, for ReLU and JumpReLU. A row with more active latents
            becomes NaN as a whole, in calls that keep latents sparse; dense ones have no bound. By default their number
            is not bounded and latents are dense. A top-k SAE has k.
        backend: "auto", "reference" or "triton", for sparse latents in `sae(x)`. "auto" keeps them dense on a CPU.

    Returns:
        `sae` itself. `unfuse` undoes it.

    Raises:
        InputError: not an SAE of sae-lens, one for training, an architecture without kernels, or an invalid capacity.
        BackendError: the named backend cannot run.
    """
    owner: Any = sae
    cls: Any = type(sae)
    fused = _fused_class(getattr(cls, "sae_lens_class", cls))
    activation = _activation(fused, owner.activation_fn)
    if capacity is not None:
        if activation not in (_relu, _jumprelu):
            name = fused.sae_lens_class.__name__
            raise refuse("capacity", f"{capacity} for a {name}", "None; a bound is for ReLU and JumpReLU")
        check_k("capacity", capacity, owner.cfg.d_sae)
    choose("sparse_encode", owner.W_dec.device, backend, compute_dtype(owner.W_dec))
    owner.__class__ = fused
    owner.fused_capacity, owner.fused_backend = capacity, backend
    return sae


def unfuse(sae: T) -> T:
    """Make an SAE that `fuse` changed SAELens' own again, in place.

    Returns:
        `sae` itself, unchanged if it is not fused.
    """
    owner: Any = sae
    if isinstance(sae, FusedCalls):
        owner.__class__ = sae.sae_lens_class
        with torch.inference_mode(False):
            owner.W_enc.data = owner.W_enc.data.contiguous()
        del owner.fused_capacity, owner.fused_backend
    return sae


class FusedCalls:
    """The methods that a fused SAE has before those of its own class.

    Attributes:
        sae_lens_class: its own class.
        sae_lens_encoder: name of the class of SAELens that defines its `encode`.
        is_transcoder: True if it decodes to another place in the model.
    """

    sae_lens_class: type
    sae_lens_encoder: str
    is_transcoder: bool

    def encode(self: Any, x: Tensor) -> Tensor:
        """Return the latents [..., d_sae] of x."""
        activation = _activation(self, self.activation_fn)
        # TopK makes sparse COO tensors if that is set.
        is_coo = vars(self.activation_fn).get("use_sparse_activations")
        if is_coo or not _is_unseen(self):
            return super().encode(x)  # type: ignore[misc, no-any-return]
        f: Tensor = self.hook_sae_acts_post(activation(self, self.process_sae_in(x)))
        return f

    def decode(self: Any, feature_acts: Tensor) -> Tensor:
        """Return the reconstruction from latents [..., d_sae]."""
        f, W_dec = feature_acts, self.W_dec
        if f.is_sparse:
            return super().decode(f)  # type: ignore[misc, no-any-return]
        if getattr(self.cfg, "rescale_acts_by_decoder_norm", False):
            f = f * (1 / W_dec.norm(dim=-1))
        # What costs least is asked first: in small SAEs, products take as long as a few questions.
        n_rows = f.shape[:-1].numel()
        if f.is_cpu and eager.sparse_pays(n_rows, W_dec) and f.dtype == W_dec.dtype and not _is_traced(f, W_dec):
            rows = _Decode.apply(f.reshape(n_rows, f.shape[-1]), W_dec, self.b_dec)  # type: ignore[no-untyped-call]
            return _finished(self, rows.view(*f.shape[:-1], W_dec.shape[1]))
        return _finished(self, _plus(f @ W_dec, self.b_dec))

    def forward(self: Any, x: Tensor) -> Tensor:
        """Return the reconstruction of x."""
        if not _is_sparse(self, x):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        rows: Tensor = self.process_sae_in(x)
        flat = rows.reshape(rows.shape[:-1].numel(), rows.shape[-1])
        latents = sparse_encode(flat, _weights(self), capacity=_places(self), backend=self.fused_backend)
        out = sparse_decode(latents, self.W_dec, self.b_dec, backend=self.fused_backend)
        out = _finished(self, out.view(*rows.shape[:-1], out.shape[-1]))
        if hasattr(self, "W_skip"):
            out = out + x @ self.W_skip.T.to(x.device)
        return out if self.is_transcoder else self.hook_sae_output(out)

    def extra_repr(self: Any) -> str:
        """Return one line for `print`."""
        (d_in, d_sae), d_out, k = self.W_enc.shape, self.W_dec.shape[1], getattr(self.activation_fn, "k", None)
        shapes = f"d_in={d_in}, d_sae={d_sae}" + f", d_out={d_out}" * (d_out != d_in) + f", k={k}" * (k is not None)
        where = f"{str(self.W_dec.dtype).removeprefix('torch.')} on {self.W_dec.device}"
        try:
            backend, places = _backend(self), _places(self)
        except (BackendError, InputError):
            backend, places = "cannot run", self.fused_capacity
        capacity = f", capacity={self.fused_capacity}" if self.fused_capacity is not None else ""
        line = f"{shapes}, {where}, fused: backend={self.fused_backend} ({backend}){capacity}"
        records = places and backend != "dense" and any(weight.requires_grad for weight in self._parameters.values())
        return line + (", dense where gradients are recorded" if records else "")

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        # The class has no name in a module, and functions that SAELens makes in its methods have none either.
        state = {name: value for name, value in vars(self).items() if not _is_made_in_sae_lens(value)}
        return _empty, (self.sae_lens_class,), state

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._setup_activation_normalization()
        on = self.hook_z_reshaping_mode
        self.turn_on_forward_pass_hook_z_reshaping() if on else self.turn_off_forward_pass_hook_z_reshaping()
        # Functions of others in their place, and what the methods reset.
        vars(self).update(state)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if not keep_vars:
            # safetensors saves contiguous tensors alone.
            destination[f"{prefix}W_enc"] = destination[f"{prefix}W_enc"].contiguous()


class _Decode(torch.autograd.Function):
    """`eager.decode` with the gradients of `f W_dec + b_dec`, which all latents have."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        ctx.save_for_backward(f, W_dec)
        return eager.decode(f, W_dec, b_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (f, W_dec), (to_f, to_W_dec, to_b_dec) = grads, ctx.saved_tensors, ctx.needs_input_grad
        return grad @ W_dec.T if to_f else None, f.T @ grad if to_W_dec else None, grad.sum(0) if to_b_dec else None


# Passes in place over a fresh product. Autograd keeps masks of it, as these change no values that a gradient needs.
def _relu(sae: Any, rows: Tensor) -> Tensor:
    return _plus(rows @ sae.W_enc, sae.b_enc).relu_()


def _jumprelu(sae: Any, rows: Tensor) -> Tensor:
    pre = _plus(rows @ sae.W_enc, sae.b_enc)
    return pre.masked_fill_(pre <= sae.threshold.detach().clamp(min=0), 0)


def _gated(sae: Any, rows: Tensor) -> Tensor:
    # The product of the gates times exp(r_mag) would do in place of the second one, with other bits.
    gate = _plus(rows @ sae.W_enc, sae.b_gate)
    pre = _plus(rows @ (sae.W_enc * sae.r_mag.exp()), sae.b_mag)
    return pre.masked_fill_((gate <= 0).logical_or_(pre <= 0), 0)


def _topk(sae: Any, rows: Tensor) -> Tensor:
    pre = _ranked(sae, rows)
    values, indices = pre.topk(sae.activation_fn.k, dim=-1, sorted=False)
    return pre.zero_().scatter_(-1, indices, values.relu_())


def _abstopk(sae: Any, rows: Tensor) -> Tensor:
    pre = _ranked(sae, rows)
    indices = pre.abs().topk(sae.activation_fn.k, dim=-1, sorted=False).indices
    return torch.zeros_like(pre).scatter_(-1, indices, pre.gather(-1, indices))


def _ranked(sae: Any, rows: Tensor) -> Tensor:
    pre = _plus(rows @ sae.W_enc, sae.b_enc)
    return pre * sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else pre


def _plus(product: Tensor, bias: Tensor) -> Tensor:
    """Add in place, except where autocast made the product narrower than their sum."""
    return product.add_(bias) if product.dtype == bias.dtype else product + bias


# By the class of sae-lens that defines `encode`, and that of its activation.
ACTIVATIONS: dict[tuple[str, str], Callable[[Any, Tensor], Tensor]] = {
    ("StandardSAE", "ReLU"): _relu,
    ("Transcoder", "ReLU"): _relu,
    ("JumpReLUSAE", "ReLU"): _jumprelu,
    ("JumpReLUTranscoder", "ReLU"): _jumprelu,
    ("GatedSAE", "ReLU"): _gated,
    ("TopKSAE", "TopK"): _topk,
    ("TopKSAE", "AbsTopK"): _abstopk,
}


def _activation(fused: Any, activation_fn: object) -> Callable[[Any, Tensor], Tensor]:
    """Return the function of a fused SAE and its processed input [..., d_in] that makes its latents.

    Args:
        fused: the SAE or its class.
        activation_fn: its own, which can be replaced at any time.
    """
    kind = type(activation_fn)
    is_known = kind is nn.ReLU or _is_sae_lens(kind)
    key = fused.sae_lens_encoder, kind.__name__ if is_known else f"{kind.__module__}.{kind.__qualname__}"
    if key not in ACTIVATIONS:
        raise _refusal(fused.sae_lens_class, f", which encodes by {key[0]}.encode and {key[1]}, not by a kernel")
    return ACTIVATIONS[key]


def _finished(sae: Any, out: Tensor) -> Tensor:
    """Return a reconstruction as `decode` does, of the product and b_dec."""
    out = sae.hook_sae_recons(out)
    if not sae.is_transcoder:
        out = sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(out), sae.d_head)
    return out


def _is_unseen(sae: Any) -> bool:
    """Return True if nothing looks at what goes into the activation function, or comes out of it."""
    return _is_idle(sae.hook_sae_acts_pre) and _is_idle(sae.activation_fn)


def _is_idle(point: Any) -> bool:
    """Return True if a module has no hooks."""
    return not (point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks)


def _is_traced(*tensors: Tensor) -> bool:
    """Return True if a CPU's autocast, or what intercepts operators other than to record gradients, sees a call."""
    with torch.no_grad():
        return torch.is_autocast_enabled("cpu") or is_intercepted(tensors)


def _is_sparse(sae: Any, x: Tensor) -> bool:
    """Return True if a call keeps its latents sparse."""
    return bool(
        not (is_auto(sae.fused_backend) and sae.W_dec.is_cpu)
        and _places(sae)
        and not sae.use_error_term
        and _is_unseen(sae)
        and _is_idle(sae.hook_sae_acts_post)
        and _backend(sae) != "dense"
        # By name, as replicas of torch.nn.DataParallel have no parameters but these tensors.
        and not is_intercepted((x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, getattr(sae, "W_skip", x)))
    )


def _places(sae: Any) -> int | None:
    """Return the number of places per row for active latents, None if they are not bounded by index alone."""
    if _activation(sae, sae.activation_fn) is _topk and not sae.cfg.rescale_acts_by_decoder_norm:
        k: int = sae.activation_fn.k
        return k
    capacity: int | None = sae.fused_capacity
    return capacity


def _backend(sae: Any) -> str:
    """Return the backend of sparse latents, "dense" where only the reference could run, which is slower."""
    backend = choose("sparse_encode", sae.W_dec.device, sae.fused_backend, compute_dtype(sae.W_dec))
    return "dense" if backend == "reference" and sae.fused_backend == "auto" else backend


def _weights(sae: Any) -> SAEWeights:
    """Return the encoder as the kernels read it, of the same memory as the parameters where they have its dtype."""
    # Loaders of SAELens transpose the decoders of some releases.
    if not (sae.W_enc.T.is_contiguous() and sae.W_dec.is_contiguous()):
        _lay_out(sae)
    encoder_rows = sae.W_enc.detach().T
    b_enc = sae.b_enc.detach().to(compute_dtype(encoder_rows))
    activation = _activation(sae, sae.activation_fn)
    threshold = sae.threshold.detach().to(b_enc) if activation is _jumprelu else torch.zeros_like(b_enc)
    # Encoding reads no decoder, and that of a transcoder has another width.
    return SAEWeights(encoder_rows, b_enc, threshold, encoder_rows, k=sae.activation_fn.k if activation is _topk else 0)


# Inference mode would leave parameters behind that cannot be trained.
@torch.inference_mode(False)
def _lay_out(sae: Any) -> None:
    """Give the encoder and decoder a contiguous row per latent, in place."""
    sae.W_enc.data = sae.W_enc.data.T.contiguous().T
    sae.W_dec.data = sae.W_dec.data.contiguous()


@functools.cache
def _fused_class(base: type) -> Any:
    """Return the class of fused SAEs of a class of SAELens.

    Raises:
        InputError: not a class of SAEs for inference of sae-lens 6.
    """
    parents = [parent.__name__ for parent in base.__mro__ if _is_sae_lens(parent)]
    if "SAE" not in parents:
        advice = "For a dspa.FrozenSAE: dspa_kernels.nn.FusedSAE(sae). For a model: fuse its SAEs."
        if issubclass(base, FusedSAE):
            advice = "It runs on the kernels already. To keep gradients and hooks, fuse the SAE of SAELens instead."
        raise _refusal(base, "", advice)
    if "TrainingSAE" in parents:
        raise _refusal(base, ", which is for training", "Load what its save_inference_model() wrote, and fuse that.")
    owners = {name: _owner(base, name) for name in ("encode", "decode", "forward")}
    for name, owner in owners.items():
        if not _is_sae_lens(owner):
            raise _refusal(base, f", whose own `{name}` a kernel would skip", f"Fuse an SAE without {owner.__name__}.")
    attributes = {
        "__doc__": base.__doc__,
        "__module__": __name__,
        "sae_lens_class": base,
        "sae_lens_encoder": owners["encode"].__name__,
        "is_transcoder": owners["decode"].__name__ == "Transcoder",
    }
    return types.new_class(
        f"Fused{base.__name__}", (FusedCalls, base), exec_body=lambda names: names.update(attributes)
    )


def _empty(base: type) -> Any:
    """Return a fused SAE of a class of SAELens without content, which unpickling fills."""
    fused = _fused_class(base)
    return fused.__new__(fused)


def _is_made_in_sae_lens(value: object) -> bool:
    return isinstance(value, types.FunctionType) and _is_sae_lens(value) and "<locals>" in value.__qualname__


def _owner(cls: type, method: str) -> type:
    """Return the class that defines a method."""
    return next(parent for parent in cls.__mro__ if method in vars(parent))


def _is_sae_lens(value: type | types.FunctionType) -> bool:
    return value.__module__.startswith("sae_lens.saes.")


def _refusal(base: type, reason: str, advice: str = "") -> InputError:
    return refuse("sae", f"a {base.__module__}.{base.__qualname__}{reason}", ACCEPTED, advice)
