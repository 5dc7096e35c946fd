"""Tasks of lm-evaluation-harness on a tiny model, against the harness itself and against single passes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dspa import Method, SteeringConfig, SteeringVector
from dspa.errors import ModelError
from dspa.evaluate.responses import Response, log_probabilities
from dspa.fsrl import responses_of
from dspa.testing import (
    D_IN,
    L_OUT,
    make_model,
    with_tensors,
    word_tokenizer,
)

from ...support.adapters import TRIPLES, acting_adapter, ending_tokenizer, words
from .tasks import DOCUMENTS, write_tasks

harness: Any = pytest.importorskip("lm_eval", reason='needs lm-eval: pip install "dspa-kernels[eval]"')

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from dspa.evaluate.lm_eval import run as running  # noqa: E402
from dspa.evaluate.lm_eval.model import SteeredLM  # noqa: E402
from dspa.evaluate.lm_eval.run import TaskResults, Tasks, evaluate_tasks  # noqa: E402

STRONG = SteeringConfig(alpha=1.0, mode="both")
DSPA = "DSPA both 1"
PREFIX = "my own red tree"


@pytest.fixture(scope="module", autouse=True)
def without_default_tasks():
    """Reading the thousands of tasks of the harness, and what is installed on this machine, takes seconds."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(running, "TaskManager", partial(TaskManager, include_defaults=False))
        patched.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def model():
    model = make_model("gemma2")
    model.generation_config.eos_token_id = [9]
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return ending_tokenizer()


@pytest.fixture(scope="module")
def vector() -> SteeringVector:
    return SteeringVector(
        8 * torch.randn(D_IN, generator=torch.Generator().manual_seed(1)), L_OUT, positions="response"
    )


@pytest.fixture(scope="module")
def methods(model, tokenizer, dspa_method, vector) -> list[Method]:
    adapter = acting_adapter(model, responses_of(model, tokenizer, TRIPLES))
    tuned = make_model("gemma2", seed=5)
    return [
        *(dspa_method, Method.static(dspa_method), Method.adapted(adapter), Method.vector(vector)),
        *(Method.tuned(tuned), Method.prefixed(PREFIX)),
    ]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def outcome(model, tokenizer, methods, tasks) -> TaskResults:
    return evaluate_tasks(
        model, tokenizer, Tasks.load(["choosing", "writing"], tasks), methods, controls=["shuffled map"], batch_size=4
    )


