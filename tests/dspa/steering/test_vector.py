"""A steering vector in every way of generating: the tokens that a row gets alone from a hook written out here."""

from __future__ import annotations

import contextlib
import json
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

import dspa
from dspa.errors import ModelError, VectorError
from dspa.models.layers import decoder_layers
from dspa.models.sources import model_digest
from dspa.testing import D_IN, FAMILIES, L_OUT, cache_names, make_model

from ...rounding import assert_same_logits
from .test_generate import CONFIG, HYBRIDS, N_NEW, PROMPTS, compiled_decoding, new_tokens, padded, plain

POSITIONS = ("all", "response", "generated")
SCALE = 2.5


def make_vector(positions: str = "all", *, layer: int = L_OUT, seed: int = 2, **settings: Any) -> dspa.SteeringVector:
    g = torch.Generator().manual_seed(seed)
    return dspa.SteeringVector(torch.randn(D_IN, generator=g), layer, SCALE, positions, **settings)


@contextlib.contextmanager
def added(model: Any, vector: dspa.SteeringVector, n_prompt: int) -> Iterator[None]:
    """Add the vector in passes over a whole sequence, by a hook that knows how long the prompt is."""
    start = {"all": 0, "response": n_prompt - 1, "generated": n_prompt}[vector.positions]

    def edit(_module: Any, _args: Any, output: Any) -> Any:
        h = (output[0] if isinstance(output, tuple) else output).clone()
        h[:, start:] += SCALE * vector.vector
        return (h, *output[1:]) if isinstance(output, tuple) else h

    handle = decoder_layers(model)[vector.layer].register_forward_hook(edit)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def in_a_plain_loop(model: Any, vectors: list[dspa.SteeringVector], prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    with contextlib.ExitStack() as stack:
        for vector in vectors:
            stack.enter_context(added(model, vector, len(prompt)))
        for _ in range(N_NEW):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module", params=POSITIONS)
def vector(request: pytest.FixtureRequest) -> dspa.SteeringVector:
    return make_vector(request.param)


@pytest.fixture(scope="module")
def expected(model: Any, vector: dspa.SteeringVector) -> list[list[int]]:
    tokens = [in_a_plain_loop(model, [vector], prompt) for prompt in PROMPTS]
    base = new_tokens(model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False))
    assert sum(a != b for a, b in zip(tokens, base, strict=True)) >= 2
    return tokens


def test_positions_differ(model: Any) -> None:
    """Otherwise the tests below would not see where a vector is added."""
    tokens = [[in_a_plain_loop(model, [make_vector(name)], prompt) for prompt in PROMPTS] for name in POSITIONS]
    assert tokens[0] != tokens[1] != tokens[2] != tokens[0]


@pytest.mark.parametrize(
    "how",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}],
    ids=lambda how: next(iter(how), "cache"),
)
def test_ways_of_decoding(model: Any, vector: dspa.SteeringVector, expected: list[list[int]], how: Any) -> None:
    with vector.attach(model):
        output = model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False, **how)
    assert new_tokens(output) == expected


@pytest.mark.parametrize("how", ["prompt_lookup", "assistant", "itself"])
def test_speculation(model: Any, vector: dspa.SteeringVector, expected: list[list[int]], how: str) -> None:
    family = "qwen3" if "Qwen3" in type(model).__name__ else "gemma2"
    settings: dict[str, Any] = {
        "prompt_lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": make_model(family, seed=5)},
        "itself": {"assistant_model": model},
    }[how]
    with vector.attach(model):
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            output = model.generate(torch.tensor([prompt]), max_new_tokens=N_NEW, do_sample=False, **settings)
            assert output[0, len(prompt) :].tolist() == wanted


def test_compiled_decoding(model: Any, vector: dspa.SteeringVector, expected: list[list[int]]) -> None:
    config = compiled_decoding()
    torch.compiler.reset()
    before = model.generate(**padded(PROMPTS), generation_config=config)
    other = dspa.SteeringVector(-vector.vector, L_OUT, SCALE, vector.positions)
    with other.attach(model):
        assert new_tokens(model.generate(**padded(PROMPTS), generation_config=config)) != expected
    with vector.attach(model):
        assert new_tokens(model.generate(**padded(PROMPTS), generation_config=config)) == expected
    assert torch.equal(model.generate(**padded(PROMPTS), generation_config=config), before)
    torch.compiler.reset()


def test_compiled_forward(model: Any, vector: dspa.SteeringVector, expected: list[list[int]]) -> None:
    torch.compiler.reset()
    eager = model.forward
    try:
        with vector.attach(model):
            model.forward = torch.compile(eager, backend="eager", dynamic=True)
            output = model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)
        assert new_tokens(output) == expected
    finally:
        del model.forward
        torch.compiler.reset()


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams(model: Any, vector: dspa.SteeringVector, how: Any) -> None:
    settings = {"max_new_tokens": N_NEW, "do_sample": False, **how}
    wanted = []
    for prompt in PROMPTS:
        with added(model, vector, len(prompt)):
            wanted += new_tokens(model.generate(torch.tensor([prompt]), use_cache=False, **settings))
    with vector.attach(model):
        assert new_tokens(model.generate(**padded(PROMPTS), **settings)) == wanted


