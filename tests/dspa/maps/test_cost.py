"""The closed-form costs against what PyTorch counts, and against the published figures."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dspa import ModelError, SteeringConfig, Triple, collect
from dspa.cli import main
from dspa.maps import counting, passes
from dspa.maps.cost import (
    PUBLISHED,
    Setup,
    Tokens,
    collecting,
    encoding,
    lookup_bytes,
    prompt_reading,
    rahf_scit,
    step_bytes,
    three_passes,
)
from dspa.models.sizes import ModelSizes, sizes_of
from dspa.testing import ENGLISH, L_IN, L_OUT, make_map, make_model, make_sae, word_tokenizer

VOCABULARY = 128
# d_model, d_mlp, layers, heads, key and value heads, d_head, vocabulary; from the models' configurations.
SHAPES = {
    "Gemma-2-2B": (2304, 9216, 26, 8, 4, 256, 256_000),
    "Gemma-2-9B": (3584, 14336, 42, 16, 8, 256, 256_000),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, 128, 151_936),
}


def make(name: str, scale: int = 1, **other: Any) -> PreTrainedModel:
    """A model of a published one's shape, its widths divided by `scale`."""
    d_model, d_mlp, n_layers, n_heads, n_kv_heads, d_head, vocabulary = SHAPES[name]
    config = CONFIG_MAPPING["gemma2" if name.startswith("Gemma") else "qwen3"](
        hidden_size=d_model // scale // n_heads * n_heads,
        intermediate_size=d_mlp // scale,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=d_head // scale,
        **{"vocab_size": vocabulary} | other,
    )
    # Eager attention computes all pairs, as the formulas say.
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def tiny(setup: Setup) -> tuple[Setup, PreTrainedModel]:
    """A model of a published one's proportions: all its layers and heads, and d_head 4 instead of 256 or 128."""
    torch.manual_seed(0)
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    name = setup.model.name
    model = make(name, SHAPES[name][5] // 4, max_position_embeddings=64, **tokens)
    return replace(setup, model=sizes_of(model)), model


def exactly(flops: float) -> Any:
    """Some versions of transformers compute the angles of rotary embeddings by a product of negligible size."""
    return pytest.approx(flops, rel=1e-6)


def operations(model: PreTrainedModel, sequences: list[list[int]]) -> int:
    """Operations that PyTorch counts in passes over some sequences, one at a time."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for sequence in sequences:
            model(input_ids=torch.tensor([sequence]), use_cache=False)
    return int(counter.get_total_flops())


def words(n: int, start: int) -> str:
    return " ".join(ENGLISH[(start + i) % len(ENGLISH)] for i in range(n))


@pytest.mark.parametrize("setup", PUBLISHED, ids=lambda setup: setup.model.name)
@pytest.mark.parametrize("lengths", [(16, 16, 16), (20, 7, 13)])
def test_the_account_is_what_pytorch_counts(
    setup: Setup, lengths: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, model = tiny(setup)
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
    assert operations(model, ids) == exactly(three_passes(setup, t).total)

    total, read = 0, passes.read_layers

    def counted(*args: Any, **kwargs: Any) -> dict[int, Tensor]:
        nonlocal total
        with FlopCounterMode(display=False) as counter:
            layers = read(*args, **kwargs)
        total += counter.get_total_flops()
        return layers

    monkeypatch.setattr(passes, "read_layers", counted)
    saes = [make_sae(layer, 32, d_in=setup.model.d_model) for layer in (1, setup.layer_out)]
    costs = collect(model, tokenizer, [triple], *saes, progress=False).costs
    with_saes = replace(setup, layer_in=1, d_sae_in=32, d_sae_out=32)
    assert costs is not None and costs.flops == collecting(with_saes, t).total + encoding(with_saes, t)
    # Responses are padded to the longer one.
    longer = max(t.chosen, t.rejected)
    padded = Tokens(t.prompt, longer, longer)
    assert total == exactly(collecting(setup, padded).total)
    assert collecting(setup, t).total <= total < three_passes(setup, t).total

    # As with recurrent layers.
    total, whole = 0, replace(setup, layer_in=1, shares_prompts=False)
    monkeypatch.setattr(counting, "shares_prompts", lambda _: False)
    with pytest.warns(UserWarning, match="keeps more of a prompt"):
        collect(model, tokenizer, [triple], *saes, progress=False)
    assert total == exactly(collecting(whole, padded).total)


@pytest.mark.parametrize(
    ("setup", "fewer", "than_rahf"),
    [(s, *ratios) for s, ratios in zip(PUBLISHED, ((2.24, 10.01), (1.94, 8.69), (3.44, 15.39)), strict=True)],
    ids=lambda value: getattr(value, "layer_out", None),
)
def test_ratios_at_a_thousand_tokens_each(setup: Setup, fewer: float, than_rahf: float) -> None:
    ours = collecting(setup, Tokens()).weights
    assert three_passes(setup, Tokens()).weights / ours == pytest.approx(fewer, abs=0.005)
    assert rahf_scit(setup).weights / ours == pytest.approx(than_rahf, abs=0.005)


def test_published_figures() -> None:
    """With P = 8e9: 8e13 for three passes and 3.58e14 for RAHF-SCIT, 4.47 times as much."""
    model = ModelSizes("8e9 weights", 8_000, (0, 0), 8_000_000_000, 0, torch.bfloat16)
    setup = Setup(model, 0, 1, 0, 0)
    assert model.weights == 8e9
    assert three_passes(setup, Tokens()).total == 8e13
    assert rahf_scit(setup).total == pytest.approx(3.58e14, rel=1e-3)
    assert rahf_scit(setup).total / three_passes(setup, Tokens()).total == pytest.approx(4.47, abs=0.005)


@pytest.mark.parametrize("setup", PUBLISHED, ids=lambda setup: setup.model.name)
def test_sizes_of_the_published_models(setup: Setup) -> None:
    """The sizes that are written down, against transformers' own modules."""
    with torch.device("meta"):
        model = make(setup.model.name)
    sizes = sizes_of(model, "bfloat16")
    assert replace(sizes, name=setup.model.name) == setup.model
    # Gemma's embedding is its head too, Qwen's is not; norms multiply no vectors.
    stored = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert sizes.weights == stored - (0 if model.config.tie_word_embeddings else sizes.head)


def test_layers_that_a_model_does_not_have() -> None:
    with pytest.raises(ModelError, match="The layers of the SAEs is 24 and 7; accepted: layers of Gemma-2-2B, 0 to 25"):
        replace(PUBLISHED[0], layer_in=24, layer_out=7)
    with pytest.raises(ModelError, match="is 7 and 26"):
        replace(PUBLISHED[0], layer_out=26)


# Steering


def test_bytes_of_steering() -> None:
    """The encoder takes 75.5, 117 and 537 MB in bf16; a row has a bias and a threshold in fp32."""
    config = SteeringConfig()
    for setup, megabytes in zip(PUBLISHED, (75.5, 117, 537), strict=True):
        fewest, most = step_bytes(setup, config)
        row = 2 * setup.model.d_model
        assert setup.d_sae_out * row == pytest.approx(1e6 * megabytes, rel=0.005)
        assert fewest == 16 * (row + 8)
        assert most - fewest == (setup.d_sae_out + 64) * (row + 8) + 16 * row
        assert step_bytes(setup, SteeringConfig(mode="both"))[0] == 2 * fewest
    assert lookup_bytes(replace(PUBLISHED[0], n_columns=160), config) == 4 * 16_384 + 4 * 32 * 160


def test_operations_of_reading_a_prompt() -> None:
    setup = PUBLISHED[0]
    cost = prompt_reading(setup, 100)
    assert cost.weights == 200 * (sum(setup.model.layers[:8]) + 2304 * 16_384)
    assert encoding(setup, Tokens(100, 50, 30)) == 2 * 2304 * 16_384 * 180


# The command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Run `dspa map cost` with options; return the exit code and all that it printed, on wide lines."""
    monkeypatch.setenv("COLUMNS", "400")

    def command(*options: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["dspa", "map", "cost", *map(str, options)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out + captured.err

    return command


def line_of(text: str, name: str) -> list[str]:
    """Values in the line of a table."""
    return [cell.strip() for cell in re.search(rf"│ {re.escape(name)} (.*)│", text)[1].split("│")[1:-1]]


def test_command_without_a_model(run: Callable[..., tuple[int, str]]) -> None:
    code, text = run("--prompt", 1000)
    assert not code and "nothing was measured" in text
    ratios = [three_passes(s, Tokens()).weights / collecting(s, Tokens()).weights for s in PUBLISHED]
    assert line_of(text, "published / collect") == [f"{ratio:.2f}x" for ratio in ratios]


def test_command_for_a_model_and_its_map(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    saes = make_sae(L_IN, 96, seed=1), make_sae(L_OUT, 128, seed=2)
    for name, sae in zip(("in", "out"), saes, strict=True):
        sae.save(tmp_path / name)
    make_map(*saes).save(tmp_path / "map")
    # No weights: the configuration alone is read.
    make_model("llama").config.save_pretrained(tmp_path / "tiny-llama")
    model = ["--model", tmp_path / "tiny-llama", "--dtype", "float16"]
    code, text = run(*model, "--sae-in", tmp_path / "in", "--sae-out", tmp_path / "out")
    assert not code, text
    assert "tiny-llama" in text and line_of(text, "data type") == ["float16"]
    assert line_of(text, "encoder of the input SAE, MB") == [f"{1e-6 * 96 * 48 * 2:.4g}"]
    assert line_of(text, "lookup, MB per prompt") == ["needs a map"]
    code, with_map = run(*model, "--map", tmp_path / "map")
    assert not code and line_of(with_map, "lookup, MB per prompt") == [f"{1e-6 * (4 * 96 + 4 * 32 * 40):.4g}"]
    for name in ("collect, TFLOP per triple", "steering, most MB per token", "reading a prompt first"):
        assert line_of(with_map, name) == line_of(text, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--map", "{}/map"], "--model is not given, nor recorded in a map"),
        (["--model", "{}/m"], "--sae-in or --sae-out is not given; accepted: both of them, or --map"),
        (["--model", "{}/m", "--map", "{}/map", "--sae-in", "{}/in"], "--map and SAEs were given"),
        (["--model", "{}/m", "--sae-in", "{}/in", "--sae-out", "{}/wide"], "--sae-out is an SAE of width 20"),
        (["--model", "{}/m", "--sae-in", "{}/out", "--sae-out", "{}/in"], "is 2 and 1; accepted: layers of m"),
        (["--model", "{}/m", "--map", "{}/map", "--dtype", "int8"], "--dtype is 'int8'"),
    ],
    ids=str,
)
def test_command_refuses(run: Callable[..., tuple[int, str]], tmp_path: Path, options: list[str], message: str) -> None:
    saes = make_sae(L_IN, 96, seed=1), make_sae(L_OUT, 128, seed=2)
    saes[0].save(tmp_path / "in")
    saes[1].save(tmp_path / "out")
    make_sae(L_OUT, 64, d_in=20).save(tmp_path / "wide")
    make_map(*saes).save(tmp_path / "map")
    make_model("llama").config.save_pretrained(tmp_path / "m")
    code, text = run(*(option.format(tmp_path) for option in options))
    assert code == 2 and message in text
