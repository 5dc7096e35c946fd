"""Answers to a benchmark on a tiny model, against answers one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from dspa import Method, SteeringConfig
from dspa.data.templates import date_of_today
from dspa.errors import ModelError
from dspa.evaluate.answers import run as running
from dspa.evaluate.answers.run import answer_questions
from dspa.evaluate.benchmarks import Benchmark, MethodAnswers
from dspa.evaluate.compare.methods import CONTROLS
from dspa.steering.dspa import Steering
from dspa.testing import ENGLISH, make_model

from ...support.adapters import ending_tokenizer
from ...support.benchmarks import question, write_lines, write_list

TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'we', 'assistant': 'you', 'system': 'the'}[m.role] }} {{ m.content }} "
    "{% endfor %}{% if add_generation_prompt %}you{% endif %}"
)
CATEGORIES = ["writing", "math", "stem", "roleplay", "writing", "coding", "poems"]
QUESTIONS = [
    question(
        81 + n,
        category,
        " ".join(ENGLISH[n : n + 2 + n * 3 % 7]),
        *([" ".join(ENGLISH[20 + n : 22 + n * 5 % 6 + n])] if n != 3 else []),
    )
    for n, category in enumerate(CATEGORIES)
]
TEMPERATURES = {"writing": 0.7, "math": 0, "stem": 0.1, "roleplay": 0.7, "coding": 0, "poems": 0.7}
# A token that some answers come to, and others do not.
N_NEW, END_ID = 9, 27
SETTINGS: dict[str, Any] = {"max_new_tokens": N_NEW, "batch_size": 4, "seeds": (0, 5), "progress": False}
STRONG = SteeringConfig(alpha=1.0, mode="both")


@pytest.fixture(scope="module")
def model():
    return ended(make_model("gemma2"))


def ended(model: Any) -> Any:
    model.generation_config.eos_token_id = [END_ID]
    model.generation_config.top_k = 20
    return model


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = ending_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Benchmark:
    return Benchmark.read(write_lines(tmp_path_factory.mktemp("questions") / "question.jsonl", QUESTIONS))


@pytest.fixture(scope="module")
def methods(dspa_method) -> list[Method]:
    return [dspa_method, Method.prefixed("my own red tree"), Method.tuned(make_model("gemma2", seed=1))]


@pytest.fixture(scope="module")
def folder(model, tokenizer, asked, methods, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made") / "answers"
    answer_questions(model, tokenizer, asked, methods, out, controls=CONTROLS, **SETTINGS)
    return out


def one_by_one(model: Any, tokenizer: Any, record: dict[str, Any], seed: int, system: str = "") -> list[str]:
    """Answer the turns of a question without a cache and without a batch, as the model is now."""
    messages, texts = [{"role": "system", "content": system}] if system else [], []
    for n, turn in enumerate(record["turns"]):
        messages.append({"role": "user", "content": turn})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids, temperature = list(prompt), TEMPERATURES[record["category"]]
        generator = Random(f"{seed}/{record['question_id']}/{n}")
        for _ in range(N_NEW):
            with torch.no_grad():
                logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
            if temperature:
                top = (logits / temperature).topk(20)
                probabilities = torch.zeros_like(logits).scatter(0, top.indices, top.values.softmax(0))
                token = int((probabilities.cumsum(0) <= generator.random()).sum())
            else:
                token = int(logits.argmax())
            ids.append(token)
            if token == END_ID:
                break
        texts.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip())
        messages.append({"role": "assistant", "content": texts[-1]})
    return texts


def load_model_answers(path: Path) -> dict[int, Any]:
    """As FastChat's judge reads a file."""
    return {line["question_id"]: line for line in map(json.loads, path.read_text().splitlines())}


