"""The files of a user."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from dspa.evaluate.responses import responses_of
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.models.sources import model_source
from dspa.saes.frozen import FrozenSAE
from dspa.testing import L_IN, L_OUT, make_map, make_model, make_sae, word_tokenizer

from .adapters import TRIPLES, acting_adapter


def save_model_and_saes(folder: Path) -> None:
    """Save a model with its tokenizer (`tiny`) and two SAEs of it (`sae_in`, `sae_out`)."""
    make_model("gemma2").save_pretrained(folder / "tiny")
    word_tokenizer().save_pretrained(folder / "tiny")
    make_sae(L_IN, 96, seed=1).save(folder / "sae_in")
    make_sae(L_OUT, 128, seed=2).save(folder / "sae_out")


def save_map_and_adapter(folder: Path, prompts: Sequence[str], *, strength: float = 1.0) -> None:
    """Also save a map (`map`) and an adapter (`adapter`) that know the model and its SAEs, and `prompts.txt`.

    At a `strength` of 20, the adapter moves far enough that other tokens are the likeliest.
    """
    save_model_and_saes(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    sae_in, sae_out = FrozenSAE.load(folder / "sae_in"), FrozenSAE.load(folder / "sae_out")
    source = model_source(model)
    assert source is not None and sae_in.source is not None and sae_out.source is not None
    cdmap = make_map(sae_in, sae_out)
    cdmap.sources = {"model": source, "sae_in": sae_in.source, "sae_out": sae_out.source}
    cdmap.save(folder / "map")
    adapter = acting_adapter(model, responses_of(model, tokenizer, TRIPLES), sae_out)
    adapter.W_a.mul_(strength)
    adapter.trained_on = source
    adapter.save(folder / "adapter")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))


def save_second_map(folder: Path, like: Path) -> None:
    """Save a map (`second`) of the input SAE of the map `like`, and of an output SAE (`sae_top`) one layer higher."""
    first = ConditionalDifferenceMap.load(like)
    make_sae(L_OUT + 1, 128, seed=3).save(folder / "sae_top")
    sae_in, top = FrozenSAE.load(like.parent / "sae_in"), FrozenSAE.load(folder / "sae_top")
    assert top.source is not None
    cdmap = make_map(sae_in, top, seed=1)
    cdmap.sources = {**first.sources, "sae_out": top.source}
    cdmap.save(folder / "second")
