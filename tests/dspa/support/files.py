"""The files of a user."""

from __future__ import annotations

from pathlib import Path

from dspa.testing import L_IN, L_OUT, make_model, make_sae, word_tokenizer


def save_model_and_saes(folder: Path) -> None:
    """Save a model with its tokenizer (`tiny`) and two SAEs of it (`sae_in`, `sae_out`)."""
    make_model("gemma2").save_pretrained(folder / "tiny")
    word_tokenizer().save_pretrained(folder / "tiny")
    make_sae(L_IN, 96, seed=1).save(folder / "sae_in")
    make_sae(L_OUT, 128, seed=2).save(folder / "sae_out")