@pytest.mark.parametrize("name", cache_names())
def test_second_turn_on_a_kept_cache(model: Any, vector: dspa.SteeringVector, name: str) -> None:
    """The first turn stays as it was computed, edited from the end of its prompt on."""
    cache = {name: DynamicCache(config=model.config)}
    with vector.attach(model):
        first = model.generate(torch.tensor([PROMPTS[0]]), **cache, max_new_tokens=4, do_sample=False)
        second = torch.cat([first, torch.tensor([[33, 7, 21]])], dim=1)
        output = model.generate(second, **cache, max_new_tokens=1, do_sample=False, output_logits=True)
        assert output.shape[1] == second.shape[1] + 1
    if vector.positions == "all":
        assert output[0, -1].item() == in_a_plain_loop(model, [vector], second[0].tolist())[0]


def test_embeddings_threads_and_peft(model: Any, vector: dspa.SteeringVector, expected: list[list[int]]) -> None:
    settings: dict[str, Any] = {"max_new_tokens": N_NEW, "do_sample": False}
    answers: dict[int, list[list[int]]] = {}

    def answer(n: int) -> None:
        answers[n] = new_tokens(model.generate(torch.tensor([PROMPTS[n]]), **settings))

    with vector.attach(model):
        embeds = model.get_input_embeddings()(torch.tensor([PROMPTS[0]]))
        assert new_tokens(model.generate(inputs_embeds=embeds, **settings)) == expected[:1]
        threads = [threading.Thread(target=answer, args=(n,)) for n in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [answers[n][0] for n in range(len(PROMPTS))] == expected
    peft = pytest.importorskip("peft")
    model = make_model("qwen3" if "Qwen3" in type(model).__name__ else "gemma2")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with vector.attach(wrapped):
        assert new_tokens(wrapped.generate(**padded(PROMPTS), **settings)) == expected


@pytest.mark.parametrize("family", [*(f for f in FAMILIES if f not in ("gemma2", "qwen3")), *HYBRIDS])
@pytest.mark.parametrize("positions", ["all", "response"])
def test_families(family: str, positions: str) -> None:
    model, vector = make_model(family), make_vector(positions)
    wanted = [in_a_plain_loop(model, [vector], prompt) for prompt in PROMPTS]
    with vector.attach(model):
        output = model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)
    assert new_tokens(output) == wanted


def test_given_texts(model: Any, vector: dspa.SteeringVector) -> None:
    text, n_prompt = torch.tensor([PROMPTS[2]]), 6
    with torch.no_grad(), added(model, vector, n_prompt):
        wanted = model(text, use_cache=False).logits
    with torch.no_grad(), vector.attach(model):
        with vector.responses([n_prompt]):
            assert_same_logits(model(text).logits, wanted)
        if vector.positions == "all":
            assert_same_logits(model(text).logits, wanted)
        else:
            with pytest.raises(ModelError, match="not known where the response begins"):
                model(text)
        with vector.disabled():
            disabled = model(text).logits
    with torch.no_grad():
        assert torch.equal(disabled, model(text).logits)


def test_several_at_several_layers(model: Any) -> None:
    vectors = [make_vector("all", layer=0, seed=1), make_vector("response", layer=1, seed=2), make_vector("generated")]
    with contextlib.ExitStack() as stack:
        for vector in vectors:
            stack.enter_context(vector.attach(model))
        output = model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)
        with pytest.raises(ModelError, match=f"Layer {L_OUT} of this model has another SteeringVector"):
            make_vector().attach(model)
    assert new_tokens(output) == [in_a_plain_loop(model, vectors, prompt) for prompt in PROMPTS]


def test_beside_steering(model: Any, sae_in: Any, sae_out: Any, cdmap: Any) -> None:
    loop, vector = plain(model, sae_in, sae_out, cdmap), make_vector("response", layer=3)
    wanted = []
    for prompt in PROMPTS:
        with added(model, vector, len(prompt)):
            wanted.append(loop.generate(prompt, N_NEW))
    with dspa.Steering(sae_in, sae_out, cdmap, CONFIG).attach(model), vector.attach(model):
        output = model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)
    assert new_tokens(output) == wanted


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_sum_is_rounded_once(dtype: torch.dtype, positions: str) -> None:
    model = make_model("qwen3", dtype=dtype)
    edited: list[Tensor] = []
    vector = make_vector(positions)
    with vector.attach(model):
        before: list[Tensor] = []
        # Hooks of a layer run in their order, and that of a vector comes first.
        layer = decoder_layers(model)[L_OUT]
        original = layer.forward
        layer.forward = lambda *args, **kwargs: before.append(original(*args, **kwargs)) or before[-1]
        handle = layer.register_forward_hook(lambda _module, _args, output: edited.append(output))
        model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=2, do_sample=False)
        handle.remove()
        del layer.forward
    assert torch.equal(edited[-1], (before[-1].double() + (SCALE * vector.vector).double()).to(dtype))
    # The prompt's tokens but the last.
    unchanged = torch.equal(edited[0][:, :-1], before[0][:, :-1])
    assert unchanged == (positions != "all")