@pytest.mark.parametrize("method", ["base", 'prefix "my own red tree"', "tuned"])
def test_answers_are_those_of_one_at_a_time(model, tokenizer, folder, method):
    own = ended(make_model("gemma2", seed=1)) if method == "tuned" else model
    system = "my own red tree" if method.startswith("prefix") else ""
    file = {"base": "base", "tuned": "tuned"}.get(method, "prefix-my-own-red-tree")
    answers = load_model_answers(folder / f"{file}.jsonl")
    assert list(answers) == [record["question_id"] for record in QUESTIONS]
    for record in QUESTIONS:
        line = answers[record["question_id"]]
        assert line["model_id"] == file and [choice["index"] for choice in line["choices"]] == [0, 1]
        for choice, seed in zip(line["choices"], (0, 5), strict=True):
            assert choice["turns"] == one_by_one(own, tokenizer, record, seed, system)


def test_steered_answers_are_those_of_a_steering(model, tokenizer, folder, dspa_method):
    """It chooses the latents of a second turn from the whole conversation."""
    answers, base = (load_model_answers(folder / name) for name in ("dspa-both-1.jsonl", "base.jsonl"))
    parts = dspa_method.parts[0]
    for record in QUESTIONS:
        choices = answers[record["question_id"]]["choices"]
        for choice, seed in zip(choices, (0, 5), strict=True):
            texts, messages = [], []
            for n, turn in enumerate(record["turns"]):
                messages.append({"role": "user", "content": turn})
                with Steering(parts.sae_in, parts.sae_out, parts.cdmap, STRONG).attach(model):
                    inputs = tokenizer.apply_chat_template(
                        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
                    )
                    arguments = running.decoding(
                        TEMPERATURES[record["category"]],
                        {"top_k": 20, "top_p": 1.0, "min_p": None},
                        [f"{seed}/{record['question_id']}/{n}"],
                        N_NEW,
                    )
                    ids = model.generate(**inputs, **arguments)[0, inputs["input_ids"].shape[1] :]
                texts.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
                messages.append({"role": "assistant", "content": texts[-1]})
            assert choice["turns"] == texts
    assert answers[81]["choices"] != base[81]["choices"]


def test_controls_and_seeds(folder):
    """A control that draws is another one for each seed, also where decoding is greedy."""
    record = json.loads((folder / "record.json").read_text())
    turns = sum(len(question["turns"]) for question in QUESTIONS)
    greedy = sum(len(question["turns"]) for question in QUESTIONS if TEMPERATURES[question["category"]] == 0)
    by_name = {method["name"]: method for method in record["methods"]}
    controls = [f"DSPA both 1: {control}" for control in ("random set", "shuffled map", "wrong layer")]
    tuned = ["tuned", "tuned: random change"]
    assert list(by_name) == ["base", "DSPA both 1", *controls, 'prefix "my own red tree"', *tuned]
    for name, method in by_name.items():
        drawn = name in (*controls[:2], tuned[1])
        assert method["n_turns"] == 2 * turns and method["generated"] == 2 * turns - (0 if drawn else greedy)
        assert method["tokens"] > 0 and method["tokens_per_second"] == method["tokens"] / method["seconds"]
        choices = load_model_answers(folder / method["files"][0])[82]["choices"]
        assert drawn or choices[0]["turns"] == choices[1]["turns"]
    assert by_name[controls[0]]["control_of"] == "DSPA both 1"
    random_set = load_model_answers(folder / by_name[controls[0]]["files"][0])
    assert random_set[82]["choices"][0]["turns"] != random_set[82]["choices"][1]["turns"]
    assert by_name["base"]["unsteered"] is None and by_name["DSPA both 1"]["unsteered"] == 0


def test_cut_answers_are_counted(folder):
    record = json.loads((folder / "record.json").read_text())["methods"][0]
    batches = [json.loads(line) for line in (folder / "turns" / "base.jsonl").read_text().splitlines()[1:]]
    turns = [turn for batch in batches for turn in batch["turns"]]
    assert all(turn["cut"] == (turn["ids"][-1] != END_ID) for turn in turns)
    assert all(len(turn["ids"]) == N_NEW for turn in turns if turn["cut"])
    assert 0 < record["cut"] == sum(turn["cut"] for turn in turns) < len(turns)
    assert record["tokens"] == sum(len(turn["ids"]) for turn in turns)
    # By temperature, all first turns before the second ones.
    assert max(len(batch["turns"]) for batch in batches) == 4
    numbers = [turn["turn"] for turn in turns]
    assert numbers == sorted(numbers)


