"""The closed-form costs against what PyTorch counts, and against the published figures."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dspa import Triple, collect
from dspa.cli import main
from dspa.maps import passes
from dspa.maps.cost import PUBLISHED, Geometry, Tokens, rahf_scit, shared_prompt, three_passes
from dspa.testing import ENGLISH, make_sae, word_tokenizer

VOCABULARY = 128


def tiny(g: Geometry) -> tuple[Geometry, PreTrainedModel]:
    """A model of a published one's proportions: all its layers and heads, and d_head 4 instead of 256 or 128."""
    scale = g.d_head // 4
    small = Geometry(
        name=g.name,
        d_model=g.d_model // scale // g.n_heads * g.n_heads,
        d_mlp=g.d_mlp // scale,
        n_layers=g.n_layers,
        n_heads=g.n_heads,
        n_kv_heads=g.n_kv_heads,
        d_head=4,
        vocabulary=VOCABULARY,
        layer_out=g.layer_out,
    )
    config = CONFIG_MAPPING["gemma2" if g.name.startswith("Gemma") else "qwen3"](
        hidden_size=small.d_model,
        intermediate_size=small.d_mlp,
        num_hidden_layers=small.n_layers,
        num_attention_heads=small.n_heads,
        num_key_value_heads=small.n_kv_heads,
        head_dim=small.d_head,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    # Eager attention computes all pairs, as the formulas say.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    return small, model.eval()


def exactly(flops: float) -> Any:
    """Some versions of transformers compute the angles of rotary embeddings by a product of negligible size."""
    return pytest.approx(flops, rel=1e-6)


def words(n: int, start: int) -> str:
    return " ".join(ENGLISH[(start + i) % len(ENGLISH)] for i in range(n))


@pytest.mark.parametrize("g", PUBLISHED, ids=lambda g: g.name)
@pytest.mark.parametrize("lengths", [(16, 16, 16), (20, 7, 13)])
def test_the_account_is_what_pytorch_counts(
    g: Geometry, lengths: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    g, model = tiny(g)
    t = Tokens(*lengths)
    n_prompt = t.prompt - 1  # and <bos>
    triple = Triple(words(n_prompt, 0), f" {words(t.chosen, 3)}", f" {words(t.rejected, 9)}")
    tokenizer = word_tokenizer()

    ids = [tokenizer(triple.prompt)["input_ids"]]
    ids += [
        ids[0] + tokenizer(response, add_special_tokens=False)["input_ids"]
        for response in (triple.chosen, triple.rejected)
    ]
    assert [len(sequence) for sequence in ids] == [t.prompt, t.prompt + t.chosen, t.prompt + t.rejected]
    with FlopCounterMode(display=False) as published, torch.no_grad():
        for sequence in ids:
            model(input_ids=torch.tensor([sequence]), use_cache=False)
    assert published.get_total_flops() == exactly(three_passes(g, t).total)

    total, read = 0, passes.read_layers

    def counted(*args: Any, **kwargs: Any) -> dict[int, Tensor]:
        nonlocal total
        with FlopCounterMode(display=False) as counter:
            layers = read(*args, **kwargs)
        total += counter.get_total_flops()
        return layers

    monkeypatch.setattr(passes, "read_layers", counted)
    saes = [make_sae(layer, 32, d_in=g.d_model) for layer in (1, g.layer_out)]
    collect(model, tokenizer, [triple], *saes, progress=False)
    # Responses are padded to the longer one.
    longer = max(t.chosen, t.rejected)
    padded = Tokens(t.prompt, longer, longer)
    assert total == exactly(shared_prompt(g, padded).total)
    assert shared_prompt(g, t).total <= total < three_passes(g, t).total


@pytest.mark.parametrize(
    ("g", "fewer", "than_rahf"),
    [(g, *ratios) for g, ratios in zip(PUBLISHED, ((2.24, 10.01), (1.94, 8.69), (3.44, 15.39)), strict=True)],
    ids=lambda value: getattr(value, "name", None),
)
def test_ratios_at_a_thousand_tokens_each(g: Geometry, fewer: float, than_rahf: float) -> None:
    ours = shared_prompt(g, Tokens()).weights
    assert three_passes(g, Tokens()).weights / ours == pytest.approx(fewer, abs=0.005)
    assert rahf_scit(g).weights / ours == pytest.approx(than_rahf, abs=0.005)


def test_published_figures() -> None:
    """With P = 8e9: 8e13 for three passes and 3.58e14 for RAHF-SCIT, 4.47 times as much."""
    g = Geometry("8e9 weights", 8_000, 0, 0, 0, 0, 0, 1_000_000, 0)
    assert g.weights == 8e9
    assert three_passes(g, Tokens()).total == 8e13
    assert rahf_scit(g).total == pytest.approx(3.58e14, rel=1e-3)
    assert rahf_scit(g).total / three_passes(g, Tokens()).total == pytest.approx(4.47, abs=0.005)


def test_sizes_of_the_models() -> None:
    """Parameters in billions that multiply a token: Gemma's embedding is its head too, Qwen's is not."""
    assert [round(g.weights / 1e9, 2) for g in PUBLISHED] == [2.61, 9.24, 7.57]


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["dspa", "map", "cost", "--prompt", "1000"])
    with pytest.raises(SystemExit) as stop:
        main()
    out = capsys.readouterr().out
    assert not stop.value.code
    for g in PUBLISHED:
        ratio = three_passes(g, Tokens()).weights / shared_prompt(g, Tokens()).weights
        assert re.search(rf"{g.name}.* {ratio:.2f}x", out)