def test_saved_and_loaded(tmp_path: Path) -> None:
    made = make_vector("generated", model_name="google/gemma-2-2b", model_digest="sampled-0")
    made.save(tmp_path / "v.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = dspa.SteeringVector.load(tmp_path / "v.safetensors")
    assert torch.equal(loaded.vector, made.vector)
    for name in ("layer", "scale", "positions", "model_name", "model_digest"):
        assert getattr(loaded, name) == getattr(made, name)
    assert repr(loaded) == f"SteeringVector(d_in={D_IN}, layer={L_OUT}, scale=2.5, 'generated')"
    # Its own copy, as it was passed.
    given = torch.ones(D_IN, dtype=torch.float64)
    kept = dspa.SteeringVector(given, 0)
    given.zero_()
    kept.vector.zero_()
    assert kept.vector.dtype == torch.float32 and bool((kept.vector == 1).all())


@pytest.mark.parametrize(
    "edit", [{"scale": 9.0}, {"layer": 1}, {"positions": "all"}, {"model_digest": ""}, {"seal": ""}, {"sha256": "0"}]
)
def test_no_entry_of_the_header_can_be_edited(edit: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    make_vector("generated", model_digest="sampled-0").save(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["dspa"])
    save_file(load_file(path), path, metadata={"dspa": json.dumps(header | edit)})
    with pytest.raises(VectorError, match="was changed after it was written"):
        dspa.SteeringVector.load(path)


def test_files_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(VectorError, match="There is no file"):
        dspa.SteeringVector.load(tmp_path / "none")
    (tmp_path / "text").write_text("a")
    with pytest.raises(VectorError, match="damaged"):
        dspa.SteeringVector.load(tmp_path / "text")
    save_file({"vector": torch.ones(3)}, tmp_path / "plain")
    with pytest.raises(VectorError, match=r"not a vector of format dspa\.vector\.1 \(it says None\)"):
        dspa.SteeringVector.load(tmp_path / "plain")
    with pytest.raises(VectorError, match="The path of the vector"):
        make_vector().save(tmp_path)
    path = tmp_path / "v"
    make_vector().save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"vector": load_file(path)["vector"] + 1}, path, metadata=metadata)
    with pytest.raises(VectorError, match="its tensors are not those that were written"):
        dspa.SteeringVector.load(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vector": [1.0]}, "`vector` is a list; accepted: a floating tensor"),
        ({"vector": torch.ones(2, 3)}, r"`vector` is torch.float32 \[2, 3\]"),
        ({"vector": torch.ones(3, dtype=torch.long)}, r"`vector` is torch.int64 \[3\]"),
        ({"vector": torch.ones(0)}, r"`vector` is torch.float32 \[0\]"),
        ({"vector": torch.tensor([1.0, float("nan")])}, "`vector` is partly NaN or infinite"),
        ({"vector": torch.tensor([1e300], dtype=torch.float64)}, "`vector` is partly NaN or infinite"),
        ({"scale": 1e300}, "`vector` times `scale` is partly NaN or infinite"),
        ({"layer": -1}, "`layer` is -1; accepted: a whole number >= 0"),
        ({"layer": True}, "`layer` is True"),
        ({"scale": -1.0}, "`scale` is -1.0; accepted: a finite number >= 0"),
        ({"scale": float("inf")}, "`scale` is inf"),
        ({"positions": "last"}, "`positions` is 'last'; accepted: response, generated, all"),
        ({"model_name": None}, "`model_name` is None; accepted: text"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(VectorError, match=message):
        dspa.SteeringVector(**{"vector": torch.ones(3), "layer": 0} | arguments)


def test_models_that_it_does_not_fit(model: Any) -> None:
    with pytest.raises(ModelError, match="The vector is of layer 4; accepted: 0 to 3"):
        make_vector(layer=4).attach(model)
    with pytest.raises(ModelError, match=f"has 3 numbers and the model's hidden size is {D_IN}"):
        dspa.SteeringVector(torch.ones(3), 0).attach(model)
    with pytest.raises(ModelError, match="The vector was made with 'google/gemma-2-2b'"):
        make_vector(model_name="google/gemma-2-2b").attach(model, model_name="meta-llama/Llama-3.1-8B")
    digest = str(model_digest(model))
    make_vector(model_digest=digest).attach(model).detach()
    other = make_model("qwen3" if "Gemma2" in type(model).__name__ else "gemma2")
    with pytest.raises(ModelError, match="other weights"):
        make_vector(model_digest=digest).attach(other)
    make_vector(model_digest=digest).attach(other, other_weights=True).detach()
    assert not dspa.models.attachment.Attachment.of(model).attached
