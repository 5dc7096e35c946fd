"""SAEs of residuals less their mean (`center_writing_weights`), against TransformerLens and SAELens themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dspa
from dspa.errors import AdapterError, MapError, ModelError, SAEError
from dspa.fsrl import FSRLAdapter
from dspa.saes.config import SAETrainingConfig
from dspa.saes.frozen import FrozenSAE
from dspa.saes.quality import evaluate_sae
from dspa.saes.training import finetune_sae, read_qualities
from dspa.testing import ENGLISH, make_map, make_model, make_sae, word_tokenizer
from dspa_kernels.nn import FusedSAE

from ...rounding import PASS, rounding
from ..support.saes import OF_ARCH, named

sae_lens = pytest.importorskip("sae_lens")

LAYER, D_IN, D_SAE, K = 2, 48, 96, 9
IDS = torch.randint(3, 61, (4, 20), generator=torch.Generator().manual_seed(3))
CENTERED = {"center_writing_weights": True}
ARCHITECTURES = ("standard", "jumprelu", "topk", "gated")


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """A GPT-2 whose residuals have a mean well away from 0."""
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight += 0.5
        for block in model.transformer.h:
            block.mlp.c_proj.bias += 0.3
    return model


@pytest.fixture(scope="module")
def h(gpt2: Any) -> Tensor:
    with torch.no_grad():
        return gpt2(IDS, output_hidden_states=True).hidden_states[LAYER + 1]


@pytest.fixture(scope="module")
def hooked(gpt2: Any) -> Any:
    """The same model as TransformerLens loads it with `center_writing_weights`."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    sizes = {"n_layers": 4, "d_model": D_IN, "n_ctx": 128, "d_head": 12, "n_heads": 4, "d_vocab": 61, "d_mlp": 4 * D_IN}
    config = HookedTransformerConfig(**sizes, act_fn="gelu_new", normalization_type="LN", eps=1e-5)
    model = HookedTransformer(config)
    off = dict.fromkeys(("fold_ln", "center_unembed", "fold_value_biases"), False)
    model.load_and_process_state_dict(convert_gpt2_weights(gpt2, config), center_writing_weights=True, **off)
    return model


@pytest.fixture(scope="module")
def centred(hooked: Any) -> Tensor:
    """The residual that these SAEs were trained on."""
    _, cache = hooked.run_with_cache(IDS)
    return cache[f"blocks.{LAYER}.hook_resid_post"]


def their_sae(arch: str, kwargs: dict[str, Any] | None = CENTERED, **cfg: Any) -> Any:
    """SAELens' SAE of random weights."""
    kind = {"standard": "Standard", "jumprelu": "JumpReLU", "topk": "TopK", "gated": "Gated"}[arch]
    cfg |= {"k": K} if arch == "topk" else {}
    config = getattr(sae_lens, f"{kind}SAEConfig")(d_in=D_IN, d_sae=D_SAE, **cfg)
    config.metadata["hook_name"] = f"blocks.{LAYER}.hook_resid_post"
    if kwargs is not None:
        config.metadata["model_from_pretrained_kwargs"] = kwargs
    sae = getattr(sae_lens, f"{kind}SAE")(config)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(sae.named_parameters()):
            size = {"W_enc": 1 / D_IN**0.5, "W_dec": 1 / D_IN**0.5, "r_mag": 0.3, "threshold": 0.5}.get(name, 0.2)
            parameter.copy_(size * torch.randn(parameter.shape, generator=g))
    return sae


def saved(sae: Any, folder: Path) -> Path:
    sae.save_model(folder)
    return folder