def plain(lm: Any, tasks: Path, names: list[str], **settings: Any) -> dict[str, Any]:
    """Run tasks by the harness alone."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results: dict[str, Any] = harness.simple_evaluate(lm, tasks=names, task_manager=manager, **settings)
    return results


def request(context: str, *others: Any) -> Instance:
    kind = "generate_until" if isinstance(others[0], dict) else "loglikelihood"
    return Instance(kind, {}, (context, *others), 0, metadata=("a task", 0, 1))


# Every choice after every question; tokens that are the same, with the boundary at two places; and other last tokens.
PAIRS = [
    *((row["question"], f" {choice}") for row in DOCUMENTS for choice in row["choices"]),
    *(("my own", " red tree"), ("my own red", " tree"), ("my own red", " cat"), ("my own", " red dog")),
]
REQUESTS = [request(*pair) for pair in PAIRS]


@contextmanager
def acting(model: Any, method: Method) -> Iterator[Any]:
    """Attach a method, or replace the weights by its own."""
    if method.attachable is not None:
        with method.attachable(0).attach(model) as attachable:
            yield attachable
        return
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = (method.weights or before)[name]
    yield None
    for name, parameter in model.named_parameters():
        parameter.data = before[name]


def scored_apart(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """The log-probability of a continuation by `dspa.evaluate`, in a pass of its own."""
    whole, prompt = (tokenizer(text)["input_ids"] for text in (context + continuation, context))
    response = Response(prompt, whole[len(prompt) :])
    return float(log_probabilities(model, [response])) * len(response.ids)


def test_base_is_the_harness_own_model(model, tokenizer, tasks, outcome):
    lm = HFLM(model, tokenizer=ending_tokenizer(), batch_size=4)
    expected, got = plain(lm, tasks, ["choosing", "writing"])["results"], outcome.scores["base"].results
    for task, metric in (("choosing", "acc"), ("choosing", "acc_norm"), ("writing", "exact_match")):
        for name in (f"{metric},none", f"{metric}_stderr,none"):
            assert got[task][name] == expected[task][name], name
    n = len(REQUESTS) - 4
    assert SteeredLM(model, tokenizer, batch_size=4).loglikelihood(REQUESTS[:n]) == lm.loglikelihood(REQUESTS[:n])
    assert tokenizer.pad_token == "<pad>" and tokenizer.padding_side == "left"


@pytest.mark.parametrize("number", range(5), ids=["dspa", "static", "adapter", "vector", "tuned"])
def test_scores_are_those_of_single_passes(model, tokenizer, outcome, methods, number):
    method = methods[number]
    with acting(model, method):
        expected = [scored_apart(model, tokenizer, *pair) for pair in PAIRS]
        lm = SteeredLM(model, tokenizer, batch_size=5)
        got = [score for score, _ in lm.loglikelihood(REQUESTS)]
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-4)
    base = [scored_apart(model, tokenizer, *pair) for pair in PAIRS]
    assert min(abs(a - b) for a, b in zip(base, expected, strict=True)) > 1e-3
    chosen, start = [], 0
    for row in DOCUMENTS:
        of_row = expected[start : start + len(row["choices"])]
        chosen.append(of_row.index(max(of_row)) == row["answer"])
        start += len(of_row)
    scores = outcome.scores[method.name]
    assert scores.results["choosing"]["acc,none"] == pytest.approx(sum(chosen) / len(chosen))
    assert scores.samples["choosing"]["acc,none"] == list(map(float, chosen))


def test_an_edit_by_hand_from_the_last_token_of_the_context(model, tokenizer, vector):
    context, continuation = "my own red", " tree by the house"
    ids, n = tokenizer(context + continuation)["input_ids"], len(tokenizer(context)["input_ids"])

    def add(_layer: Any, _args: Any, output: Any) -> Any:
        h = (output[0] if isinstance(output, tuple) else output).clone()
        h[:, n - 1 :] += vector.vector
        return (h, *output[1:]) if isinstance(output, tuple) else h

    handle = model.model.layers[L_OUT].register_forward_hook(add)
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    handle.remove()
    expected = sum(scores[place - 1, ids[place]].item() for place in range(n, len(ids)))
    others = [request("the cat is a dog of my own and we see it", " run"), request("fish", " and some more good food")]
    with vector.attach(model):
        (score, greedy), *_ = SteeredLM(model, tokenizer).loglikelihood([request(context, continuation), *others])
    assert score == pytest.approx(expected, rel=1e-5)
    assert greedy == all(int(scores[place - 1].argmax()) == ids[place] for place in range(n, len(ids)))


def test_a_boundary_at_another_place_is_another_pass(model, tokenizer, dspa_method):
    """The harness' own model takes the last token of one from the pass of the other."""
    pairs = [request("my own", " red tree"), request("my own red", " tree")]
    with acting(model, dspa_method):
        (together, _), (last, _) = SteeredLM(model, tokenizer).loglikelihood(pairs)
        (first, _), *_ = SteeredLM(model, tokenizer).loglikelihood([request("my own", " red")])
    assert abs(together - first - last) > 1e-2


