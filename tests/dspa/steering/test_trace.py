"""Tokens of a trace, and what it prints."""

from __future__ import annotations

import json

import pytest
import torch

import dspa
from dspa.errors import TraceError
from dspa.maps.cdmap import TENSORS, ConditionalDifferenceMap
from dspa.steering.edits import SteeredText
from dspa.steering.trace import Edit, Trace, read_trace
from dspa.testing import word_tokenizer
from dspa_kernels import Edits

N_NEW = 6
PROMPTS = [[5, 9], [7, 7, 3, 12, 30]]


@pytest.fixture
def recording(sae_in, sae_out, cdmap):
    return dspa.Steering(sae_in, sae_out, cdmap, dspa.SteeringConfig(alpha=0.6, mode="both"), record=True)


def test_tokens_are_those_at_the_positions(model, recording):
    """In a padded batch, prompt tokens and generated ones."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    with recording.attach(model):
        output = model.generate(ids, attention_mask=mask, max_new_tokens=N_NEW, do_sample=False)
    edits = list(recording.trace)
    assert {edit.row for edit in edits} == {0, 1}
    for edit in edits:
        assert edit.token == int(output[edit.row, width - len(PROMPTS[edit.row]) + edit.position])
        assert edit.text is None


@pytest.mark.parametrize("positional", [False, True])
def test_tokens_of_given_responses(model, recording, positional):
    ids = torch.tensor([PROMPTS[1] + [20, 21, 22]])
    with recording.attach(model), recording.responses([5]):
        model(ids) if positional else model(input_ids=ids)
    assert len(recording.trace) and all(edit.token == int(ids[0, edit.position]) for edit in recording.trace)


def test_embeddings_have_no_token(model, recording):
    embeddings = model.get_input_embeddings()(torch.tensor([PROMPTS[1]]))
    with recording.attach(model):
        output = model.generate(inputs_embeds=embeddings, max_new_tokens=N_NEW, do_sample=False)
    n = len(PROMPTS[1])
    expected = {
        edit.position: None if edit.position < n else int(output[0, edit.position - n]) for edit in recording.trace
    }
    assert {edit.position: edit.token for edit in recording.trace} == expected and set(expected) - {n - 1}
    assert "embedding" in str(recording.trace)


def filled(tokens: list[int] | None) -> Trace:
    """A trace of four tokens in one sequence, edited at two of three latents each."""
    trace = Trace()
    before = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 5.0], [1.0, 2.0, 0.0], [0.0, 4.0, 1.0]])
    trace.add(
        0,
        torch.zeros(4, dtype=torch.long),
        torch.arange(7, 11),
        None if tokens is None else torch.tensor(tokens),
        torch.tensor([[40, 41, 42]]),
        Edits(before=before, after=torch.zeros(4, 3), maximum=torch.full((4,), 9.0)),
    )
    return trace


def test_text_comes_with_a_tokenizer(tmp_path):
    tokenizer = word_tokenizer()
    ids = tokenizer("the cat the dog", add_special_tokens=False)["input_ids"]
    trace = filled(ids)
    assert [(edit.token, edit.text) for edit in trace] == [(token, None) for token in ids]
    trace.tokenizer = tokenizer
    assert [edit.text for edit in trace] == ["the", "cat", "the", "dog"]
    trace.save(tmp_path / "t.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert rows[1] == {
        "call": 0,
        "row": 0,
        "position": 8,
        "maximum": 9.0,
        "latents": [40, 42],
        "before": [3.0, 5.0],
        "after": [0.0, 0.0],
        "token": ids[1],
        "text": "cat",
        "promoted": None,
    }


def test_an_edit_is_made_as_before():
    """By the fields that it had before tokens were recorded."""
    edit = Edit(0, 0, 7, 9.0, [40], [1.0], [0.0])
    assert (edit.token, edit.text, edit.promoted) == (None, None, None)


def test_print_shows_latents_and_tokens():
    tokenizer = word_tokenizer()
    trace = filled(tokenizer("the cat the dog", add_special_tokens=False)["input_ids"])
    assert repr(trace) == "Trace(4 edited tokens)" and "trace.tokenizer" in str(trace)
    trace.tokenizer = tokenizer
    lines = [line.split() for line in str(trace).splitlines()]
    assert lines[0][:6] == ["Trace:", "4", "edited", "tokens", "in", "1"]
    # Latent 40 at three tokens (1, 3, 1), 41 at three (2, 2, 4), 42 at two (5, 1).
    assert ["40", "3", "1.667", "0", '"the"', "(2),", '"cat"', "(1)"] in lines
    assert ["41", "3", "2.667", "0", '"the"', "(2),", '"dog"', "(1)"] in lines
    assert ["42", "2", "3", "0", '"cat"', "(1),", '"dog"', "(1)"] in lines
    assert ['"the"', "2", "2", "40", "(2),", "41", "(2)"] in lines
    assert "trace.tokenizer" not in str(trace)


def test_latents_come_with_the_tokens_that_they_promote(sae_in, sae_out, cdmap, model, tmp_path):
    trace = filled([4, 5, 4, 6])
    trace.promoted = {40: [" warm", "\n", " kind", " soft"], 42: [" No"]}
    lines = [" ".join(line.split()) for line in str(trace).splitlines()]
    assert r'40 " warm" "\n" " kind" 3 1.667 0 4 (2), 5 (1)' in lines
    assert "41 3 2.667 0 4 (2), 6 (1)" in lines and '42 " No" 2 3 0 5 (1), 6 (1)' in lines
    assert '5 1 2 40 " warm" (1), 42 " No" (1)' in lines
    assert "<td>42 &quot; No&quot;</td>" in trace._repr_html_()
    assert [edit.promoted for edit in trace][1] == [[" warm", "\n", " kind"], [" No"]]
    trace.save(tmp_path / "t.jsonl")
    assert json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])["promoted"] == [[" warm", "\n", " kind"], []]


def test_a_steering_has_the_tokens_of_its_map(sae_in, sae_out, cdmap):
    described = cdmap.to("cpu")
    assert dspa.Steering(sae_in, sae_out, described).trace.promoted == {}
    described = ConditionalDifferenceMap(
        **{name: getattr(cdmap, name) for name in TENSORS},
        meta=cdmap.meta,
        promoted={"sae_in": {1: ["a"]}, "sae_out": {2: ["b"]}},
    )
    assert dspa.Steering(sae_in, sae_out, described).trace.promoted == {2: ["b"]}


def test_long_traces_show_their_beginning():
    trace = Trace()
    for n in range(300):
        latents = torch.arange(n, n + 3)[None]
        values = Edits(before=torch.ones(1, 3), after=torch.zeros(1, 3), maximum=torch.ones(1))
        trace.add(n, None, torch.tensor([n]), torch.tensor([n]), latents, values)
    assert "10 of 302" in str(trace) and "10 of 300" in str(trace) and len(str(trace).splitlines()) < 30


def test_a_notebook_shows_the_same_with_nothing_to_interpret():
    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return "<b>&"

        def convert_ids_to_tokens(self, token: int) -> str:
            return "<b>&"

    trace = filled([4, 5, 4, 6])
    trace.tokenizer = Tokenizer()  # type: ignore[assignment]
    shown = trace._repr_html_()
    assert "&lt;b&gt;&amp;" in shown and "<b>" not in shown and shown.count("<table>") == 2


def test_an_empty_trace_says_so():
    assert "record=True" in str(Trace()) and "record=True" in Trace()._repr_html_()


# Files


def test_a_trace_is_read_as_it_was_written(tmp_path):
    tokenizer = word_tokenizer()
    trace = filled(tokenizer("the cat the dog", add_special_tokens=False)["input_ids"])
    trace.tokenizer, trace.map_digest = tokenizer, "0123456789abcdef"
    trace.end([7], [3])
    trace.save(tmp_path / "t.jsonl")
    edits, texts = read_trace(tmp_path / "t.jsonl")
    # The token at position 10 came after the end.
    assert edits == list(trace) and [edit.position for edit in edits] == [7, 8, 9]
    assert texts == trace.texts == [SteeredText(0, 0, 3, "0123456789abcdef")]
    trace.clear()
    assert not len(trace) and trace.texts == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}', "line 2 is {'text': 'a'}; accepted: a record that dspa generate --trace wrote"),
        ('{"call": 0, "row": 0, "n_tokens": 1.5, "map_digest": ""}', "`n_tokens` is 1.5; accepted: a whole number"),
        ('{"call": 0, "row": 0, "position": 1, "maximum": 1.0, "latents": [1, -2]}', "`latents.1` is -2"),
        (
            '{"call": 0, "row": 0, "position": 1, "maximum": 1.0, "latents": [1], "before": [], "after": [1.0]}',
            "its lists differ in length",
        ),
        ("nonsense", "not JSON"),
    ],
)
def test_a_damaged_trace_is_refused(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    path.write_text('{"call": 0, "row": 0, "n_tokens": 1, "map_digest": ""}\n' + line + "\n")
    with pytest.raises(TraceError, match="line 2") as error:
        read_trace(path)
    assert message in str(error.value)


def test_the_digest_is_of_the_map_wherever_it_is(cdmap, sae_in, sae_out, tmp_path):
    cdmap.save(tmp_path / "map")
    assert len(cdmap.digest) == 16 and ConditionalDifferenceMap.load(tmp_path / "map").digest == cdmap.digest
    values = cdmap.values.clone()
    values[0, 0] += 1
    assert cdmap.replaced(values=values).digest != cdmap.digest
    assert dspa.Steering(sae_in, sae_out, cdmap).trace.map_digest == ""
    assert dspa.Steering(sae_in, sae_out, cdmap, record=True).trace.map_digest == cdmap.digest