def test_the_residual_of_transformer_lens(h: Tensor, centred: Tensor) -> None:
    less_mean = h - h.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(less_mean, centred, rtol=0, atol=rounding(PASS, float(h.abs().max())))
    assert h.mean(dim=-1).abs().min() > 0.5


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("apply_b_dec", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_against_sae_lens(
    tmp_path: Path, h: Tensor, centred: Tensor, arch: str, apply_b_dec: bool, normalize: str
) -> None:
    """SAELens on the centred residual and ours on that of the model agree, and so do copies in our and their format."""
    cfg = {"apply_b_dec_to_input": apply_b_dec, "normalize_activations": normalize}
    theirs = their_sae(arch, **cfg | ({"rescale_acts_by_decoder_norm": True} if arch == "topk" else {}))
    ours = FrozenSAE.from_sae_lens(theirs)
    ours.save(tmp_path / "ours")
    back = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    with torch.no_grad():
        f = theirs.encode(centred)
        recon = theirs.decode(f)
        assert_close(back.encode(centred), f)
        error = centred - recon
        assert_close(centred - back.decode(back.encode(centred)), error)
    assert (f != 0).float().mean() > 0.02
    copies = [FrozenSAE.load(saved(theirs, tmp_path / "theirs")), FrozenSAE.load(tmp_path / "ours")]
    for sae in (ours, *copies, FrozenSAE.from_sae_lens(back)):
        assert_close(sae.encode(h), f)
        assert_close(h - sae.decode(sae.encode(h), like=h), error)
        assert sae.centered and sae.fingerprint == ours.fingerprint and sae.folded == ours.folded
    assert_close(ours.normalise(h), ours.normalise(centred))
    plain = FrozenSAE.from_sae_lens(theirs, center_writing_weights=False)
    assert not plain.centered and plain.fingerprint != ours.fingerprint
    if normalize == "none":
        assert ((plain.encode(h) != 0) != (f != 0)).float().mean() > 0.05


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Raise unless both are equal but for the rounding of two passes of a model, which every number comes from."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rounding(PASS, D_IN**0.5 * float(expected.abs().max())))


def test_quality_is_that_on_the_centred_residual(h: Tensor, centred: Tensor) -> None:
    theirs = their_sae("jumprelu")
    x = centred.flatten(0, 1).double()
    with torch.no_grad():
        recon = theirs.decode(theirs.encode(x.float())).double()
    quality = evaluate_sae(FrozenSAE.from_sae_lens(theirs), h.flatten(0, 1))
    error = (x - recon).square().sum()
    assert quality.explained_variance == pytest.approx(float(1 - error / (x - x.mean(0)).square().sum()), abs=1e-5)
    assert quality.mse == pytest.approx(float(error) / len(x), rel=1e-5)
    exact = evaluate_sae(FrozenSAE.from_sae_lens(theirs).to(dtype=torch.float64), x + 1e6)
    assert exact.mse == pytest.approx(quality.mse, rel=1e-5)


def test_an_edit_does_what_it_does_in_the_model_of_transformer_lens(gpt2: Any, hooked: Any, h: Tensor) -> None:
    """Decoder rows keep their mean: the LayerNorms that read them ignore it."""
    theirs = their_sae("jumprelu")
    adapter = FSRLAdapter(FrozenSAE.from_sae_lens(theirs))
    with torch.no_grad():
        adapter.W_a.normal_(generator=torch.Generator().manual_seed(4))
    v = adapter.steering_vector(h)

    def move(residual: Tensor, hook: Any) -> Tensor:
        f = theirs.encode(residual)
        return residual + ((f + v).relu() - f) @ theirs.W_dec

    name = f"blocks.{LAYER}.hook_resid_post"
    with torch.no_grad():
        expected = hooked.run_with_hooks(IDS, fwd_hooks=[(name, move)]).log_softmax(-1)
        before = gpt2(IDS).logits.log_softmax(-1)
        with adapter.attach(gpt2):
            after = gpt2(IDS).logits.log_softmax(-1)
    atol = rounding(2 * PASS, float(expected.abs().max()))
    torch.testing.assert_close(after, expected, rtol=0, atol=atol)
    assert (before - expected).abs().max() > 100 * atol


def test_the_constructor_and_what_it_cannot_do() -> None:
    sae = make_sae(LAYER, D_SAE, center_writing_weights=True)
    assert sae.centered and sae.folded == ("center_writing_weights",) and "center_writing_weights" in repr(sae)
    mean = sae.W_enc.mean(dim=0)
    assert mean.abs().max() < 1e-7 and sae.b_dec.shape == (D_IN,)
    with pytest.raises(SAEError, match=r"decode\(f, like=h\)"):
        sae.decode(torch.zeros(D_SAE))
    with pytest.raises(SAEError, match=r"constant_norm_rescale'.*accepted: none, layer_norm"):
        make_sae(LAYER, D_SAE, center_writing_weights=True, normalize_activations="constant_norm_rescale")


def test_a_model_without_layer_norm() -> None:
    """TransformerLens does not centre it, so the setting meant nothing."""
    llama, sae = make_model("llama"), make_sae(LAYER, D_SAE, center_writing_weights=True)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM has no LayerNorm.*center_writing_weights=False"):
        FSRLAdapter(sae).attach(llama)
    FSRLAdapter(make_sae(LAYER, D_SAE)).attach(llama).detach()
    FSRLAdapter(sae).attach(make_model("gpt_neox")).detach()


# What was made before centring was read


def test_what_was_made_without_centring(tmp_path: Path) -> None:
    plain = [make_sae(layer, D_SAE, seed=layer) for layer in (1, 2)]
    centred = [make_sae(layer, D_SAE, seed=layer, center_writing_weights=True) for layer in (1, 2)]
    cdmap = make_map(*plain)
    again = r"same SAE, but an earlier version .* without its center_writing_weights.* Make that again"
    with pytest.raises(MapError, match=again):
        dspa.Steering(*centred, cdmap)
    with pytest.raises(MapError, match=r"Are the two SAEs swapped"):
        cdmap.check_saes(*reversed(plain))
    FSRLAdapter(plain[1]).save(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=again):
        FSRLAdapter.load(tmp_path / "adapter", centred[1])
    with pytest.raises(AdapterError, match=r"Load that SAE"):
        FSRLAdapter.load(tmp_path / "adapter", make_sae(2, D_SAE, seed=7, center_writing_weights=True))


def test_fingerprints_of_other_saes_are_what_they_were() -> None:
    names = ("standard", "jumprelu", "topk")
    made = [FrozenSAE(a, **named(*OF_ARCH[a]), **({"k": 5} if a == "topk" else {})).fingerprint for a in names]
    assert made == ["f21eb53d869832a0", "b557a449a04b21ef", "07c7f19dab51fffb"]


# Files


def with_kwargs(folder: Path, kwargs: Any, *, flat: bool = False) -> Path:
    """Write a SAELens folder whose metadata hold these arguments, or none for the text "absent"."""
    theirs = saved(their_sae("jumprelu", None), folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    metadata = {"hook_name": f"blocks.{LAYER}.hook_resid_post", "model_name": "gpt2-small"}
    metadata |= {} if kwargs == "absent" else {"model_from_pretrained_kwargs": kwargs}
    cfg.pop("metadata")
    (folder / "cfg.json").write_text(json.dumps({**cfg, **metadata} if flat else {**cfg, "metadata": metadata}))
    return theirs


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("kwargs", "centered"),
    [
        ({"center_writing_weights": True}, True),
        ({"center_writing_weights": True, "fold_ln": True, "dtype": "bfloat16", "n_devices": 2}, True),
        ({"center_writing_weights": False, "center_unembed": True, "fold_value_biases": True}, False),
        ({"center_writing_weights": None, "checkpoint_value": None, "revision": "main"}, False),
        ({}, False),
        (None, False),
    ],
)
def test_arguments_of_the_model(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, flat: bool, kwargs: Any, centered: bool
) -> None:
    sae = FrozenSAE.load(with_kwargs(tmp_path, kwargs, flat=flat))
    assert sae.centered is centered and sae.layer == LAYER
    assert not [w for w in recwarn if "does not say" in str(w.message)]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"checkpoint_value": 3000},
        {"checkpoint_index": 0},
        {"revision": "step3000"},
        {"hf_model": "somewhere"},
        {"subfolder": "second", "center_writing_weights": True},
        {"rope_scaling": {"factor": 8.0}},
        {"center_writing_weights": "yes"},
    ],
)
def test_arguments_that_name_other_weights_or_are_unknown(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    name = next(iter(kwargs))
    with pytest.raises(SAEError, match=rf"{name}.*accepted: "):
        FrozenSAE.load(with_kwargs(tmp_path, kwargs))


def test_an_old_file_that_does_not_say(tmp_path: Path) -> None:
    """As that of gpt2-small-res-jb, for which only the catalogue of SAELens says it."""
    folder = with_kwargs(tmp_path, "absent", flat=True)
    with pytest.warns(UserWarning, match=r"does not say .* pass center_writing_weights=True or False"):
        plain = FrozenSAE.load(folder)
    centred = FrozenSAE.load(folder, center_writing_weights=True)
    assert (plain.centered, centred.centered) == (False, True)
    assert FrozenSAE.load(with_kwargs(tmp_path, CENTERED)).fingerprint == centred.fingerprint


def test_a_saved_copy_is_centred_once(tmp_path: Path) -> None:
    sae = make_sae(LAYER, D_SAE, center_writing_weights=True)
    sae.save(tmp_path)
    for stated in (None, True):
        again = FrozenSAE.load(tmp_path, center_writing_weights=stated)
        assert torch.equal(again.W_enc, sae.W_enc) and again.fingerprint == sae.fingerprint and again.centered
    with pytest.raises(SAEError, match=r"`center_writing_weights` is False, and it is folded into this copy"):
        FrozenSAE.load(tmp_path, center_writing_weights=False)
    with pytest.raises(SAEError, match=r"For a FusedSAE of this one: FusedSAE\(FrozenSAE\.load\(path\)\)"):
        FusedSAE.load(tmp_path)


def test_fine_tuning_from_a_centred_sae(tmp_path: Path, gpt2: Any, h: Tensor) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{' '.join(ENGLISH[n % 7 : n % 7 + 12])}\n" for n in range(60)))
    start = FrozenSAE.from_sae_lens(their_sae("jumprelu"))
    config = SAETrainingConfig(n_tokens=1600, batch_size=16, held_out_tokens=64, buffer_tokens=256, lr=3e-3)
    tuned = finetune_sae(gpt2, word_tokenizer(), texts, start, tmp_path / "sae", k=K, config=config, progress=False)
    before, after = read_qualities(tmp_path / "sae").values()
    assert after.explained_variance > before.explained_variance + 0.1
    assert tuned.centered and FrozenSAE.load(tmp_path / "sae").fingerprint == tuned.fingerprint
    shifted = h + 5
    assert_close(tuned.encode(shifted), tuned.encode(h))
