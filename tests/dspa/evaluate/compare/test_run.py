"""A comparison on a tiny model, against single calls of what it is made of."""

from __future__ import annotations

import io
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from dspa import Comparison, Method, SteeringConfig, compare
from dspa.errors import AdapterError, ModelError
from dspa.evaluate.compare import run as running
from dspa.evaluate.scores import score_triples
from dspa.fsrl import FSRLAdapter, responses_of
from dspa.models.reading import read_layers
from dspa.steering.dspa import Steering
from dspa.testing import D_SAE_IN, D_SAE_OUT, ENGLISH, L_IN, L_OUT, make_model, make_sae, with_tensors

from ...support.adapters import TRIPLES, acting_adapter, ending_tokenizer

PROMPTS = [" ".join(ENGLISH[n : n + 1 + n * 5 % 9]) for n in range(9)]
N_NEW = 7
STRONG = SteeringConfig(alpha=1.0, mode="both")
COUNTERS = {"the": re.compile(r"\bthe\b"), "longer": lambda prompt, answer: float(len(answer) > len(prompt))}
SETTINGS: dict[str, Any] = {"max_new_tokens": N_NEW, "batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def model():
    model = make_model("gemma2")
    model.generation_config.eos_token_id = [9]
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return ending_tokenizer()


@pytest.fixture(scope="module")
def adapter(model, tokenizer) -> FSRLAdapter:
    return acting_adapter(model, responses_of(model, tokenizer, TRIPLES))


@pytest.fixture(scope="module")
def methods(dspa_method, adapter) -> list[Method]:
    kept = [Method.adapted(adapter), Method.adapted(adapter, fraction=0.1)]
    return [dspa_method, Method.static(dspa_method), *kept, Method.prefixed("my own red tree")]


@pytest.fixture(scope="module")
def comparison(model, tokenizer, methods) -> Comparison:
    return compare(model, tokenizer, PROMPTS, methods, held_out=TRIPLES, counters=COUNTERS, **SETTINGS)


DSPA = "DSPA both 1"


def test_methods_in_their_order(comparison):
    assert [method.name for method in comparison.methods] == [
        "base",
        DSPA,
        f"{DSPA}: random set",
        f"{DSPA}: shuffled map",
        f"{DSPA}: wrong layer",
        "Static-SAE both 1",
        "FSRL",
        "FSRL: random latents",
        "FSRL top 0.1",
        "FSRL top 0.1: random latents",
        'prefix "my own red tree"',
    ]
    assert {name: len(runs) for name, runs in comparison.answers.items()} == dict.fromkeys(comparison.answers, 3)
    # A control that draws is another one for each seed. The others score triples once.
    assert [len(runs) for runs in comparison.scores.values()] == [1, 1, 3, 3, 1, 1, 1, 3, 1, 3, 1]
    assert len({json.dumps(runs[0].ids) for runs in comparison.answers.values()}) == len(comparison.methods)


def longest_first(tokenizer: Any) -> list[int]:
    return sorted(range(len(PROMPTS)), key=lambda n: len(tokenizer(PROMPTS[n])["input_ids"]), reverse=True)


def sampled(model: Any, tokenizer: Any, seed: int) -> dict[int, list[int]]:
    """Sample answers by a plain generate(), as the model is steered now."""
    order, answers = longest_first(tokenizer), {}
    for start in range(0, len(order), 4):
        numbers = order[start : start + 4]
        inputs = tokenizer([PROMPTS[n] for n in numbers], return_tensors="pt", padding=True)
        torch.manual_seed(random.Random(f"{seed}/{start}").getrandbits(32))
        output = model.generate(**inputs, max_new_tokens=N_NEW, do_sample=True, temperature=1.0, eos_token_id=[9])
        for n, ids in zip(numbers, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            answers[n] = ids[: ids.index(9) + 1] if 9 in ids else ids
    return answers


def test_every_seed_draws_other_answers(comparison):
    """A generator on a CPU uses 32 bits of its seed, so seeds that differ in upper bits alone would draw the same."""
    for runs in comparison.answers.values():
        drawn = [tuple(map(tuple, run.ids)) for run in runs]
        assert len(set(drawn)) == len(drawn) == 3


@pytest.mark.parametrize("seed", [0, 2])
def test_answers_are_those_of_generate(model, tokenizer, comparison, dspa_method, adapter, seed):
    expected = sampled(model, tokenizer, seed)
    assert comparison.answers["base"][seed].ids == [expected[n] for n in range(len(PROMPTS))]
    parts = dspa_method.parts[0]
    with Steering(parts.sae_in, parts.sae_out, parts.cdmap, STRONG).attach(model):
        expected = sampled(model, tokenizer, seed)
    assert comparison.answers[DSPA][seed].ids == [expected[n] for n in range(len(PROMPTS))]
    adapter.fraction = 0.1
    with adapter.attach(model):
        expected = sampled(model, tokenizer, seed)
    assert comparison.answers["FSRL top 0.1"][seed].ids == [expected[n] for n in range(len(PROMPTS))]
    texts = [tokenizer.decode(expected[n], skip_special_tokens=True) for n in range(len(PROMPTS))]
    assert comparison.texts["FSRL top 0.1"][seed] == texts


def test_edited_tokens_are_those_of_generate(model, tokenizer, comparison, dspa_method):
    parts, first = dspa_method.parts[0], longest_first(tokenizer)[0]
    ids = comparison.answers[DSPA][0].ids[first]
    weak = Method.dspa(parts.sae_in, parts.sae_out, parts.cdmap, SteeringConfig(alpha=1.0, k_diff=1))
    greedy = compare(model, tokenizer, PROMPTS, [weak], temperature=0.0, controls=(), **SETTINGS)
    run = greedy.answers[weak.name][0]
    assert len(greedy.answers["base"]) == 1
    shares = []
    for n, prompt in enumerate(PROMPTS):
        inputs = tokenizer(prompt, return_tensors="pt")
        with Steering(parts.sae_in, parts.sae_out, parts.cdmap, weak.parts[0].config, record=True).attach(model) as s:
            model.generate(**inputs, max_new_tokens=N_NEW, do_sample=False)
        length = inputs["input_ids"].shape[1]
        expected = [edit.position + 1 - length for edit in s.trace]
        assert run.edited[n] == [token for token in expected if token < len(run.ids[n])]
        shares.append(len(run.edited[n]) / len(run.ids[n]))
    assert 0 < sum(shares) < len(shares) and ids
    total = sum(map(len, run.edited)) / sum(map(len, run.ids))
    assert greedy.figure("edited", weak.name).value == pytest.approx(total)


def test_measures_of_answers_by_hand(model, tokenizer, comparison):
    for name in ("base", DSPA, 'prefix "my own red tree"'):
        sums, n_tokens, means, counts, ended = 0.0, 0, [], [], []
        for seed in range(3):
            for prompt, ids in zip(PROMPTS, comparison.answers[name][seed].ids, strict=True):
                # The prefix is no part of the prompt here.
                start = tokenizer(prompt)["input_ids"]
                with torch.no_grad():
                    logits = model(torch.tensor([start + ids])).logits[0].double().log_softmax(dim=-1)
                nll = -sum(float(logits[len(start) - 1 + i, token]) for i, token in enumerate(ids))
                sums, n_tokens = sums + nll, n_tokens + len(ids)
                means.append(math.exp(nll / len(ids)))
                text = tokenizer.decode(ids, skip_special_tokens=True)
                counts.append(text.split().count("the"))
                ended.append(ids[-1] == 9)
        assert comparison.figure("perplexity", name).value == pytest.approx(math.exp(sums / n_tokens), rel=1e-4)
        assert comparison.figure("answer_perplexity", name).value == pytest.approx(sum(means) / len(means), rel=1e-4)
        assert comparison.figure("the", name).value == pytest.approx(sum(counts) / len(counts))
        assert comparison.figure("ended", name).value == pytest.approx(sum(ended) / len(ended))
    assert comparison.figure("edited", "base") is None and comparison.unsteered("base") is None


def test_scores_are_those_of_one_method_alone(model, tokenizer, comparison, dspa_method, adapter):
    def check(name: str, scores: Any) -> None:
        run = comparison.scores[name][0]
        assert run.chosen == pytest.approx(scores.chosen.tolist(), rel=1e-5)
        assert run.rejected == pytest.approx(scores.rejected.tolist(), rel=1e-5)
        assert comparison.figure("margin", name).value == pytest.approx(scores.margin, rel=1e-4)
        assert comparison.figure("accuracy", name).value == pytest.approx(scores.accuracy)

    check("base", score_triples(model, tokenizer, TRIPLES, progress=False))
    adapter.fraction = 1.0
    with adapter.attach(model):
        check("FSRL", score_triples(model, tokenizer, TRIPLES, progress=False))
    prefixed = [{**row, "prompt": f"my own red tree\n\n{row['prompt']}"} for row in TRIPLES]
    check('prefix "my own red tree"', score_triples(model, tokenizer, prefixed, progress=False))
    parts = dspa_method.parts[0]
    with Steering(parts.sae_in, parts.sae_out, parts.cdmap, STRONG).attach(model) as steering:
        check(DSPA, score_triples(model, tokenizer, TRIPLES, progress=False))
        # One response at a time, by the passes of a caller.
        for n, response in enumerate(responses_of(model, tokenizer, TRIPLES)[:6]):
            start = len(response.prompt)
            with torch.no_grad(), steering.responses([start]):
                logits = model(torch.tensor([response.prompt + response.ids])).logits[0].double().log_softmax(dim=-1)
            mean = sum(float(logits[start - 1 + i, token]) for i, token in enumerate(response.ids)) / len(response.ids)
            run = comparison.scores[DSPA][0]
            assert (run.rejected if n % 2 else run.chosen)[n // 2] == pytest.approx(mean, rel=1e-4)


def test_prompts_that_select_nothing_are_counted(model, tokenizer, dspa_method):
    """A map in which a single row is not zero, that of a latent that some prompts have."""
    parts = dspa_method.parts[0]

    def active(prompt: str) -> torch.Tensor:
        h = read_layers(model, [L_IN], input_ids=torch.tensor([tokenizer(prompt)["input_ids"]]))[L_IN][0]
        return (parts.sae_in.encode(h) > 0).any(dim=0)

    on = torch.stack([active(prompt) for prompt in PROMPTS])
    on_triples = torch.stack([active(row["prompt"]) for row in TRIPLES])
    some = on.any(dim=0) & ~on.all(dim=0) & on_triples.any(dim=0) & ~on_triples.all(dim=0)
    latent = int(some.nonzero()[0])
    values = torch.zeros_like(parts.cdmap.values)
    values[latent] = parts.cdmap.values[latent]
    config = SteeringConfig(k_prompt=D_SAE_IN, alpha=1.0)
    method = Method.dspa(parts.sae_in, parts.sae_out, with_tensors(parts.cdmap, values=values), config)
    got = compare(model, tokenizer, PROMPTS, [method], seeds=[4], held_out=TRIPLES, controls=(), **SETTINGS)
    base, steered = got.answers["base"][0], got.answers[method.name][0]
    assert steered.unsteered == (~on[:, latent]).tolist()
    assert got.unsteered(method.name) == int((~on[:, latent]).sum())
    for n, empty in enumerate(steered.unsteered):
        if empty:
            assert steered.ids[n] == base.ids[n] and steered.edited[n] == []
    assert got.scores[method.name][0].unsteered == (~on_triples[:, latent]).tolist()


def test_the_bar_counts_the_answers_to_write(model, tokenizer, tmp_path, monkeypatch):
    """Scores take far less time than answers. Counted as if alike, they make the first estimate many times too long."""
    bars: list[Any] = []

    class Bar(tqdm):
        def __init__(self, **options: Any) -> None:
            super().__init__(file=io.StringIO(), **options)
            bars.append(self)

    monkeypatch.setattr(running, "tqdm", Bar)
    settings = {"held_out": TRIPLES, "results": tmp_path / "out.json", **SETTINGS, "progress": True}
    first, second = Method.prefixed("my own"), Method.prefixed("red tree")
    compare(model, tokenizer, PROMPTS, [first], **settings)
    compare(model, tokenizer, PROMPTS, [first, second], **settings)
    # Three seeds for the base model and a method, then for the method that is new.
    assert [(bar.n, bar.total) for bar in bars] == [(2 * 3 * 9, 2 * 3 * 9), (3 * 9, 3 * 9)]


def test_a_stopped_comparison_goes_on(model, tokenizer, methods, comparison, tmp_path, monkeypatch):
    results, partial = tmp_path / "out.json", tmp_path / "out.json.partial"
    settings = {"held_out": TRIPLES, "counters": COUNTERS, "results": results, **SETTINGS}
    generated: list[int] = []
    generate = running.continue_prompts

    def limited(*arguments: Any, **options: Any) -> Any:
        generated.append(len(generated))
        if len(generated) == limit:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr(running, "continue_prompts", limited)
    # 9 prompts are 3 batches: the third run is stopped in its second batch.
    limit = 8
    with pytest.raises(KeyboardInterrupt):
        compare(model, tokenizer, PROMPTS, methods, **settings)
    assert partial.exists() and not results.exists()
    # As after a loss of power. One more bracket is left at the end.
    partial.write_text(partial.read_text()[:-1])
    limit = -1
    n_before = len(generated)
    again = compare(model, tokenizer, PROMPTS, methods, **settings)
    # One of the two finished runs was cut.
    assert len(generated) - n_before == (len(comparison.methods) * 3 - 1) * 3
    assert not partial.exists()
    for name, runs in comparison.answers.items():
        assert [run.ids for run in again.answers[name]] == [run.ids for run in runs]
    record = json.loads(results.read_text())
    assert [method["name"] for method in record["methods"]] == [method.name for method in comparison.methods]
    # Runs with the same inputs are used again, those of another alpha are not.
    parts, n_before = methods[0].parts[0], len(generated)
    more = Method.dspa(parts.sae_in, parts.sae_out, parts.cdmap, SteeringConfig(alpha=0.3, mode="both"))
    compare(model, tokenizer, PROMPTS, [*methods, more], controls=(), **settings)
    assert len(generated) - n_before == 3 * 3
    n_before = len(generated)
    compare(model, tokenizer, PROMPTS[:5], methods[1:2], controls=(), **settings)
    assert len(generated) - n_before == 2 * 3 * 2


def test_a_random_set_is_that_of_the_answers_in_hand(model, tokenizer, dspa_method, tmp_path):
    """Its densities are of the base model's answers, so other prompts make another set, also for the same triples."""
    settings = {"held_out": TRIPLES[:5], "controls": ["random set"], "seeds": [0], **SETTINGS}
    compare(model, tokenizer, PROMPTS[:4], [dspa_method], results=tmp_path / "out.json", **settings)
    again = compare(model, tokenizer, PROMPTS[4:], [dspa_method], results=tmp_path / "out.json", **settings)
    alone = compare(model, tokenizer, PROMPTS[4:], [dspa_method], **settings)
    assert again.scores[f"{DSPA}: random set"][0] == alone.scores[f"{DSPA}: random set"][0]


def test_the_bar_names_methods_from_the_start(model, tokenizer, dspa_method, capsys):
    compare(model, tokenizer, PROMPTS, [dspa_method], held_out=TRIPLES, **SETTINGS | {"progress": True})
    err = capsys.readouterr().err
    # 5 methods by 3 seeds and 9 prompts.
    assert "base, seed 0:   0%" in err and "DSPA both 1: shuffled map, seed 2" in err
    assert f"{5 * 3 * 9}/{5 * 3 * 9}" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "`prompts` is empty"),
        ({"methods": []}, "`methods` is empty"),
        ({"prefer": "margin"}, "`prefer` is 'margin'; accepted: the. Give held-out triples"),
        ({"prefer": "greeting"}, "`prefer` is 'greeting'; accepted: the"),
        ({"controls": ["random"]}, "`controls` is 'random'; accepted: random set, shuffled map, wrong layer"),
        ({"seeds": [1, 1]}, "`seeds` is"),
        ({"seeds": 3}, "`seeds` is 3; accepted: a list of whole numbers. For 3 seeds write range(3)"),
        ({"counters": {"a": lambda prompt, answer: None}}, "The counter 'a' is a function that returned None"),
        ({"counters": {"a": lambda prompt, answer: math.nan}}, "The counter 'a' is a function that returned nan"),
        ({"held_out": []}, "a list without a triple; accepted: one triple or more"),
        ({"counters": {"margin": re.compile("a")}}, "The name of a counter is 'margin'; accepted: any other than"),
        ({"counters": {"a": "a"}}, "The counter 'a' is a str; accepted: a compiled regular expression"),
        ({"max_perplexity": 0}, "`max_perplexity` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"max_new_tokens": 200}, "tokens; accepted: up to 128, the model's positions"),
    ],
)
def test_what_cannot_be_compared(model, tokenizer, dspa_method, change, message):
    settings = {"prompts": PROMPTS, "methods": [dspa_method], "counters": {"the": re.compile("the")}, **SETTINGS}
    settings |= change
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(model, tokenizer, settings.pop("prompts"), settings.pop("methods"), **settings)


def test_an_adapter_keeps_its_fraction(model, tokenizer, adapter):
    adapter.fraction = 0.7
    compare(model, tokenizer, PROMPTS[:2], [Method.adapted(adapter, fraction=0.1)], **SETTINGS)
    assert adapter.fraction == 0.7
    adapter.fraction = 1.0


def test_an_adapter_of_another_model(model, tokenizer):
    other = FSRLAdapter(make_sae(L_OUT, D_SAE_OUT, d_in=32))
    with pytest.raises(ModelError, match="it is an SAE of another model"):
        compare(model, tokenizer, PROMPTS, [Method.adapted(other.eval())], **SETTINGS)


def test_a_model_that_is_steered_already(model, tokenizer, dspa_method):
    with dspa_method.attachable(0).attach(model), pytest.raises(ModelError, match="steered already"):
        compare(model, tokenizer, PROMPTS, [dspa_method], **SETTINGS)


def test_methods_of_one_name(model, tokenizer, dspa_method):
    with pytest.raises(ValueError, match="with the name 'DSPA both 1' twice"):
        compare(model, tokenizer, PROMPTS, [dspa_method, dspa_method], **SETTINGS)


def test_results_of_something_else(model, tokenizer, dspa_method, tmp_path: Path):
    path = tmp_path / "prompts.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="which holds something else"):
        compare(model, tokenizer, PROMPTS, [dspa_method], results=path, **SETTINGS)
    assert path.read_text() == "[1, 2]"


@pytest.mark.parametrize("place", [".", "no/such/folder.json"])
def test_results_where_no_file_can_be(model, tokenizer, dspa_method, tmp_path: Path, place):
    with pytest.raises(ValueError, match=r"The file of results is .*; accepted: a file in a folder that exists"):
        compare(model, tokenizer, PROMPTS, [dspa_method], results=tmp_path / place, **SETTINGS)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("the cat", "`prompts` is the text 'the cat'; accepted: a list of texts"),
        (["the cat", 5], "prompt 2: `prompt` is of type int"),
        (["  "], "prompt 1: `prompt` is without text"),
        ([[]], "prompt 1: `prompt` is without text"),
        ([[{"role": "user"}]], "`prompt[0]` is without 'content'"),
    ],
)
def test_bad_prompts(model, tokenizer, dspa_method, prompts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(model, tokenizer, prompts, [dspa_method], **SETTINGS)


def test_what_is_not_a_list_of_methods(model, tokenizer, dspa_method):
    with pytest.raises(ValueError, match="`methods` is a single method"):
        compare(model, tokenizer, PROMPTS, dspa_method, **SETTINGS)
    with pytest.raises(ValueError, match=r"`methods` is with a Steering; accepted: what Method\.dspa"):
        compare(model, tokenizer, PROMPTS, [dspa_method.attachable(0)], **SETTINGS)


def test_what_is_not_an_adapter(dspa_method):
    with pytest.raises(AdapterError, match="`adapter` is a Steering; accepted: an FSRLAdapter"):
        Method.adapted(dspa_method.attachable(0))


def test_an_invalid_fraction(adapter):
    with pytest.raises(AdapterError, match="`fraction` is 2"):
        Method.adapted(adapter, fraction=2)
