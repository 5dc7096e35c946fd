"""`dspa.models.sources`: the digest of a model's weights, and the place it came from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from dspa.models import sources
from dspa.models.sources import model_digest, model_source
from dspa.testing import make_model

from ..support.quantisers import KINDS, quantised


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_model("gemma2").save_pretrained(path)
    return path


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_loaded_in_any_dtype_has_the_digest_of_what_was_saved(family, dtype, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    assert model_digest(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == model_digest(model)


def test_other_weights_have_another_digest():
    model = make_model("gemma2")
    before = model_digest(model)
    assert model_digest(make_model("gemma2", seed=1)) != before
    # One step of training on one matrix, as much as bf16 can show.
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.02)
    assert model_digest(model) != before


def test_a_lora_is_another_model():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert model_digest(peft.get_peft_model(make_model("gemma2"), config)) != model_digest(make_model("gemma2"))


def test_a_source_is_an_absolute_path(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    source = model_source(AutoModelForCausalLM.from_pretrained("tiny"))
    assert source is not None and source.path == str(saved)


def test_a_model_that_was_not_loaded_has_no_source():
    assert model_source(make_model("gemma2")) is None


def test_offloaded_weights_have_no_source(saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.model.layers[3].to("meta")
    assert model_source(model) is None


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_take_part(kind, tmp_path):
    """In the layout too that bitsandbytes gives its weights in a pass."""
    model = quantised(kind, tmp_path)
    digest = model_digest(model)
    with torch.no_grad():
        model(torch.tensor([[1, 5, 9]]))
    assert model_digest(model) == digest != model_digest(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert model_digest(quantised(kind, tmp_path, scale=1.1)) != digest


def sampled_by_hand(weight: torch.Tensor) -> bytes:
    """The rule of earlier versions: 64 numbers at a fixed distance."""
    flat = weight.detach().reshape(-1)
    numbers = [flat[n] for n in range(0, len(flat), max(1, len(flat) // 64))][:64]
    return torch.stack(numbers).to(torch.bfloat16).view(torch.int16).numpy().tobytes()


def test_a_digest_of_an_earlier_version_can_be_compared_with():
    model = make_model("gemma2")
    described = sorted(f"{list(weight.shape)}".encode() + sampled_by_hand(weight) for weight in model.parameters())
    earlier = hashlib.sha256(b"".join(described)).hexdigest()[:16]
    assert model_digest(model, earlier) == earlier != model_digest(model)
    assert model_digest(make_model("gemma2", seed=1), earlier) != earlier
    assert model_digest(model, model_digest(model)) == model_digest(model)


def swap(one: torch.Tensor, other: torch.Tensor) -> None:
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


def shift_column(weight: torch.Tensor) -> None:
    weight[:, weight.shape[1] // 3] += 1


CHANGES = {
    "two layers": lambda model: [
        swap(one, other)
        for one, other in zip(model.model.layers[1].parameters(), model.model.layers[2].parameters(), strict=True)
    ],
    "two weights of a layer": lambda model: swap(
        model.model.layers[1].mlp.gate_proj.weight, model.model.layers[1].mlp.up_proj.weight
    ),
    "one number of a small weight": lambda model: model.model.layers[0].mlp.up_proj.weight[5, 7].mul_(1.5),
    "a column": lambda model: shift_column(model.model.layers[0].mlp.up_proj.weight),
    "a step of training": lambda model: [
        weight.add_(1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        for weight in model.parameters()
    ],
    "a saved buffer": lambda model: model.model.layers[0].register_buffer("layer_scalar", torch.tensor(2.0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_digest_sees(change):
    model = make_model("gemma2")
    before = model_digest(model)
    with torch.no_grad():
        CHANGES[change](model)
    assert model_digest(model) != before


def test_a_digest_sees_a_column_of_a_wide_matrix():
    """A sample at a fixed distance would be in a single column, since the width divides the distance."""
    model = make_model("gemma2", hidden_size=64, head_dim=16, vocab_size=4096, intermediate_size=4096)
    digests = {model_digest(model)}
    for column in (1, 31, 63):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[:, column].add_(1)
        digests.add(model_digest(model))
    assert len(digests) == 4


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_codes_take_part_with_all_their_bits(dtype):
    def digest(codes: torch.Tensor) -> str | None:
        model = make_model("gemma2")
        model.register_buffer("codes", codes)
        return model_digest(model)

    codes = torch.arange(512).remainder(2).to(dtype).view(16, 32)
    changed = codes.clone()
    changed.view(torch.uint8)[3, 5 * codes.itemsize] ^= 1
    assert digest(codes) == digest(codes.clone()) != digest(changed)
    if dtype == torch.int32:
        # 2^24 + 1 is 2^24 in bf16, and in fp32.
        assert digest(torch.full((4, 4), 1 << 24, dtype=dtype)) != digest(
            torch.full((4, 4), (1 << 24) + 1, dtype=dtype)
        )


def test_buffers_that_are_not_saved_take_no_part():
    model = make_model("gemma2")
    before = model_digest(model)
    model.register_buffer("positions", torch.arange(9), persistent=False)
    assert model_digest(model) == before


def test_a_digest_reads_a_few_megabytes_of_27_billion(monkeypatch):
    """Parameters of the sizes of Gemma-2-27b, which are made up as they are read."""
    with torch.device("meta"):
        sizes = {"hidden_size": 4608, "num_hidden_layers": 46, "intermediate_size": 36864, "vocab_size": 256000}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128}
        model = AutoModelForCausalLM.from_config(Gemma2Config(**sizes, **heads))
    assert 27e9 < sum(weight.numel() for weight in model.parameters()) < 28e9
    read = []
    monkeypatch.setattr(sources, "_sample", lambda weight, _: [read.append(len(places(weight))), b""][1])
    monkeypatch.setattr(torch.Tensor, "is_meta", False)
    assert model_digest(model) is not None
    assert 1e6 < 2 * sum(read) < 8e6


def places(weight: torch.Tensor) -> torch.Tensor:
    return sources._places(weight.numel(), torch.device("cpu"))


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8191, 4096 * 4096, 256000 * 4608, 10**10])
def test_the_places_of_a_sample_are_within_a_weight_and_spread(size):
    at = sources._places(size, torch.device("cpu"))
    assert len(at) == min(size, 4096) and len(at.unique()) == len(at)
    if size:
        assert at.min() >= 0 and at.max() < size
        share = torch.histc(at.double() / size, bins=8, min=0, max=1) / len(at)
        assert size < 8 or (share - 1 / 8).abs().max() < 0.01
    if size > 1e6:
        assert len((at % 4096).unique()) > 1000
