"""`dspa.maps.build.build_map`: its map, its checks and its messages."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dspa import ConditionalDifferenceMap, FrozenSAE, PreferenceError, build_map, reduce
from dspa.maps.collect import collect
from dspa.testing import VOCAB

from ..support.counts import BAD_SETTINGS, same_bits


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


@pytest.fixture
def prefs(tmp_path: Path) -> Path:
    g = random.Random(5)
    path = tmp_path / "prefs.jsonl"

    def text() -> str:
        return " ".join(f"w{g.randrange(1, VOCAB)}" for _ in range(g.randrange(3, 10)))

    lines = [json.dumps({"prompt": text(), "chosen": f" {text()}", "rejected": f" {text()}"}) for _ in range(12)]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    "settings", [{}, {"percentile": 60.0, "gate_rule": "active", "k_diff": 2}, {"sparsify": False}], ids=str
)
def test_build_map_is_reduce_of_collect(
    model: PreTrainedModel, sae_in: FrozenSAE, sae_out: FrozenSAE, prefs: Path, settings: dict[str, Any]
) -> None:
    options = {"max_length": 12, "model_name": "mine", "progress": False}
    both = (model, make_tokenizer(), prefs, sae_in, sae_out)
    settings = settings | {"count_tokens": "text"}
    work = prefs.parent / "work"
    built = build_map(*both, work_dir=work, **options, **settings)
    assert same_bits(built, reduce(collect(*both, **options), **settings)) and same_bits(
        built, reduce(work, **settings)
    )
    assert same_bits(built, build_map(*both, batch_tokens=30, **options, **settings))
    assert (built.meta.count_tokens, built.meta.max_length, built.meta.n_triples) == ("text", 12, 12)
    assert settings.items() <= dataclasses.asdict(built.meta).items()
    assert built.meta.model_name == "mine" and built.meta.n_cut > 0
    built.check_saes(sae_in, sae_out)
    assert len(built.hot) > 1 and built.mean.shape == (sae_out.d_in,) and built.mean.any()
    built.save(prefs.parent / "map")
    assert same_bits(ConditionalDifferenceMap.load(prefs.parent / "map"), built)


@pytest.mark.parametrize(("settings", "message"), [*BAD_SETTINGS, ({"k_diff": 129}, "`k_diff` is 129.*width, 128")])
def test_build_map_checks_its_settings_first(
    model: PreTrainedModel, sae_in: FrozenSAE, sae_out: FrozenSAE, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_map(model, make_tokenizer(), "no such file", sae_in, sae_out, **settings)


def test_build_map_says_what_it_does(
    model: PreTrainedModel, sae_in: FrozenSAE, sae_out: FrozenSAE, prefs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build_map(model, make_tokenizer(), prefs, sae_in, sae_out)
    out, err = capfd.readouterr()
    assert out == "" and "12/12" in err and "survey" in err


def test_build_map_names_a_bad_line(model: PreTrainedModel, sae_in: FrozenSAE, sae_out: FrozenSAE, prefs: Path) -> None:
    prefs.write_text(prefs.read_text() + '\n{"prompt": "w1"}\n')
    with pytest.raises(PreferenceError, match=f"{prefs} line 13"):
        build_map(model, make_tokenizer(), prefs, sae_in, sae_out, progress=False)