def test_generation_is_steered_from_the_end_of_the_context(model, tokenizer, dspa_method, outcome):
    settings = {"until": ["house"], "do_sample": False, "max_gen_toks": 6}
    for method in (Method.base(), dspa_method):
        texts = []
        with acting(model, method):
            for row in DOCUMENTS:
                inputs = tokenizer(row["question"], return_tensors="pt")
                ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=[9])[0]
                new = ids[inputs["input_ids"].shape[1] :]
                texts.append(tokenizer.decode(new, skip_special_tokens=True).split("house")[0])
            lm = SteeredLM(model, tokenizer, batch_size=4)
            assert lm.generate_until([request(row["question"], dict(settings)) for row in DOCUMENTS]) == texts
        exact = [text == row["choices"][row["answer"]] for text, row in zip(texts, DOCUMENTS, strict=True)]
        assert outcome.scores[method.name].results["writing"]["exact_match,none"] == sum(exact) / len(exact)


def test_prefix_stands_where_a_comparison_puts_it(model, tokenizer, tasks, methods, outcome):
    expected = [scored_apart(model, tokenizer, f"{PREFIX}\n\n{context}", text) for context, text in PAIRS]
    lm = SteeredLM(model, tokenizer, prefix=PREFIX)
    assert [score for score, _ in lm.loglikelihood(REQUESTS)] == pytest.approx(expected, rel=1e-4)
    written = lm.generate_until([request("the cat", {"until": [], "max_gen_toks": 6})])
    assert written == SteeredLM(model, tokenizer).generate_until(
        [request(f"{PREFIX}\n\nthe cat", {"until": [], "max_gen_toks": 6})]
    )
    with pytest.raises(ValueError, match="`chat`"):
        lm.apply_chat_template([{"role": "user", "content": "the cat"}])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    try:
        chat = SteeredLM(model, tokenizer, prefix=PREFIX, chat=True)
        assert chat.apply_chat_template([{"role": "user", "content": "the cat"}]) == f"system {PREFIX} user the cat "
        # The text of a conversation has it already.
        assert chat.loglikelihood(REQUESTS[:3]) == SteeredLM(model, tokenizer).loglikelihood(REQUESTS[:3])
        chatted = evaluate_tasks(
            model, tokenizer, Tasks.load(["choosing"], tasks), methods[-1:], chat=True, batch_size=4
        )
        got = chatted.scores[methods[-1].name].samples["choosing"]["acc,none"]
        contexts = [f"system {PREFIX} user {row['question']} " for row in DOCUMENTS]
        scores = [
            [scored_apart(model, tokenizer, context.rstrip(), f" {choice}") for choice in row["choices"]]
            for context, row in zip(contexts, DOCUMENTS, strict=True)
        ]
        assert got == [float(row.index(max(row)) == doc["answer"]) for row, doc in zip(scores, DOCUMENTS, strict=True)]
    finally:
        tokenizer.chat_template = None


def test_whole_texts_have_no_boundary(model, tokenizer, tasks, methods):
    everywhere = Method.vector(SteeringVector(8 * torch.ones(D_IN), L_OUT), name="everywhere")
    adapter, tuned = methods[2], methods[4]
    got = evaluate_tasks(model, tokenizer, Tasks.load(["whole"], tasks), [everywhere, adapter, tuned], batch_size=4)
    for method in got.methods:
        with acting(model, method):
            expected = plain(HFLM(model, tokenizer=ending_tokenizer(), batch_size=4), tasks, ["whole"])["results"]
        assert got.scores[method.name].results["whole"]["word_perplexity,none"] == pytest.approx(
            expected["whole"]["word_perplexity,none"]
        )
    for method in (methods[0], methods[1], methods[3], methods[5]):
        with pytest.raises(ModelError, match=r"A method for whole, which scores whole texts .* the base model"):
            evaluate_tasks(model, tokenizer, Tasks.load(["choosing", "whole"], tasks), [method])
        with acting(model, method), pytest.raises(ModelError, match="scores whole texts"):
            SteeredLM(model, tokenizer, prefix=method.prefix).loglikelihood_rolling([request("the cat", {})])


