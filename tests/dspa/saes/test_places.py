"""SAEs that are not on the residual stream: they encode and decode as SAELens' do, and steer nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dspa
from dspa.errors import SAEError
from dspa.fsrl import FSRLAdapter
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import required_layer
from dspa.saes.quality import evaluate_sae
from dspa.saes.training import finetune_sae
from dspa.testing import make_map, make_model, word_tokenizer

from ..support.saes import D_IN, D_SAE, close, decoded_rounding, make, named
from .formats.test_saelens import D_OUT, PLACES, TRANSCODERS, transcoder


def close_output(actual: Tensor, expected: Tensor, f: Tensor, W_dec: Tensor, h: Tensor, W_skip: Tensor | None) -> None:
    """Outputs equal up to fp32 rounding."""
    atol = decoded_rounding(f, W_dec) + (0.0 if W_skip is None else decoded_rounding(h, W_skip.T))
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("form", ["object", "folder", "saved"])
@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_transcoders(h: Tensor, tmp_path: Path, architecture: str, form: str) -> None:
    theirs = transcoder(architecture)
    theirs.save_model(tmp_path / "theirs")
    ours = FrozenSAE.from_sae_lens(theirs) if form == "object" else FrozenSAE.load(tmp_path / "theirs")
    if form == "saved":
        ours.save(tmp_path / "ours")
        fingerprint, ours = ours.fingerprint, FrozenSAE.load(tmp_path / "ours")
        assert ours.fingerprint == fingerprint
        loaded = type(theirs).load_from_disk(tmp_path / "ours")
        assert type(loaded) is type(theirs) and torch.equal(loaded(h), theirs(h))
        assert loaded.cfg.metadata.hook_name_out == PLACES["hook_name_out"]
    with torch.no_grad():
        f, output = theirs.encode(h), theirs(h)
    close(ours.encode(h), f)
    close_output(ours.decode(f, like=h), output, f, ours.W_dec, h, ours.W_skip)
    assert (ours.layer, ours.hook_name, ours.hook_name_out) == (None, PLACES["hook_name"], PLACES["hook_name_out"])
    assert ours.transcoder and (ours.d_in, ours.d_out) == (D_IN, D_OUT)
    assert (ours.W_skip is not None) == ("skip" in architecture)
    assert f"d_out={D_OUT}" in repr(ours) and "ln2.hook_normalized" in repr(ours)
    narrow = ours.to(dtype=torch.bfloat16)
    assert narrow.W_skip is None or narrow.W_skip.dtype == torch.bfloat16
    assert narrow.fingerprint == ours.fingerprint


def test_a_skip_connection_is_a_part_of_the_sae(tmp_path: Path) -> None:
    theirs = transcoder("skip_transcoder")
    first = FrozenSAE.from_sae_lens(theirs)
    with pytest.raises(SAEError, match=r"`like` is None.*adds W_skip times its input"):
        first.decode(torch.zeros(D_SAE))
    with torch.no_grad():
        theirs.W_skip[0, 0] += 1
    second = FrozenSAE.from_sae_lens(theirs)
    assert first.fingerprint != second.fingerprint
    assert second.W_skip is not None
    second.W_skip[0, 0] -= 1
    with pytest.raises(SAEError, match="changed \\(W_skip\\)"):
        second.check_unchanged()


def test_attention_heads(h: Tensor, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="needs the package sae-lens")
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.5.attn.hook_z", model_name="m")
    config = sae_lens.StandardSAEConfig(d_in=D_IN, d_sae=D_SAE, reshape_activations="hook_z", metadata=metadata)
    theirs = sae_lens.StandardSAE(config)
    theirs.load_state_dict(named("W_enc", "b_enc", "W_dec", "b_dec"))
    FrozenSAE.from_sae_lens(theirs).save(tmp_path)
    ours, again = FrozenSAE.load(tmp_path), sae_lens.StandardSAE.load_from_disk(tmp_path)
    heads = h.unflatten(-1, (3, D_IN // 3))
    with torch.no_grad():
        f, output = theirs.encode(heads), theirs(heads)
        torch.testing.assert_close(again(heads), output)
    close(ours.encode(heads), f)
    close(ours.encode(h), f)
    torch.testing.assert_close(ours.decode(f, like=heads), output, rtol=0, atol=decoded_rounding(f, ours.W_dec))
    torch.testing.assert_close(ours.decode(f), output.flatten(-2), rtol=0, atol=decoded_rounding(f, ours.W_dec))


@pytest.mark.parametrize(
    ("hook", "centred"),
    [
        ("blocks.5.hook_mlp_out", True),
        ("blocks.5.hook_attn_out", True),
        ("blocks.5.hook_resid_mid", True),
        ("blocks.5.attn.hook_z", False),
        ("blocks.5.mlp.hook_post", False),
        ("blocks.5.ln1.hook_normalized", False),
    ],
)
def test_what_is_written_to_a_centred_stream_is_centred(tmp_path: Path, hook: str, centred: bool) -> None:
    make("standard").save(tmp_path)
    config = tmp_path / "cfg.json"
    cfg = json.loads(config.read_text())
    cfg["metadata"] = {"hook_name": hook, "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    config.write_text(json.dumps(cfg))
    assert FrozenSAE.load(tmp_path).centered == centred


def test_topk_transcoders_are_not_saved(tmp_path: Path) -> None:
    sae = make("topk", transcoder=True)
    assert sae.encode(torch.ones(2, D_IN)).shape == (2, D_SAE)
    with pytest.raises(SAEError, match="architecture to save is a topk transcoder"):
        sae.save(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"transcoder": True, "apply_b_dec_to_input": True}
            | {"W_dec": torch.ones(D_SAE, D_OUT), "b_dec": torch.ones(D_OUT)},
            "`apply_b_dec_to_input` of a transcoder is True, whose b_dec is of another width than its input",
        ),
        ({"transcoder": True, "W_skip": torch.zeros(D_IN, D_IN + 1)}, rf"`W_skip` is of shape \[{D_IN}, {D_IN + 1}\]"),
        ({"transcoder": True, "W_skip": torch.full((D_IN, D_IN), torch.nan)}, "`W_skip` is NaN or infinite in 144"),
        ({"W_skip": torch.zeros(D_IN, D_IN)}, "`W_skip` is given; accepted: None, but for a transcoder"),
        ({"reshape_activations": "hook_q"}, "`reshape_activations` is 'hook_q'; accepted: none, hook_z"),
    ],
)
def test_constructor_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SAEError, match=message):
        make("standard", **options)


# What reads, steers or trains on residuals

MODEL, TEXTS = "gemma2", ["the cat is red"] * 40


def collect(sae_in: FrozenSAE, sae: FrozenSAE) -> None:
    rows = [{"prompt": "the cat", "chosen": "is red", "rejected": "is old"}]
    dspa.collect(make_model(MODEL), word_tokenizer(), rows, sae_in, sae, progress=False)


def finetune(folder: Path, sae: FrozenSAE) -> None:
    texts = folder / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    finetune_sae(make_model(MODEL), word_tokenizer(), texts, sae, folder / "out", progress=False)


DOORS: dict[str, Callable[[Path, FrozenSAE, FrozenSAE, FrozenSAE], object]] = {
    "steer": lambda _, sae_in, good, sae: dspa.Steering(sae_in, sae, make_map(sae_in, good)).attach(make_model(MODEL)),
    "steer by": lambda _, sae_in, good, sae: dspa.Steering(sae, good, make_map(sae_in, good)).attach(make_model(MODEL)),
    "collect": lambda _, sae_in, good, sae: collect(sae_in, sae),
    "adapter": lambda _, sae_in, good, sae: FSRLAdapter(sae),
    "finetune": lambda folder, sae_in, good, sae: finetune(folder, sae),
    "tokens": lambda _, sae_in, good, sae: dspa.top_tokens(sae, make_model(MODEL), word_tokenizer(), [3]),
    "contexts": lambda _, sae_in, good, sae: dspa.top_contexts(sae, make_model(MODEL), word_tokenizer(), TEXTS, [3]),
    "layer": lambda _, sae_in, good, sae: required_layer(sae),
}


@pytest.mark.parametrize("place", ["blocks.2.hook_mlp_out", "blocks.2.attn.hook_z", "somewhere.2"])
@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_other_places(
    tmp_path: Path, sae_in: FrozenSAE, sae_out: FrozenSAE, door: str, place: str
) -> None:
    """With the width, the latents and the fingerprint of an SAE that fits."""
    original = sae_in if door == "steer by" else sae_out
    original.save(tmp_path / "sae")
    config = tmp_path / "sae" / "cfg.json"
    cfg = json.loads(config.read_text())
    cfg["metadata"]["hook_name"] = place
    config.write_text(json.dumps(cfg))
    sae = FrozenSAE.load(tmp_path / "sae")
    assert sae.fingerprint == original.fingerprint
    assert torch.equal(sae.encode(torch.ones(2, sae.d_in)), original.encode(torch.ones(2, sae.d_in)))
    with pytest.raises(SAEError, match=rf"the place of this SAE is '{place}'; accepted: the output of a decoder layer"):
        DOORS[door](tmp_path, sae_in, sae_out, sae)


def test_a_transcoder_has_no_reconstruction_to_judge() -> None:
    with pytest.raises(SAEError, match="accepted: an SAE, which decodes to the rows that it encoded"):
        evaluate_sae(make("standard", transcoder=True), torch.ones(4, D_IN))
