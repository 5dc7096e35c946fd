"""Every way of generating gives the tokens that the same row gives alone in a plain loop."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, TextIteratorStreamer
from transformers.generation.configuration_utils import CompileConfig

import dspa
from dspa.models.layers import decoder_layers
from dspa.testing import FAMILIES, cache_names, make_map, make_model, make_sae

from ...rounding import assert_same_logits
from ..support.plain import Plain

N_NEW = 6
CONFIG = dspa.SteeringConfig(alpha=0.6, k_diff=8, k_prompt=12, mode="both")
PROMPTS = [[1, 5, 9, 33, 20, 7], [1, 44, 12], [1, 60, 8, 8, 21, 50, 17, 3, 29, 11]]
MODES = [
    dspa.SteeringConfig(alpha=0.2, k_diff=16),
    dspa.SteeringConfig(alpha=1.5, k_diff=16),
    dspa.SteeringConfig(alpha=0.4, mode="augment", k_diff=4),
    dspa.SteeringConfig(alpha=0.6, mode="both", positions="generated", k_diff=8),
    dspa.SteeringConfig(alpha=0.6, mode="both", positions="all", k_diff=8),
]


def plain(model, sae_in, sae_out, cdmap, config=CONFIG) -> Plain:
    return Plain(model, decoder_layers(model), sae_in, sae_out, cdmap, config)


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """A batch padded on the left with token 0."""
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


def compiled_decoding() -> GenerationConfig:
    """Greedy decoding on a static cache, each step of which is one graph without a break."""
    compile_config = CompileConfig(fullgraph=True, mode="default", backend="eager")
    compile_config._compile_all_devices = True  # by default transformers compiles only on accelerators
    return GenerationConfig(
        max_new_tokens=N_NEW,
        do_sample=False,
        cache_implementation="static",
        compile_config=compile_config,
        pad_token_id=0,
    )


def new_tokens(output: torch.Tensor, n_new: int = N_NEW) -> list[list[int]]:
    return output[:, -n_new:].tolist()


@pytest.fixture(scope="module")
def expected(model, sae_in, sae_out, cdmap) -> list[list[int]]:
    """Tokens that each prompt gives alone in the plain loop. Steering changes most of them."""
    loop = plain(model, sae_in, sae_out, cdmap)
    tokens = [loop.generate(prompt, N_NEW) for prompt in PROMPTS]
    base = new_tokens(model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False))
    assert sum(a != b for a, b in zip(tokens, base, strict=True)) >= 2
    return tokens


@pytest.fixture
def steering(sae_in, sae_out, cdmap) -> dspa.Steering:
    return dspa.Steering(sae_in, sae_out, cdmap, CONFIG)


@pytest.mark.parametrize("config", MODES, ids=lambda c: f"{c.mode}-{c.alpha}-{c.positions}")
def test_modes(model, sae_in, sae_out, cdmap, config):
    loop = plain(model, sae_in, sae_out, cdmap, config)
    wanted = [loop.generate(prompt, N_NEW) for prompt in PROMPTS]
    with dspa.Steering(sae_in, sae_out, cdmap, config).attach(model):
        for prompt, tokens in zip(PROMPTS, wanted, strict=True):
            output = model.generate(torch.tensor([prompt]), max_new_tokens=N_NEW, do_sample=False)
            assert new_tokens(output) == [tokens]


HYBRIDS = ["qwen3_5_text", "lfm2", "jamba", "falcon_h1"]


@pytest.mark.parametrize("family", [*(f for f in FAMILIES if f not in ("gemma2", "qwen3")), *HYBRIDS])
def test_families(family, sae_in, sae_out, cdmap):
    model = make_model(family)
    loop = plain(model, sae_in, sae_out, cdmap)
    wanted = [loop.generate(prompt, N_NEW) for prompt in PROMPTS]
    with dspa.Steering(sae_in, sae_out, cdmap, CONFIG).attach(model):
        output = model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)
    assert new_tokens(output) == wanted


@pytest.mark.parametrize("positions", ["response", "generated", "all"])
def test_padded_batch(model, sae_in, sae_out, cdmap, positions):
    config = dspa.SteeringConfig(alpha=0.6, k_diff=8, k_prompt=12, mode="both", positions=positions)
    loop = plain(model, sae_in, sae_out, cdmap, config)
    with dspa.Steering(sae_in, sae_out, cdmap, config).attach(model):
        output = model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)
    # After the end of the block: the plain loop calls the model as it is.
    assert new_tokens(output) == [loop.generate(prompt, N_NEW) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "how",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda how: next(iter(how)),
)
def test_ways_of_decoding(model, steering, expected, how):
    with steering.attach(model):
        if "prompt_lookup_num_tokens" in how:
            rows = [model.generate(torch.tensor([p]), max_new_tokens=N_NEW, do_sample=False, **how) for p in PROMPTS]
            assert [new_tokens(row)[0] for row in rows] == expected
        else:
            output = model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False, **how)
            assert new_tokens(output) == expected


def test_compiled_static_cache(model, steering, expected):
    config = compiled_decoding()
    torch.compiler.reset()
    before = model.generate(**padded(PROMPTS), generation_config=config)
    with steering.attach(model):
        assert new_tokens(model.generate(**padded(PROMPTS), generation_config=config)) == expected
    assert torch.equal(model.generate(**padded(PROMPTS), generation_config=config), before)
    torch.compiler.reset()


def test_steering_again_uses_the_new_settings_in_a_compiled_model(model, sae_in, sae_out, cdmap, expected):
    """A graph compiled for one Steering is not found again by the next."""
    config = compiled_decoding()
    torch.compiler.reset()
    with dspa.Steering(sae_in, sae_out, cdmap, dspa.SteeringConfig(alpha=0.0)).attach(model):
        model.generate(**padded(PROMPTS), generation_config=config)
    with dspa.Steering(sae_in, sae_out, cdmap, CONFIG).attach(model):
        assert new_tokens(model.generate(**padded(PROMPTS), generation_config=config)) == expected
    torch.compiler.reset()


def test_compiled_forward(model, steering, expected):
    torch.compiler.reset()
    eager = model.forward
    try:
        with steering.attach(model):
            model.forward = torch.compile(eager, backend="eager", dynamic=True)
            output = model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)
        assert new_tokens(output) == expected
    finally:
        del model.forward
        torch.compiler.reset()


def test_sampling(model, sae_in, sae_out, cdmap, steering):
    loop = plain(model, sae_in, sae_out, cdmap)
    for prompt in PROMPTS:
        torch.manual_seed(3)
        wanted = loop.generate(prompt, N_NEW, sample=True)
        torch.manual_seed(3)
        with steering.attach(model):
            output = model.generate(torch.tensor([prompt]), max_new_tokens=N_NEW, do_sample=True, top_k=0)
        assert new_tokens(output) == [wanted]


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams(model, sae_in, sae_out, cdmap, steering, how):
    loop = plain(model, sae_in, sae_out, cdmap)
    wanted = []
    for prompt in PROMPTS:
        with loop.steered(prompt):
            alone = model.generate(
                torch.tensor([prompt]), max_new_tokens=N_NEW, do_sample=False, use_cache=False, **how
            )
        wanted += new_tokens(alone)
    with steering.attach(model):
        together = model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False, **how)
    assert new_tokens(together) == wanted


def test_return_sequences(model, sae_in, sae_out, cdmap, steering):
    """Each sampled return sequence of a batch is steered by the plan of its own prompt."""
    settings = {"max_new_tokens": 1, "do_sample": True, "top_k": 0, "num_return_sequences": 3}
    loop = plain(model, sae_in, sae_out, cdmap)
    wanted = []
    for prompt in PROMPTS:
        with loop.steered(prompt), torch.no_grad():
            wanted.append(model(torch.tensor([prompt])).logits[0, -1])
    with steering.attach(model):
        out = model.generate(**padded(PROMPTS), output_logits=True, return_dict_in_generate=True, **settings)
    assert_same_logits(out.logits[0], torch.stack(wanted).repeat_interleave(3, 0))


def test_assisted(model, steering, expected):
    assistant = make_model("qwen3" if "Qwen3" in type(model).__name__ else "gemma2", seed=5)
    with steering.attach(model):
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            output = model.generate(
                torch.tensor([prompt]), max_new_tokens=N_NEW, do_sample=False, assistant_model=assistant
            )
            assert new_tokens(output, len(output[0]) - len(prompt)) == [wanted]
    assert "prepare_inputs_for_generation" not in assistant.__dict__


def test_a_model_that_assists_itself(model, steering, expected):
    with steering.attach(model):
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            settings = {"max_new_tokens": N_NEW, "do_sample": False, "assistant_model": model}
            output = model.generate(torch.tensor([prompt]), **settings)
            assert new_tokens(output, len(output[0]) - len(prompt)) == [wanted]
        with steering.disabled():
            model.generate(torch.tensor([PROMPTS[0]]), **settings)
    assert "prepare_inputs_for_generation" not in model.__dict__


def test_an_assistant_that_is_steered_itself(gemma, sae_in, sae_out, cdmap, steering):
    assistant, settings = make_model("gemma2", seed=5), {"max_new_tokens": N_NEW, "do_sample": False}
    prompt = torch.tensor([PROMPTS[0]])
    with steering.attach(gemma):
        wanted = gemma.generate(prompt, **settings)
        own = dspa.Steering(sae_in, sae_out, cdmap, CONFIG).attach(assistant)
        with pytest.raises(dspa.ModelError, match=r"`assistant_model` is a model with a Steering of its own.*detach"):
            gemma.generate(prompt, assistant_model=assistant, **settings)
        own.detach()
        with dspa.fsrl.FSRLAdapter(sae_out).attach(assistant):
            assert torch.equal(gemma.generate(prompt, assistant_model=assistant, **settings), wanted)
        assert torch.equal(gemma.generate(prompt, assistant_model=assistant, **settings), wanted)
    gemma.generate(prompt, assistant_model=gemma, **settings)


@pytest.mark.parametrize("name", cache_names())
def test_second_turn_on_a_kept_cache(model, sae_in, sae_out, cdmap, steering, name):
    """The second turn is selected from the whole conversation, first response included."""
    cache = {name: DynamicCache(config=model.config)}
    with steering.attach(model):
        first = model.generate(torch.tensor([PROMPTS[0]]), **cache, max_new_tokens=4, do_sample=False)
        second = torch.cat([first, torch.tensor([[33, 7, 21]])], dim=1)
        output = model.generate(second, **cache, max_new_tokens=4, do_sample=False)
        latents = steering.plan.latents(cdmap.columns)[0].tolist()
        with pytest.raises(dspa.ModelError, match="whole conversation"):
            model.generate(torch.tensor([[5, 6]]), **cache, max_new_tokens=2)
    augment, ablate = plain(model, sae_in, sae_out, cdmap).select(second[0].tolist())
    assert [j for j in latents if j >= 0] == augment + ablate
    assert output.shape[1] == second.shape[1] + 4


def test_streamer_in_a_thread(model, steering, expected):
    class Tokens(TextIteratorStreamer):
        def put(self, value):
            self.text_queue.put(value.flatten().tolist())

        def end(self):
            self.text_queue.put(self.stop_signal)

    streamer = Tokens(tokenizer=None)
    settings = {"max_new_tokens": N_NEW, "do_sample": False, "streamer": streamer}
    with steering.attach(model):
        thread = threading.Thread(target=model.generate, args=(torch.tensor([PROMPTS[0]]),), kwargs=settings)
        thread.start()
        pieces = list(streamer)
        thread.join()
    assert [token for piece in pieces[1:] for token in piece] == expected[0]


def test_trace_of_a_padded_batch(model, sae_in, sae_out, cdmap):
    """Each row has the edits that it has alone, and padding has none."""
    prompts = [[7], PROMPTS[0]]

    def edits(inputs: dict[str, torch.Tensor]) -> list[set[tuple[int, tuple[int, ...]]]]:
        with dspa.Steering(sae_in, sae_out, cdmap, CONFIG, record=True).attach(model) as steering:
            model.generate(**inputs, max_new_tokens=N_NEW, do_sample=False)
        rows = range(len(inputs["input_ids"]))
        edits_of = [[(e.position, tuple(e.latents)) for e in steering.trace if e.row == row] for row in rows]
        assert all(len(row) == len(set(row)) for row in edits_of)
        return [set(row) for row in edits_of]

    alone = [edits(padded([prompt]))[0] for prompt in prompts]
    assert edits(padded(prompts)) == alone and all(alone)


def test_threads(model, steering, expected):
    """Threads that generate at the same time each carry their own plans."""
    answers: dict[int, list[list[int]]] = {}

    def answer(n: int) -> None:
        output = model.generate(torch.tensor([PROMPTS[n]]), max_new_tokens=N_NEW, do_sample=False)
        answers[n] = new_tokens(output)

    with steering.attach(model):
        threads = [threading.Thread(target=answer, args=(n,)) for n in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [answers[n][0] for n in range(len(PROMPTS))] == expected


def test_peft(model, steering, expected):
    peft = pytest.importorskip("peft")
    model = make_model("qwen3" if "Qwen3" in type(model).__name__ else "gemma2")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with steering.attach(wrapped):
        output = wrapped.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)
    assert new_tokens(output) == expected


def test_device_map(model, steering, expected, tmp_path):
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path)
    attention = model.config._attn_implementation
    placed = type(model).from_pretrained(tmp_path, device_map={"": "cpu"}, attn_implementation=attention)
    with steering.attach(placed, model_name="anything"):
        output = placed.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)
    assert new_tokens(output) == expected


def test_disk_offload(model, steering, expected, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path / "model")
    placed = type(model).from_pretrained(tmp_path / "model", attn_implementation=model.config._attn_implementation)
    placed = accelerate.disk_offload(placed, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
    with steering.attach(placed, model_name="anything"):
        output = placed.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)
    assert new_tokens(output) == expected


def test_inputs_embeds(model, steering, expected):
    embeds = model.get_input_embeddings()(torch.tensor([PROMPTS[0]]))
    with steering.attach(model):
        output = model.generate(inputs_embeds=embeds, max_new_tokens=N_NEW, do_sample=False)
    assert new_tokens(output) == expected[:1]


def test_two_at_once(model, sae_in, sae_out, cdmap, expected):
    """Two Steerings at different layers: each selects from the untouched model, and both edit."""
    late = make_sae(3, 80, seed=7)
    late_map = make_map(sae_in, late, seed=8)
    first = dspa.Steering(sae_in, sae_out, cdmap, CONFIG)
    second = dspa.Steering(sae_in, late, late_map, CONFIG)
    loops = [plain(model, sae_in, sae_out, cdmap), plain(model, sae_in, late, late_map)]
    prompt = PROMPTS[2]
    selected = [loop.select(prompt) for loop in loops]
    for loop, plan in zip(loops, selected, strict=True):
        loop.select = lambda _prompt, plan=plan: plan
    with loops[0].steered(prompt):
        wanted = loops[1].generate(prompt, N_NEW)
    with first.attach(model), second.attach(model):
        both = model.generate(torch.tensor([prompt]), max_new_tokens=N_NEW, do_sample=False)
    assert new_tokens(both) == [wanted]
    first.attach(model)
    second.attach(model)
    first.detach()  # not in the order of attaching
    with_second = model.generate(torch.tensor([prompt]), max_new_tokens=N_NEW, do_sample=False)
    second.detach()
    assert new_tokens(with_second) == [loops[1].generate(prompt, N_NEW)]


@pytest.mark.parametrize("make", ["detached", "alpha 0", "selects nothing"])
def test_bit_identical_where_nothing_is_steered(model: PreTrainedModel, sae_in, sae_out, cdmap, make):
    settings = {"max_new_tokens": N_NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    before = model.generate(**padded(PROMPTS), **settings)
    methods = set(model.__dict__)
    config = dspa.SteeringConfig(alpha=0.0 if make == "alpha 0" else 0.7)
    if make == "selects nothing":
        cdmap = make_map(sae_in, sae_out)
        cdmap = cdmap.replaced(values=cdmap.values.abs())  # no negative score, so nothing to ablate
    steering = dspa.Steering(sae_in, sae_out, cdmap, config).attach(model)
    if make == "detached":
        assert not torch.equal(model.generate(**padded(PROMPTS), **settings).logits[0], before.logits[0])
        steering.detach()
        assert set(model.__dict__) == methods
    after = model.generate(**padded(PROMPTS), **settings)
    steering.detach()
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))


def test_given_text_of_a_model_that_is_its_own_base(sae_in, sae_out, cdmap, steering):
    model = make_model("llama4_text")
    assert model.base_model is model
    text, n_prompt = torch.tensor([PROMPTS[2]]), 6
    with torch.no_grad(), plain(model, sae_in, sae_out, cdmap).steered(PROMPTS[2][:n_prompt]):
        wanted = model(text, use_cache=False).logits
    with torch.no_grad(), steering.attach(model), steering.responses([n_prompt]):
        assert_same_logits(model(text).logits, wanted)