def test_an_empty_context_selects_nothing(model, tokenizer, tasks, methods):
    evaluate_tasks(model, tokenizer, Tasks.load(["without_context"], tasks), [methods[3]])
    with pytest.raises(ModelError, match=r"A context is empty; accepted: one with text"):
        evaluate_tasks(model, tokenizer, Tasks.load(["without_context"], tasks), [methods[0]])
    with acting(model, methods[0]), pytest.raises(ModelError, match="A context is empty"):
        SteeredLM(model, tokenizer).generate_until([request("", {"until": [], "max_gen_toks": 6})])


def test_contexts_that_select_nothing_count_as_base_and_are_reported(model, tokenizer, tasks, dspa_method):
    parts = dspa_method.parts[0]
    nothing = with_tensors(parts.cdmap, values=torch.zeros_like(parts.cdmap.values))
    empty = Method.dspa(parts.sae_in, parts.sae_out, nothing, STRONG, name="empty")
    with pytest.warns(UserWarning, match="No prompt of this call selects a latent"):
        got = evaluate_tasks(
            model, tokenizer, Tasks.load(["choosing", "writing"], tasks), [empty, dspa_method], batch_size=4
        )
    assert got.scores["empty"].results == got.scores["base"].results
    n = len({row["question"] for row in DOCUMENTS})
    counts = {name: scores.contexts["choosing"] for name, scores in got.scores.items()}
    assert counts == {
        "base": {"contexts": n, "cut": 0},
        "empty": {"contexts": n, "cut": 0, "unsteered": n},
        DSPA: {"contexts": n, "cut": 0, "unsteered": 0},
    }
    assert got.scores["empty"].contexts["writing"] == counts["empty"]
    assert got.notes() == [f"empty: {2 * n} of {2 * n} contexts select no latent, and count as the base model."]


def test_what_is_too_long_loses_its_beginning(model, tokenizer, dspa_method):
    long = words(3, 140)
    with acting(model, dspa_method):
        lm = SteeredLM(model, tokenizer)
        (score, _), _ = lm.loglikelihood([request(long, " the old house"), request("the cat", " fish")])
        ids = tokenizer(long + " the old house")["input_ids"]
        expected = 3 * float(log_probabilities(model, [Response(ids[-129:-3], ids[-3:])]))
        (written,) = lm.generate_until([request(long, {"until": [], "max_gen_toks": 6})])
        rows = torch.tensor([tokenizer(long)["input_ids"][-122:]])
        ids = model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=6, do_sample=False)[0, 122:]
    assert score == pytest.approx(expected, rel=1e-4)
    assert written == tokenizer.decode(ids, skip_special_tokens=True)
    contexts = lm.contexts["a task"]
    assert contexts.cut == {long} and contexts.seen == {long, "the cat"} and not contexts.unsteered
    with pytest.raises(ValueError, match=r"A continuation is of 129 tokens .* 1 to 128"):
        lm.loglikelihood([request("the", f" {words(4, 129)}")])


def test_settings_are_the_harness_own(model, tokenizer, tasks, dspa_method):
    given = {"num_fewshot": 2, "limit": 5}
    got = evaluate_tasks(model, tokenizer, Tasks.load(["both"], tasks), [dspa_method], seed=7, batch_size=4, **given)
    with acting(model, dspa_method):
        seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 7)
        expected = plain(SteeredLM(model, tokenizer, batch_size=4), tasks, ["both"], **given, **seeds)
    scores = got.scores[DSPA]
    for task, metric in (("choosing", "acc,none"), ("writing", "exact_match,none")):
        assert scores.results[task][metric] == expected["results"][task][metric]
    assert scores.n_shot == {"both": 2, "choosing": 2, "writing": 2} and scores.n_samples["choosing"]["effective"] == 5
    assert got.groups == {"both": ["choosing", "writing"]} and got.settings["seed"] == 7