def test_our_own_reader_takes_the_files(folder, asked):
    answers = MethodAnswers.read(folder / "dspa-both-1.jsonl", asked)
    assert answers.method == "dspa-both-1" and len(answers.answers) == len(QUESTIONS)


def without_times(folder: Path) -> dict[str, list[Any]]:
    files = {path.name: load_model_answers(path) for path in folder.glob("*.jsonl")}
    return {name: [{**line, "tstamp": 0} for line in lines.values()] for name, lines in files.items()}


@pytest.mark.parametrize("stop", [1, 4, 9, 14])
def test_a_stopped_run_goes_on_to_the_same_files(model, tokenizer, asked, methods, folder, tmp_path, monkeypatch, stop):
    generate, calls = running.continue_prompts, []

    def stopping(*given: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return generate(*given, **options)

    arguments = (model, tokenizer, asked, methods, tmp_path / "answers")
    with monkeypatch.context() as patch:
        patch.setattr(running, "continue_prompts", stopping)
        with pytest.raises(KeyboardInterrupt):
            answer_questions(*arguments, controls=CONTROLS, **SETTINGS)
        # The end of what was killed may be cut.
        (turns := tmp_path / "answers" / "turns").mkdir(exist_ok=True)
        for path in turns.iterdir():
            with path.open("a") as file:
                file.write('\n{"turns": [{"ques')
        (turns / "tuned.jsonl").write_text('{"format": "dspa.ans')
        calls[:] = [0] * stop
        answer_questions(*arguments, controls=CONTROLS, **SETTINGS)
    n_batches = sum(len(path.read_text().splitlines()) - 1 for path in (folder / "turns").glob("*.jsonl"))
    assert len(calls) - stop == n_batches - (stop - 1)
    assert without_times(tmp_path / "answers") == without_times(folder)
    again = {path: path.read_bytes() for path in (tmp_path / "answers").rglob("*") if path.is_file()}
    monkeypatch.setattr(running, "continue_prompts", None)
    answer_questions(*arguments, controls=CONTROLS, **SETTINGS)
    assert again == {path: path.read_bytes() for path in (tmp_path / "answers").rglob("*") if path.is_file()}


def test_answers_do_not_depend_on_the_batch(model, tokenizer, asked, folder, tmp_path):
    answer_questions(model, tokenizer, asked, [], tmp_path / "answers", **SETTINGS | {"batch_size": 3})
    assert without_times(tmp_path / "answers")["base.jsonl"] == without_times(folder)["base.jsonl"]
    half = Benchmark.read(write_lines(tmp_path / "half.jsonl", QUESTIONS[::2]))
    answer_questions(model, tokenizer, half, [], tmp_path / "other", **SETTINGS)
    assert without_times(tmp_path / "other")["base.jsonl"] == without_times(folder)["base.jsonl"][::2]


def test_further_methods_are_added(model, tokenizer, asked, methods, folder, tmp_path, monkeypatch):
    out = tmp_path / "answers"
    answer_questions(model, tokenizer, asked, [], out, **SETTINGS)
    before = (out / "base.jsonl").read_bytes()
    added = answer_questions(model, tokenizer, asked, methods[1:2], out, **SETTINGS)
    assert [record.name for record in added] == ["base", 'prefix "my own red tree"']
    assert (out / "base.jsonl").read_bytes() == before
    other = Method.prefixed("My own, red tree")
    added = answer_questions(model, tokenizer, asked, [other], out, **SETTINGS)
    assert added[1].id == "prefix-my-own-red-tree-2"
    names = [method["name"] for method in json.loads((out / "record.json").read_text())["methods"]]
    assert names == ["base", 'prefix "my own red tree"', 'prefix "My own, red tree"']


def test_prompts_that_select_nothing_are_marked(model, tokenizer, asked, dspa_method, tmp_path):
    parts = dspa_method.parts[0]
    empty = parts.cdmap.replaced(values=torch.zeros_like(parts.cdmap.values))
    method = Method.dspa(parts.sae_in, parts.sae_out, empty, STRONG)
    base, record = answer_questions(model, tokenizer, asked, [method], tmp_path / "answers", **SETTINGS)
    assert record.unsteered == record.generated == base.generated
    files = without_times(tmp_path / "answers")
    choices = [[line["choices"] for line in files[name]] for name in ("base.jsonl", "dspa-both-1.jsonl")]
    assert choices[0] == choices[1]
    lines = (tmp_path / "answers" / "turns" / "dspa-both-1.jsonl").read_text().splitlines()[1:]
    assert all(turn["unsteered"] is True for line in lines for turn in json.loads(line)["turns"])


def test_alpaca_eval_gets_a_file_per_seed(model, tokenizer, folder, tmp_path):
    """`alpaca_eval` reads each as a list of outputs."""
    records = [
        {"instruction": record["turns"][0], "output": "x", "generator": "y"} | ({"dataset": "koala"} if n else {})
        for n, record in enumerate(QUESTIONS)
    ]
    asked = Benchmark.read(write_list(tmp_path / "alpaca_eval.json", records))
    answer_questions(model, tokenizer, asked, [], tmp_path / "answers", **SETTINGS)
    names = sorted(path.name for path in (tmp_path / "answers").iterdir())
    assert names == ["base.seed-0.json", "base.seed-5.json", "record.json", "turns"]
    for seed in (0, 5):
        outputs = json.loads((tmp_path / "answers" / f"base.seed-{seed}.json").read_text())
        for n, (output, record) in enumerate(zip(outputs, QUESTIONS, strict=True)):
            # AlpacaEval has no ids: a question is known by its number, and all are answered at 0.7.
            as_question = {"question_id": n + 1, "category": "writing", "turns": record["turns"][:1]}
            (text,) = one_by_one(model, tokenizer, as_question, seed)
            own = {"instruction": record["turns"][0], "output": text, "generator": "base"}
            assert output == own | ({"dataset": "koala"} if n else {})
    answer_questions(model, tokenizer, asked, [], tmp_path / "one", **SETTINGS | {"seeds": (0,)})
    assert (tmp_path / "one" / "base.json").exists()


# What a folder with answers refuses


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_new_tokens": 8}, r"`max_new_tokens` 9, and now it is 8; accepted: a new folder"),
        ({"seeds": (0,)}, r"`seeds` \[0, 5\], and now it is \[0\]"),
        ({"temperature": 1.0}, r"`temperatures.writing` 0.7, and now it is 1.0"),
        ({"top_p": 0.5}, r"`sampling.top_p` 1.0, and now it is 0.5"),
    ],
)
def test_other_settings_are_refused(model, tokenizer, asked, folder, changed, message):
    with pytest.raises(ValueError, match=message):
        answer_questions(model, tokenizer, asked, [], folder, **SETTINGS | changed)


