"""Calibration and screens change no token. What a step reads and launches is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dspa
from dspa.baselines.static_sae import static_map
from dspa.models.layers import decoder_layers
from dspa.steering.counters import COUNTED
from dspa.testing import D_IN, D_SAE_OUT, L_OUT, make_map, make_model, make_sae, with_tensors
from dspa_kernels import PATHS

from ...rounding import assert_same_logits
from ..support.plain import Plain
from .test_generate import MODES, N_NEW, PROMPTS, compiled_decoding, new_tokens, padded

SETTINGS = {"max_new_tokens": N_NEW, "do_sample": False}
# Residual rows of one such call: the padded prompts, then one row per token. The last token of each prompt is steered.
N_ROWS = 3 * 10 + 3 * (N_NEW - 1)
N_STEERED = 3 * N_NEW


@pytest.fixture
def gemma() -> Any:
    return make_model("gemma2")


@pytest.mark.parametrize("config", MODES, ids=lambda c: f"{c.mode}-{c.alpha}-{c.positions}")
def test_the_same_tokens(model, sae_in, sae_out, cdmap, calibrated, config):
    loop = Plain(model, decoder_layers(model), sae_in, sae_out, cdmap, config)
    wanted = [loop.generate(prompt, N_NEW) for prompt in PROMPTS]
    for used in (cdmap, calibrated):
        for screen in ("none", "int5"):
            with dspa.Steering(sae_in, sae_out, used, config, screen=screen, backend="reference").attach(model):
                assert new_tokens(model.generate(**padded(PROMPTS), **SETTINGS)) == wanted, (used is cdmap, screen)


@pytest.mark.parametrize("arch", ["standard", "topk"])
def test_other_saes(model, sae_in, arch):
    """Calibrated or not, the logits are the same up to rounding.

    The order of the encoder's rows may change how a product is rounded.
    """
    base = make_sae(L_OUT, D_SAE_OUT, seed=2)
    k = 12 if arch == "topk" else None
    sae_out = dspa.FrozenSAE(arch, base.W_enc, base.b_enc, base.W_dec, k=k, layer=L_OUT)
    plain = make_map(sae_in, sae_out)
    used = with_tensors(plain, hot=torch.tensor([5, 3, 77], dtype=torch.int32), hot_counts=torch.tensor([3, 2, 2]))
    config = dspa.SteeringConfig(alpha=0.6, mode="both")
    settings = {**SETTINGS, "output_logits": True, "return_dict_in_generate": True}
    outputs = []
    for cdmap, screen in ((plain, "none"), (used, "none"), (used, "int5")):
        with dspa.Steering(sae_in, sae_out, cdmap, config, screen=screen).attach(model) as steering:
            outputs.append(model.generate(**padded(PROMPTS), **settings))
        assert steering.paths["streamed"] > 0
    base, *others = outputs
    assert not torch.equal(base.logits[0], model.generate(**padded(PROMPTS), **settings).logits[0])
    for other in others:
        assert torch.equal(other.sequences, base.sequences)
        assert_same_logits(torch.stack(other.logits), torch.stack(base.logits))


def test_the_stream_is_the_maps(sae_in, sae_out, cdmap, calibrated):
    """Hot latents first, the mean in the screen, and no unnecessary copy."""
    plain = dspa.Steering(sae_in, sae_out, cdmap)._stream
    assert (
        plain.order is None
        and plain.n_large == 0
        and plain.encoder_rows.data_ptr() == sae_out.weights.encoder_rows.data_ptr()
    )
    stream = dspa.Steering(sae_in, sae_out, calibrated, screen="int5")._stream
    assert torch.equal(stream.order[:90], calibrated.hot) and stream.n_large == 64
    assert torch.equal(stream.screen_mean, calibrated.mean)
    assert static_map(calibrated).hot is calibrated.hot and static_map(calibrated).mean is calibrated.mean


def test_memory_is_reported(sae_in, sae_out, calibrated):
    steering = dspa.Steering(sae_in, sae_out, calibrated, screen="int5")
    added = steering._stream.added_bytes(sae_out.weights)
    # The encoder in fp32 again, and per row a block of 256 numbers of five bits.
    assert D_IN <= 256 and added > D_SAE_OUT * (4 * D_IN + 160)
    assert f"90 hot latents, screen='int5', {added / 1e6:.1f} MB" in repr(steering)


def test_placement(gemma, sae_in, sae_out, calibrated, monkeypatch):
    """The stream is made once, and again only where the SAE moves."""
    steering = dspa.Steering(sae_in, sae_out, calibrated)
    made = steering._stream
    with steering.attach(gemma):
        steering.to("cpu")
    assert steering._stream is made
    monkeypatch.setattr(type(steering.sae_out), "device", property(lambda _: torch.device("cuda:1")))
    steering._place(torch.device("cpu"), torch.device("cpu"))
    assert steering._stream is not made and torch.equal(steering._stream.order, made.order)


# What becomes of the rows


def tallies(model: Any, *args: Any, **options: Any) -> dict[str, int]:
    with dspa.Steering(*args, **options).attach(model) as steering:
        assert steering.paths == dict.fromkeys(COUNTED, 0)
        model.generate(**padded(PROMPTS), **SETTINGS)
    assert tuple(steering.paths) == COUNTED == (*PATHS, "encoder_rows_read")
    assert sum(steering.paths[name] for name in PATHS) == N_ROWS
    return steering.paths


def test_paths(gemma, sae_in, sae_out, cdmap, calibrated):
    config = dspa.SteeringConfig(alpha=0.9, k_diff=4)
    plain = tallies(gemma, sae_in, sae_out, cdmap, config)
    assert plain["unsteered"] == N_ROWS - N_STEERED and plain["not_finite"] == 0 and plain["streamed"] > 0
    assert plain["encoder_rows_read"] > 0 and plain["encoder_rows_read"] % D_SAE_OUT == 0
    # The large latents are a better bound than the selected ones alone.
    bounded = tallies(gemma, sae_in, sae_out, calibrated, config)
    assert bounded["settled"] > plain["settled"] and bounded["encoder_rows_read"] < plain["encoder_rows_read"]
    assert bounded["settled"] + bounded["streamed"] == plain["settled"] + plain["streamed"]
    # Ablating by the maximum or more needs no maximum, but a record of it does.
    config = dspa.SteeringConfig(alpha=1.0)
    assert tallies(gemma, sae_in, sae_out, cdmap, config)["encoder_rows_read"] == 0
    recorded = tallies(gemma, sae_in, sae_out, calibrated, config, record=True)
    assert recorded["settled"] == 0 and recorded["encoder_rows_read"] > 0


def test_paths_of_inactive_rows(gemma, sae_in, sae_out):
    cdmap = make_map(sae_in, sae_out)
    cdmap = cdmap.replaced(values=cdmap.values.abs())  # no negative score, so nothing to ablate
    paths = tallies(gemma, sae_in, sae_out, cdmap)
    assert paths["inactive"] == N_STEERED and paths["encoder_rows_read"] == 0


def test_paths_of_rows_that_are_not_finite(gemma, sae_in, sae_out, cdmap):
    gemma.model.layers[L_OUT].mlp.down_proj.weight.data[0] = float("nan")
    with dspa.Steering(sae_in, sae_out, cdmap).attach(gemma) as steering, pytest.raises(dspa.ModelError, match="NaN"):
        gemma.generate(**padded(PROMPTS), max_new_tokens=1)
    assert steering.paths["not_finite"] == 3 and steering.paths["unsteered"] == 27


def test_record_does_not_change_the_tokens(gemma, sae_in, sae_out, calibrated):
    answers = []
    for record in (False, True):
        config = dspa.SteeringConfig(alpha=0.7, mode="both")
        with dspa.Steering(sae_in, sae_out, calibrated, config, record=record).attach(gemma) as steering:
            answers.append(gemma.generate(**padded(PROMPTS), **SETTINGS))
        assert bool(len(steering.trace)) == record
    assert torch.equal(*answers)
    # Decoding steps find their rows: only the longest prompt has positions so late.
    assert {edit.row for edit in steering.trace if edit.position > 10} == {2}
    assert {edit.row for edit in steering.trace} == {0, 1, 2}


# One token per row


@pytest.mark.parametrize("positions", ["response", "generated", "all"])
def test_prompts_of_one_token(model, sae_in, sae_out, calibrated, positions):
    """The prompt itself is then a pass of one token per row."""
    config = dspa.SteeringConfig(alpha=0.6, k_diff=8, mode="both", positions=positions)
    loop = Plain(model, decoder_layers(model), sae_in, sae_out, calibrated, config)
    with dspa.Steering(sae_in, sae_out, calibrated, config).attach(model) as steering:
        output = model.generate(torch.tensor([[7], [44]]), **SETTINGS)
    assert new_tokens(output) == [loop.generate([token], N_NEW) for token in (7, 44)]
    assert steering.paths["unsteered"] == (2 if positions == "generated" else 0)


def test_a_given_text_of_one_token(model, sae_in, sae_out, calibrated):
    config = dspa.SteeringConfig(alpha=0.6, mode="both", positions="generated")
    token = torch.tensor([[7], [44]])
    steering = dspa.Steering(sae_in, sae_out, calibrated, config)
    with steering.attach(model), torch.no_grad(), steering.responses([1, 1]):
        logits = model(token).logits
    assert steering.paths["unsteered"] == 2
    with torch.no_grad():
        assert torch.equal(logits, model(token).logits)


class Launches(TorchDispatchMode):
    """Records the dispatched ops that make or change a tensor, so no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs, result))):
            self.names.append(str(func))
        return result


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_a_decoding_step_launches_the_edit_alone(model, sae_in, sae_out, calibrated, how):
    steering = dspa.Steering(sae_in, sae_out, calibrated, dspa.SteeringConfig(alpha=0.6, mode="both"))
    change, passes = steering._change_output, []

    def watched(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        with Launches() as launches:
            edited = change(module, args, kwargs, output)
        passes.append((edited is not None and edited.shape[1], launches.names))
        return edited

    steering._change_output = watched
    with steering.attach(model):
        model.generate(**padded(PROMPTS), **SETTINGS, **how)
    steps = [names for length, names in passes if length == 1]
    assert steps == [["dspa.steer.default"]] * (N_NEW - 1)
    # A prompt has rows to be gated, which proves that launches are seen.
    assert any(len(names) > 1 and "dspa.steer.default" in names for length, names in passes if length > 1)


def test_a_compiled_step_is_compiled_once_and_finds_its_tensors_in_place(gemma, sae_in, sae_out, calibrated):
    static: dict[str, Any] = {}
    graphs = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        for node in graph.graph.find_nodes(op="placeholder"):
            static[node.name] = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
        return graph.forward

    config = compiled_decoding()
    config.compile_config.backend = backend
    torch.compiler.reset()
    settings = dspa.SteeringConfig(alpha=0.6, mode="both")
    with dspa.Steering(sae_in, sae_out, calibrated, settings, screen="int5").attach(gemma) as steering:
        wanted = gemma.generate(**padded(PROMPTS), **SETTINGS)
        before = steering.paths
        first = gemma.generate(**padded(PROMPTS), generation_config=config)
        after = steering.paths
        n_graphs = len(graphs)
        again = gemma.generate(**padded(PROMPTS), generation_config=config)
    torch.compiler.reset()
    assert torch.equal(first, wanted) and torch.equal(again, wanted)
    assert {name: after[name] - before[name] for name in COUNTED} == before
    # The second graph is the cache's, whose sliding window fills up.
    assert len(graphs) == n_graphs <= 2
    for name in ("call_counters", "self_stream_encoder_rows", "self_stream_screen_rows", "self_weights_w_dec"):
        kinds = [kind for key, kind in static.items() if name in key]
        assert kinds and all(kinds), (name, list(static))
