"""The steps of SAELens' tutorials, with SAEs that are fused and that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dspa_kernels import fuse, unfuse

from ..rounding import assert_same_logits
from .saes import D_IN, make_sae

D_VOCAB = 40
# SAEs of three places in one model, by hook name.
PLACES = {
    "blocks.0.hook_resid_pre": "jumprelu",
    "blocks.0.attn.hook_z": "standard",
    "blocks.1.hook_mlp_out": "topk",
}
RESIDUAL = "blocks.0.hook_resid_pre"


@pytest.fixture(scope="module")
def model() -> Any:
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: there is nothing to fuse")
    transformer_lens = pytest.importorskip("transformer_lens")
    config = transformer_lens.HookedTransformerConfig(
        n_layers=2, d_model=D_IN, n_ctx=32, d_head=32, d_mlp=512, d_vocab=D_VOCAB, act_fn="gelu", seed=0
    )
    return sae_lens.HookedSAETransformer(config)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(D_VOCAB, (3, 9), generator=torch.Generator().manual_seed(2))


def make_saes() -> dict[str, Any]:
    saes = {}
    for name, arch in PLACES.items():
        is_z = name.endswith("hook_z")
        saes[name] = make_sae(arch, hook_name=name, reshape_activations="hook_z" if is_z else "none")
        # Inputs are shorter than those that these SAEs expect.
        scale = 4 if name == "blocks.1.hook_mlp_out" else 40 if is_z else 60
        saes[name].W_enc.data *= scale
        saes[name].W_dec.data /= scale
    return saes


def run_with_saes(model: Any, saes: dict[str, Any], tokens: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        logits = model.run_with_saes(tokens, saes=list(saes.values()))
        with_error = model.run_with_saes(tokens, saes=list(saes.values()), use_error_term=True)
        one, cache = model.run_with_cache_with_saes(tokens, saes=saes[RESIDUAL])
    return {"logits": logits, "error": with_error, "one": one} | {
        name: cache[f"{RESIDUAL}.{name}"] for name in ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post")
    }


def ablate_features(model: Any, saes: dict[str, Any], tokens: Tensor) -> dict[str, Tensor]:
    """Set one latent at a time to 0, in place as the tutorials do."""
    sae = saes[RESIDUAL]
    with torch.no_grad():
        _, cache = model.run_with_cache_with_saes(tokens, saes=sae)
        active = cache[f"{RESIDUAL}.hook_sae_acts_post"].amax(dim=(0, 1)).topk(4).indices.tolist()

        def ablate(acts: Tensor, hook: Any, latent: int) -> Tensor:
            acts[:, :, latent] = 0
            return acts

        logits = {}
        for latent in active:
            hooks = [(f"{RESIDUAL}.hook_sae_acts_post", lambda acts, hook, latent=latent: ablate(acts, hook, latent))]
            with model.saes(sae, use_error_term=True):
                logits[str(latent)] = model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert not torch.equal(*list(logits.values())[:2])
    return logits


def attribute(model: Any, saes: dict[str, Any], tokens: Tensor) -> dict[str, Tensor]:
    """Attribute a difference of logits to latents: their values times the gradient, of one backward pass."""
    acts: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}
    for name in saes:
        model.add_sae(saes[name], use_error_term=True)
    hook_of = {f"{name}.hook_sae_acts_post": name for name in saes}
    with model.hooks(
        fwd_hooks=[(point, lambda value, hook: acts.update({hook.name: value.detach().clone()})) for point in hook_of],
        bwd_hooks=[(point, lambda value, hook: grads.update({hook.name: value.detach().clone()})) for point in hook_of],
    ):
        logits = model(tokens)
        (logits[:, -1, 3] - logits[:, -1, 5]).sum().backward()
    model.reset_saes()
    model.zero_grad()
    assert grads.keys() == acts.keys() == hook_of.keys()
    return {"logits": logits.detach()} | {point: acts[point] * grads[point] for point in hook_of}


def logit_lens(model: Any, saes: dict[str, Any], tokens: Tensor) -> dict[str, Tensor]:
    return {"logits": (saes[RESIDUAL].W_dec @ model.W_U).detach()}


def steer(model: Any, saes: dict[str, Any], tokens: Tensor) -> dict[str, Tensor]:
    direction = saes[RESIDUAL].W_dec[7]
    hooks = [(RESIDUAL, lambda h, hook: h + 5.0 * direction)]
    with torch.no_grad():
        return {
            "logits": model.run_with_hooks(tokens, fwd_hooks=hooks),
            "through the SAE": model.run_with_hooks_with_saes(
                tokens, saes=saes["blocks.1.hook_mlp_out"], fwd_hooks=hooks
            ),
        }


def generate(model: Any, saes: dict[str, Any], tokens: Tensor) -> dict[str, Tensor]:
    with torch.no_grad(), model.saes(list(saes.values())):
        new = model.generate(tokens, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    return {"tokens": new.float()}


STEPS = (run_with_saes, ablate_features, attribute, logit_lens, steer, generate)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_tutorial(step: Any, model: Any, tokens: Tensor) -> None:
    expected = step(model, make_saes(), tokens)
    saes = {name: fuse(sae) for name, sae in make_saes().items()}
    results = step(model, saes, tokens)
    assert results.keys() == expected.keys() and not model.acts_to_saes
    for name, result in results.items():
        assert expected[name].abs().max() > 0, f"{name} shows nothing"
        assert_same_logits(result, expected[name])
    for sae in saes.values():
        unfuse(sae)


def test_saes_that_are_attached_can_be_fused(model: Any, tokens: Tensor) -> None:
    saes = make_saes()
    for sae in saes.values():
        model.add_sae(sae)
    with torch.no_grad():
        expected = model(tokens)
        for sae in model.acts_to_saes.values():
            fuse(sae)
        assert_same_logits(model(tokens), expected)
        model.reset_saes()
        assert not torch.allclose(model(tokens), expected)


def test_transcoder_in_a_model(model: Any, tokens: Tensor) -> None:
    logits = []
    for is_fused in (False, True):
        transcoder = make_sae("jumprelu_skip_transcoder", hook_name="blocks.0.mlp.hook_in", d_out=D_IN)
        transcoder.cfg.metadata.hook_name_out = "blocks.0.hook_mlp_out"
        with torch.no_grad():
            for error in (False, True):
                sae = fuse(transcoder) if is_fused else transcoder
                logits.append(model.run_with_saes(tokens, saes=sae, use_error_term=error))
    assert_same_logits(logits[2], logits[0])
    assert_same_logits(logits[3], logits[1])
    assert not torch.allclose(logits[0], logits[1])