def test_other_inputs_are_refused(model, tokenizer, asked, dspa_method, folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    others = Benchmark.read(write_lines(tmp_path / "q.jsonl", [QUESTIONS[1] | {"question_id": 81}, *QUESTIONS[1:]]))
    with pytest.raises(ValueError, match="`questions` "):
        answer_questions(model, tokenizer, others, [], folder, **SETTINGS)
    with pytest.raises(ValueError, match=r"`model\.digest` "):
        answer_questions(ended(make_model("gemma2", seed=1)), tokenizer, asked, [], folder, **SETTINGS)
    other = ending_tokenizer()
    other.chat_template = f"the {TEMPLATE}"
    with pytest.raises(ValueError, match="`chat_template` "):
        answer_questions(model, other, asked, [], folder, **SETTINGS)
    parts = dspa_method.parts[0]
    changed = Method.dspa(parts.sae_in, parts.sae_out, parts.cdmap.replaced(values=-parts.cdmap.values), STRONG)
    with pytest.raises(ValueError, match="whose answers of 'DSPA both 1' were made with `map` "):
        answer_questions(model, tokenizer, asked, [changed], folder, **SETTINGS)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_of_something_else_is_refused(model, tokenizer, asked, tmp_path):
    (tmp_path / "base.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match=r"with other files \(base\.jsonl\); accepted: a new or empty folder"):
        answer_questions(model, tokenizer, asked, [], tmp_path, **SETTINGS)
    (tmp_path / "record.json").write_text('{"format": "x"}')
    with pytest.raises(ValueError, match="a record of something else"):
        answer_questions(model, tokenizer, asked, [], tmp_path, **SETTINGS)
    assert (tmp_path / "base.jsonl").read_text() == "mine\n"


def test_turns_of_another_folder_are_refused(model, tokenizer, asked, folder, tmp_path):
    answer_questions(model, tokenizer, asked, [], tmp_path / "a", **SETTINGS | {"max_new_tokens": 3})
    (tmp_path / "a" / "turns" / "base.jsonl").write_bytes((folder / "turns" / "base.jsonl").read_bytes())
    with pytest.raises(ValueError, match="turns of other settings than"):
        answer_questions(model, tokenizer, asked, [], tmp_path / "a", **SETTINGS | {"max_new_tokens": 3})


def test_a_template_with_a_date_stays_at_its_day(model, asked, tmp_path, monkeypatch):
    """Else a run could not be continued the next day."""
    tokenizer = ending_tokenizer()
    tokenizer.chat_template = "{{ 'sun ' if strftime_now('%d') == '20' else 'rain snow ' }}" + TEMPLATE
    out = tmp_path / "answers"
    monkeypatch.setattr(running, "date_of_today", lambda _: "2026-03-20")
    answer_questions(model, tokenizer, asked, [], out, **SETTINGS)
    monkeypatch.setattr(running, "date_of_today", lambda _: "2026-03-21")
    monkeypatch.setattr(running, "continue_prompts", None)
    answer_questions(model, tokenizer, asked, [], out, **SETTINGS)
    assert json.loads((out / "record.json").read_text())["settings"]["template_date"] == "2026-03-20"
    assert date_of_today(tokenizer) not in ("2026-03-20", None)


# Bad input


def test_bad_input_leaves_no_folder(model, tokenizer, asked, dspa_method, tmp_path):
    out = tmp_path / "answers"

    def refused(message: str, kind: type[Exception] = ValueError, **changed: Any) -> None:
        given = {"model": model, "tokenizer": tokenizer, "methods": []} | changed
        parts = given.pop("model"), given.pop("tokenizer"), asked, given.pop("methods"), out
        with pytest.raises(kind, match=message):
            answer_questions(*parts, **SETTINGS | given)
        assert not out.exists()

    refused("without a chat template; .*chat_template.jinja in its folder", tokenizer=ending_tokenizer())
    refused(r"Question 81 with `max_new_tokens` for each turn is 1\d\d tokens; accepted: up to 128", max_new_tokens=70)
    refused("`controls` is 'no'", controls=["no"])
    refused("`seeds` is ", seeds=[])
    refused("`batch_size` is 0", batch_size=0)
    refused("`temperature` is -1", temperature=-1.0)
    refused("`top_p` is 2", top_p=2.0)
    refused("the name 'DSPA both 1' twice", methods=[dspa_method, dspa_method])
    refused("has other settings|layer", kind=(ValueError, ModelError), methods=[other_model_method()])


def other_model_method() -> Method:
    return Method.tuned(make_model("gemma2", num_hidden_layers=2), name="small")
