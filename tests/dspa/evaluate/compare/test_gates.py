"""Methods with a gate and their controls, against the decisions of single calls."""

from __future__ import annotations

from typing import Any

import pytest

import dspa
from dspa import Comparison, Method, compare
from dspa.evaluate.compare.methods import with_gate
from dspa.evaluate.responses import Response, generate_given
from dspa.evaluate.scores import score_triples
from dspa.models.sizes import sizes_of
from dspa.testing import D_IN, D_SAE_OUT, ENGLISH, make_model

from ...steering.test_vector import make_vector
from ...support.adapters import TRIPLES, ending_tokenizer

PROMPTS = [" ".join(ENGLISH[n : n + 1 + n * 5 % 9]) for n in range(6)]
GATE = dspa.EntropyGate(2.0)
NAME = "DSPA both 1, entropy >= 2"


@pytest.fixture(scope="module")
def model() -> Any:
    model = make_model("gemma2")
    model.generation_config.eos_token_id = [9]
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return ending_tokenizer()


@pytest.fixture(scope="module")
def comparison(model: Any, tokenizer: Any, dspa_method: Method) -> Comparison:
    vector = Method.vector(make_vector("response"), name="vector")
    methods = [dspa_method, Method.gated(dspa_method, GATE), Method.gated(vector, dspa.RandomGate(0.5))]
    return compare(
        *(model, tokenizer, PROMPTS, methods),
        held_out=TRIPLES[:4],
        controls=("random gate", "complement gate"),
        seeds=(0, 1),
        max_new_tokens=8,
        progress=False,
    )


def test_methods_and_their_controls(comparison: Comparison) -> None:
    assert [method.name for method in comparison.methods] == [
        *("base", "DSPA both 1", NAME, f"{NAME}: random gate", f"{NAME}: complement gate"),
        *("vector, random 0.5", "vector, random 0.5: complement gate"),
    ]
    # A random gate is another one for each seed.
    assert [len(runs) for runs in comparison.scores.values()] == [1, 1, 1, 2, 1, 1, 1]


def test_touched_tokens_are_those_of_the_calls(model: Any, tokenizer: Any, comparison: Comparison) -> None:
    """Read again by generate(), which writes the same answers."""
    by_name = {method.name: method for method in comparison.methods}
    for name in (NAME, f"{NAME}: random gate", f"{NAME}: complement gate"):
        for seed, run in enumerate(comparison.answers[name]):
            with by_name[name].attachable(seed).attach(model) as acting:
                for prompt, ids, touched in zip(PROMPTS, run.ids, run.touched, strict=True):
                    generate_given(model, [Response(tokenizer(prompt)["input_ids"], ids)])
                    assert int(acting.decisions.opened[0, : len(ids)].sum()) == touched
    share = comparison.figure("touched", NAME).value
    assert 0.1 < share < 0.9
    # Of about 90 tokens each, with answers of their own.
    assert comparison.figure("touched", f"{NAME}: random gate").value == pytest.approx(share, abs=0.2)
    assert comparison.figure("touched", "DSPA both 1") is None
    assert comparison.figure("edited", NAME).value <= share


def test_margins_are_those_of_the_gate(model: Any, tokenizer: Any, comparison: Comparison, dspa_method: Method) -> None:
    with with_gate(dspa_method.attachable(0), GATE).attach(model):
        scores = score_triples(model, tokenizer, TRIPLES[:4], progress=False)
    assert comparison.scores[NAME][0].chosen == scores.chosen.tolist()
    assert comparison.figure("margin", NAME).value == pytest.approx(scores.margin, abs=1e-6)
    assert comparison.figure("margin", NAME).value != comparison.figure("margin", "DSPA both 1").value


def test_tables(comparison: Comparison) -> None:
    runs = comparison.tables()[-1]
    assert runs.columns == ["method", "tokens", "ended", "edited", "touched", "GFLOP", "unsteered", "tokens/s"]
    assert [bool(row[4]) for row in runs.rows] == [False, False, True, True, True, True, True]


def test_operations_by_hand(model: Any, tokenizer: Any, comparison: Comparison) -> None:
    sizes, steps, n_tokens = sizes_of(model, "float32"), 0, 0
    for run in comparison.answers["base"]:
        for prompt, ids in zip(PROMPTS, run.ids, strict=True):
            n_prompt = len(tokenizer(prompt)["input_ids"])
            for i in range(len(ids)):
                steps += 2 * sizes.weights + 4 * sizes.d_attention * (n_prompt + i) * len(sizes.layers)
            n_tokens += len(ids)
    assert comparison.operations["base"] == pytest.approx(steps / n_tokens)
    edited, touched = (comparison.figure(name, NAME).value for name in ("edited", "touched"))
    run_steps = comparison.operations[NAME] - 2 * D_IN * (touched * 32 + edited * (D_SAE_OUT + 32))
    assert run_steps == pytest.approx(steps / n_tokens, rel=0.02)
    assert comparison.operations[NAME] < comparison.operations["DSPA both 1"]


def test_what_takes_no_gate(dspa_method: Method) -> None:
    gated = Method.gated(dspa_method, GATE)
    for method in (gated, Method.prefixed("my dog")):
        with pytest.raises(ValueError, match="one of DSPA, a vector"):
            Method.gated(method, GATE)
    with pytest.raises(ValueError, match=r"one that Method\.dspa made"):
        Method.static(gated)
    assert gated.digest != dspa_method.digest != Method.gated(dspa_method, GATE.complemented()).digest
