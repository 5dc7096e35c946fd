"""Sets of latents, another one per row: the tokens that a row gets alone from a hook written out here."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dspa
from dspa.errors import ModelError, SAEError
from dspa.models.layers import decoder_layers
from dspa.models.sources import model_digest
from dspa.saes.frozen import FrozenSAE
from dspa.steering.latent_sets import LatentSet
from dspa.steering.latents import LatentSteering
from dspa.testing import D_IN, D_SAE_OUT, L_OUT, make_model, make_sae

from ...rounding import assert_same_logits
from .test_generate import CONFIG, N_NEW, PROMPTS, compiled_decoding, new_tokens, padded

MANY, FEW = tuple(range(D_SAE_OUT)), (1, 5, 9, 33)
ROWS = ["many", None, "few"]
ALWAYS = {"when": "always"}
# A set of one mode for all rows, and the f' that its latents get: of f, the strength, and the largest latent.
Change = Callable[[float, float, float], float]
CHANGES: dict[str, tuple[dict[str, str], Change]] = {
    "augment": ({}, lambda f, s, _: max(f + s, 0.0) if f > 0 else 0.0),
    "ablate": ({"mode": "ablate"}, lambda f, s, _: max(f - abs(s), 0.0)),
    "clamp": ({"mode": "clamp"}, lambda f, s, _: s if f > 0 else 0.0),
    "augment, always": (ALWAYS, lambda f, s, _: f + s),
    "ablate, always": ({"mode": "ablate", **ALWAYS}, lambda f, s, _: max(f - abs(s), 0.0)),
    "clamp, always": ({"mode": "clamp", **ALWAYS}, lambda f, s, _: s),
    "removed": ({}, lambda f, s, m: 0.0),
    "as DSPA": ({}, lambda f, s, m: max(f - 0.3 * m, 0.0)),
}


@contextlib.contextmanager
def edited_by_hand(model: Any, sae: Any, strengths: Mapping[int, float], change: Change, start: int) -> Iterator[None]:
    """Edit latents in passes over a whole sequence, from a column on."""

    def edit(_module: Any, _args: Any, output: Any) -> Any:
        h = (output[0] if isinstance(output, tuple) else output).clone()
        for row, t in itertools.product(range(len(h)), range(start, h.shape[1])):
            pre = h[row, t] @ sae.W_enc + sae.weights.b_enc
            f = torch.where((pre > sae.weights.threshold) & (pre > 0), pre, 0)
            for latent, s in strengths.items():
                h[row, t] += (change(float(f[latent]), s, float(f.max())) - f[latent]) * sae.weights.W_dec[latent]
        return (h, *output[1:]) if isinstance(output, tuple) else h

    handle = decoder_layers(model)[L_OUT].register_forward_hook(edit)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def in_a_plain_loop(
    model: Any, sae: Any, prompt: list[int], strengths: Mapping[int, float], change: Change, positions: str = "response"
) -> list[int]:
    tokens = list(prompt)
    start = {"all": 0, "response": len(prompt) - 1, "generated": len(prompt)}[positions]
    with edited_by_hand(model, sae, strengths, change, start):
        for _ in range(N_NEW):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def strengths_of(latents: Sequence[int]) -> dict[int, float]:
    g = torch.Generator().manual_seed(8)
    values = (torch.randn(len(latents), generator=g) * 2).tolist()
    return dict(zip(latents, values, strict=True))


def steering_of(sae: Any, name: str, **settings: Any) -> LatentSteering:
    """The sets "many" and "few" with the change of this name."""
    mode, _ = CHANGES[name]
    sets = {"many": strengths_of(MANY), "few": strengths_of(FEW)}
    if name in ("removed", "as DSPA"):
        alpha = {"alpha": 0.3} if name == "as DSPA" else {}
        return LatentSteering(sae, {key: LatentSet.of([*chosen]) for key, chosen in sets.items()}, **alpha, **settings)
    if mode.get("mode") == "ablate":
        sets = {key: {latent: abs(s) for latent, s in chosen.items()} for key, chosen in sets.items()}
    return LatentSteering(sae, {key: LatentSet.of(chosen, **mode) for key, chosen in sets.items()}, **settings)


@pytest.fixture(scope="module", params=CHANGES)
def change(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(model: Any, sae_out: Any, change: str) -> list[list[int]]:
    sets = [strengths_of(MANY), {}, strengths_of(FEW)]
    tokens = [in_a_plain_loop(model, sae_out, *pair, CHANGES[change][1]) for pair in zip(PROMPTS, sets, strict=True)]
    base = new_tokens(model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False))
    assert tokens[1] == base[1] and tokens[0] != base[0]
    return tokens


WAYS = [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}]


@pytest.mark.parametrize("how", WAYS, ids=["cache", "none", "static", "chunks"])
def test_a_set_per_row(model: Any, sae_out: Any, change: str, expected: list[list[int]], how: Any) -> None:
    with steering_of(sae_out, change).attach(model) as steering, steering.rows(ROWS):
        output = model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False, **how)
    assert new_tokens(output) == expected


def test_a_compiled_model(model: Any, sae_out: Any, change: str, expected: list[list[int]]) -> None:
    torch.compiler.reset()
    with steering_of(sae_out, change).attach(model) as steering:
        for rows, wanted in ((ROWS, expected), ([None, *ROWS[1:]], [None, *expected[1:]])):
            with steering.rows(rows):
                made = new_tokens(model.generate(**padded(PROMPTS), generation_config=compiled_decoding()))
            assert made[1:] == wanted[1:] and (wanted[0] is None) == (made[0] != expected[0])
    torch.compiler.reset()


def test_a_single_set_is_that_of_all_rows_and_beams(model: Any, sae_out: Any, change: str) -> None:
    many = {"many": steering_of(sae_out, change).sets["many"]}
    single = LatentSteering(sae_out, many, alpha=0.3 if change == "as DSPA" else None)
    wanted = [in_a_plain_loop(model, sae_out, prompt, strengths_of(MANY), CHANGES[change][1]) for prompt in PROMPTS]
    beams = {"max_new_tokens": N_NEW, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    alone = list[list[int]]()
    for prompt in PROMPTS:
        with edited_by_hand(model, sae_out, strengths_of(MANY), CHANGES[change][1], len(prompt) - 1):
            alone += new_tokens(model.generate(torch.tensor([prompt]), use_cache=False, **beams))
    with single.attach(model):
        assert new_tokens(model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)) == wanted
        assert new_tokens(model.generate(**padded(PROMPTS), **beams)) == alone


@pytest.mark.parametrize("positions", ["response", "generated", "all"])
@pytest.mark.parametrize("name", ["augment", "clamp, always"])
def test_positions(model: Any, sae_out: Any, name: str, positions: str) -> None:
    settings, change = CHANGES[name]
    arguments = {"positions": positions, **settings}
    wanted = [in_a_plain_loop(model, sae_out, prompt, strengths_of(MANY), change, positions) for prompt in PROMPTS]
    with dspa.Steering.of_latents(sae_out, strengths_of(MANY), **arguments).attach(model):
        assert new_tokens(model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)) == wanted


def test_given_responses(model: Any, sae_out: Any, change: str) -> None:
    sequence, start = torch.tensor([PROMPTS[0] + [4, 40, 9]]), len(PROMPTS[0])
    with torch.no_grad():
        base = model(sequence).logits
        with edited_by_hand(model, sae_out, strengths_of(MANY), CHANGES[change][1], start - 1):
            wanted = model(sequence, use_cache=False).logits
        with steering_of(sae_out, change).attach(model) as steering, steering.rows(["many"]):
            with steering.responses([start]):
                made = model(sequence, use_cache=False).logits
            with steering.disabled():
                assert torch.equal(model(sequence).logits, base)
    assert_same_logits(made, wanted)
    assert not torch.equal(made[:, start - 1 :], base[:, start - 1 :])


def test_rows_without_an_edit_keep_their_bits(model: Any, sae_out: Any) -> None:
    """A latent that is active nowhere, in every mode that needs one that is."""
    sequence = torch.tensor([PROMPTS[0] + [4, 40, 9]])
    with torch.no_grad():
        h = model(sequence, output_hidden_states=True).hidden_states[L_OUT + 1]
        never = [int(j) for j in (sae_out.weights.latents(h) == 0).all(dim=1)[0].nonzero().flatten()][:3]
        base = model(sequence).logits
        assert never
        for mode in ("augment", "ablate", "clamp"):
            steering = dspa.Steering.of_latents(sae_out, dict.fromkeys(never, 3.0), mode=mode)
            with steering.attach(model), steering.responses([3]):
                assert torch.equal(model(sequence).logits, base)


def test_a_map_leaves_latents_to_the_set(model: Any, sae_in: Any, sae_out: Any, cdmap: Any) -> None:
    """Without the set the map edits latents of the set, and with it none, in the rows that have the set."""
    inputs = padded(PROMPTS[:1] * 2)
    steering = dspa.Steering(sae_in, sae_out, cdmap, CONFIG, record=True)
    with steering.attach(model):
        model.generate(**inputs, max_new_tokens=N_NEW, do_sample=False)
        alone = edited(steering)
        taken = sorted(alone[0])[::2]
        assert alone[0] == alone[1] and taken
        ablation = LatentSteering(sae_out, {"taken": LatentSet.of(taken)})
        steering.trace.clear()
        with ablation.attach(model), ablation.rows(["taken", None]):
            model.generate(**inputs, max_new_tokens=N_NEW, do_sample=False)
            both = edited(steering)
            assert not both[0] & set(taken) and both[0] and both[1] & set(taken)
        steering.trace.clear()
        with ablation.attach(model), ablation.disabled():
            model.generate(**inputs, max_new_tokens=N_NEW, do_sample=False)
        assert edited(steering) == alone


def edited(steering: dspa.Steering) -> list[set[int]]:
    return [{latent for edit in steering.trace if edit.row == row for latent in edit.latents} for row in (0, 1)]


def test_the_largest_latent_is_of_what_is_left(model: Any, sae_in: Any, sae_out: Any, cdmap: Any) -> None:
    """The set is attached last, and edits first: the map gets the residual without the set."""
    prompt = torch.tensor([PROMPTS[0]])
    h = residual(model, prompt)
    f = sae_out.weights.latents(h)
    largest = int(f.argmax())
    left = sae_out.weights.latents(h - f[largest] * sae_out.weights.W_dec[largest])
    steering = dspa.Steering(sae_in, sae_out, cdmap, CONFIG, record=True)
    with steering.attach(model), dspa.Steering.of_latents(sae_out, [largest]).attach(model):
        model.generate(prompt, max_new_tokens=1, do_sample=False)
    made = next(iter(steering.trace)).maximum
    assert made == pytest.approx(float(left.max()), rel=1e-5) and abs(made - float(f.max())) > 0.01


@torch.no_grad()
def residual(model: Any, prompt: Tensor) -> Tensor:
    hidden: Tensor = model(prompt, output_hidden_states=True).hidden_states[L_OUT + 1][0, -1]
    return hidden


def test_rows_are_those_of_the_batch(model: Any, sae_out: Any) -> None:
    with steering_of(sae_out, "augment").attach(model) as steering:
        with pytest.raises(ModelError, match="Which of 2 sets each row has is not known"):
            model.generate(**padded(PROMPTS), max_new_tokens=1)
        with steering.rows(ROWS[:2]), pytest.raises(ModelError, match=r"`rows\(\)` is of 2 names; accepted: 3"):
            model.generate(**padded(PROMPTS), max_new_tokens=1)
        with pytest.raises(ValueError, match="`names` is with 'other'; accepted: names of sets: many, few"):
            steering.rows(["other"]).__enter__()


def test_trace(model: Any, sae_out: Any) -> None:
    """Every edit is recorded with its values, and `recording()` gives them without record=True."""
    steering = steering_of(sae_out, "clamp", record=True)
    with steering.attach(model), steering.rows(ROWS), steering.recording() as trace:
        model.generate(**padded(PROMPTS), max_new_tokens=N_NEW, do_sample=False)
    edits = list(steering.trace)
    assert edits == list(trace) and {edit.row for edit in edits} == {0, 2}
    assert [edit.position for edit in edits if edit.row == 0] == [len(PROMPTS[0]) - 1 + n for n in range(N_NEW)]
    wanted = {0: strengths_of(MANY), 2: strengths_of(FEW)}
    for edit in edits:
        assert edit.maximum is None and all(before > 0 for before in edit.before)
        assert edit.after == pytest.approx([wanted[edit.row][latent] for latent in edit.latents])
    assert "latent" in str(steering.trace)


def test_sets_at_two_layers(model: Any, sae_in: Any, sae_out: Any) -> None:
    """A constant set is a vector, so that a set after it gives what it gives after the vector."""
    sequence, few = torch.tensor([PROMPTS[0] + [4, 40, 9]]), strengths_of(FEW)
    vector = sum(s * sae_in.weights.W_dec[latent] for latent, s in few.items())
    first = dspa.Steering.of_latents(sae_in, few, when="always", positions="all")
    second = dspa.Steering.of_latents(sae_out, few, mode="clamp", when="always")

    def logits(*attachables: Any) -> Tensor:
        with contextlib.ExitStack() as stack, torch.no_grad():
            for attachable in attachables:
                stack.enter_context(attachable.attach(model))
            for attachable in attachables:
                stack.enter_context(attachable.responses([4]))
            return model(sequence).logits

    wanted = logits(dspa.SteeringVector(vector, sae_in.layer), second)
    assert_same_logits(logits(first, second), wanted)
    for alone in (first, second):
        assert (logits(alone) - wanted).abs().max() > 0.01


@pytest.mark.parametrize(
    ("latents", "settings", "message"),
    [
        ([], {}, "A set of latents is empty"),
        ({}, {}, "A set of latents is empty"),
        ([1, 1], {}, "A set of latents is 1, 1; accepted: different latents"),
        ([D_SAE_OUT], {}, "A set of latents is with 128; accepted: latents of the SAE, 0 to 127"),
        ([-1], {}, "-1"),
        ({1: float("nan")}, {}, "The strength of latent 1 is nan"),
        ({1: float("inf")}, {}, "The strength of latent 1 is inf; accepted: a finite number. A latent without"),
        ({1: -1.0}, {"mode": "ablate"}, "The strength of latent 1 is -1.0; accepted: a number >= 0"),
        ({1: "a"}, {}, "accepted: a number"),
        ({1: 1.0}, {"mode": "steer"}, "accepted: augment, ablate, clamp"),
        ({1: 1.0}, {"when": "never"}, "accepted: active, always"),
        ({1: 1.0}, {"positions": "prompt"}, "`positions` is 'prompt'"),
    ],
)
def test_bad_sets(sae_out: Any, latents: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match="accepted") as error:
        dspa.Steering.of_latents(sae_out, latents, **settings)
    assert message in str(error.value)


def test_bad_alpha(sae_out: Any) -> None:
    for alpha in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"`alpha` is {alpha}"):
            LatentSteering(sae_out, {"a": LatentSet.of([1])}, alpha=alpha)
    with pytest.raises(ValueError, match="`sets` is empty"):
        LatentSteering(sae_out, {})


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "formal.json"
    path.write_text('{"strengths": {"971": 4, "77": null}, "mode": "clamp", "when": "always"}')
    assert LatentSet.read(path) == LatentSet({971: 4.0, 77: None}, "clamp", "always")
    for text, message in (
        ("[1]", "accepted"),
        ('{"strengths": {}}', "is empty"),
        ('{"strengths": {"a": 1}}', "accepted"),
        ('{"strengths": {"1": "x"}}', "a number"),
        ('{"strengths": {"1": 2}, "modes": "clamp"}', "modes"),
        ('{"strengths": {"1": NaN}}', "is nan"),
        ("{", "JSON"),
    ):
        path.write_text(text)
        with pytest.raises(SAEError, match=message):
            LatentSet.read(path)


def test_what_is_shown(sae_out: Any) -> None:
    shown = repr(dspa.Steering.of_latents(sae_out, {9: 4.0, 7: -2.5, 3: None}, when="always"))
    assert shown == f"LatentSteering(layer={L_OUT}, 9+4, 7-2.5, 3 removed at every token)"
    assert "9=4" in repr(dspa.Steering.of_latents(sae_out, {9: 4.0}, mode="clamp"))
    assert "9-4" in repr(dspa.Steering.of_latents(sae_out, {9: 4.0}, mode="ablate"))


def test_other_models_are_refused(sae_out: Any) -> None:
    digest = model_digest(make_model("qwen3", seed=7)) or ""
    sets = {"a": LatentSet.of([1])}
    with pytest.raises(ModelError, match="The LatentSteering was made with other weights"):
        LatentSteering(sae_out, sets, model_digest=digest).attach(make_model("qwen3"))
    with pytest.raises(ModelError, match="accepted: 0 to 3"):
        LatentSteering(make_sae(4, 16), sets).attach(make_model("qwen3"))


SAES = [
    ("JumpReLU", {}, "none"),
    ("Standard", {}, "layer_norm"),
    ("Standard", {"apply_b_dec_to_input": True}, "constant_norm_rescale"),
    ("TopK", {"k": 6}, "none"),
    ("TopK", {"k": 6, "rescale_acts_by_decoder_norm": True}, "none"),
]


@pytest.mark.parametrize("name", ["augment", "ablate", "clamp", "augment, always", "clamp, always"])
@pytest.mark.parametrize(("kind", "cfg", "normalize"), SAES, ids=str)
def test_against_sae_lens(gemma: Any, kind: str, cfg: dict[str, Any], normalize: str, name: str) -> None:
    """The residual moves by decode(f') - decode(f) of SAELens, where f' is written out here."""
    sae_lens = pytest.importorskip("sae_lens")
    config = {"d_in": D_IN, "d_sae": 40, "normalize_activations": normalize, **cfg}
    theirs = getattr(sae_lens, f"{kind}SAE")(getattr(sae_lens, f"{kind}SAEConfig")(**config))
    theirs.cfg.metadata.hook_name = f"blocks.{L_OUT}.hook_resid_post"
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.2)
    sae = FrozenSAE.from_sae_lens(theirs)
    strengths = {latent: abs(s) if "ablate" in name else s for latent, s in strengths_of(range(0, 40, 2)).items()}
    settings, change = CHANGES[name]
    sequence = torch.tensor([PROMPTS[2]])
    steering = dspa.Steering.of_latents(sae, strengths, positions="all", **settings)
    residuals = list[Tensor]()
    keeping = decoder_layers(gemma)[L_OUT].register_forward_hook(lambda _m, _a, output: residuals.append(output))
    with torch.no_grad():
        gemma(sequence)
        with steering.attach(gemma), steering.responses([4]):
            gemma(sequence)
        keeping.remove()
        h, edited = residuals
        f = theirs.encode(h)
        moved = f.clone()
        for t, (latent, s) in itertools.product(range(f.shape[1]), strengths.items()):
            moved[0, t, latent] = change(float(f[0, t, latent]), s, 0.0)
        # SAELens decodes once for each time that it encodes.
        wanted = h - theirs.decode(f)
        theirs.encode(h)
        wanted += theirs.decode(moved)
    assert (moved != f).any() and not (moved != f).all()
    torch.testing.assert_close(edited, wanted, rtol=1e-4, atol=1e-4)