def test_table(outcome):
    table = outcome.table()
    assert table.columns == ["method", "task", "metric", "value", "std. error"]
    names = ["base", DSPA, "  shuffled map", "Static-SAE both 1", "FSRL", "vector 1", "tuned", f'prefix "{PREFIX}"']
    assert [row[:3] for row in table.rows] == [
        [name, task, metric]
        for task, metric in (("choosing", "acc"), ("choosing", "acc_norm"), ("writing", "exact_match"))
        for name in names
    ]
    results = outcome.scores[DSPA].results["choosing"]
    assert table.rows[1][3:] == [f"{results['acc,none']:.4f}", f"{results['acc_stderr,none']:.4f}"]


def test_finished_methods_are_not_run_again(model, tokenizer, tasks, dspa_method, vector, tmp_path, monkeypatch):
    ran: list[SteeredLM] = []
    run = running._run

    def counted(lm: SteeredLM, *others: Any) -> Any:
        ran.append(lm)
        if len(ran) == failing:
            raise KeyboardInterrupt
        return run(lm, *others)

    monkeypatch.setattr(running, "_run", counted)
    path = tmp_path / "results.json"

    def go(*methods: Method, **settings: Any) -> dict[str, Any]:
        ran.clear()
        given = {"results": path, "limit": 4} | settings
        evaluate_tasks(model, tokenizer, Tasks.load(["choosing"], tasks), methods, **given)
        return json.loads(path.read_text())

    failing = 2
    with pytest.raises(KeyboardInterrupt):
        go(dspa_method)
    assert not path.exists() and path.with_name("results.json.partial").exists()
    failing = 0
    first = go(dspa_method)
    assert len(ran) == 1 and not path.with_name("results.json.partial").exists()
    assert [method["name"] for method in first["methods"]] == ["base", DSPA]
    assert first["settings"]["versions"].keys() == {"dspa-kernels", "lm-eval", "torch", "transformers"}
    assert go(dspa_method) == first and ran == []
    second = go(dspa_method, Method.vector(vector))
    assert len(ran) == 1 and second["methods"][:2] == first["methods"]
    go(dspa_method, limit=3)
    assert len(ran) == 2
    # Other data of the same name.
    data = tasks.parent / "data.jsonl"
    before = data.read_text()
    try:
        data.write_text(before.replace("cat", "sky"))
        go(dspa_method)
    finally:
        data.write_text(before)
    assert len(ran) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"names": []}, "`tasks` is empty; accepted: one name or more"),
        ({"names": ["chosing"]}, "`tasks` is 'chosing'; accepted: names of tasks, groups or tags, such as choosing"),
        ({"include_path": "nowhere"}, "`include_path` is nowhere; accepted: a folder"),
        ({"num_fewshot": -1}, "`num_fewshot` is -1; accepted: a whole number >= 0"),
        ({"limit": 0}, "`limit` is 0; accepted: a whole number >= 1"),
        ({"seed": -3}, "`seed` is -3; accepted: a whole number >= 0"),
        ({"batch_size": 0}, "`batch_size` is 0; accepted: a whole number >= 1"),
        ({"batch_size": "auto"}, "`batch_size` is 'auto'; accepted: a whole number >= 1"),
        ({"controls": ["random set"]}, "`controls` is 'random set'; accepted: shuffled map, wrong layer"),
    ],
)
def test_bad_input(model, tokenizer, tasks, dspa_method, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        loaded = Tasks.load(given.pop("names", ["choosing"]), given.pop("include_path", tasks))
        evaluate_tasks(model, tokenizer, loaded, [dspa_method], **given)


def test_texts_of_a_tokenizer_without_an_end(model, dspa_method):
    with pytest.raises(
        ModelError, match=r"The tokenizer is without an end token; accepted: .* Set tokenizer.eos_token"
    ):
        SteeredLM(model, word_tokenizer()).generate_until([request("the", {"until": []})])


def test_a_task_without_its_data(tmp_path):
    tasks = write_tasks(tmp_path)
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(ValueError, match=r"`tasks` is choosing, which cannot be loaded .* accepted: tasks whose data"):
        Tasks.load(["choosing"], tasks)
