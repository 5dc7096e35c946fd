"""Rankings hold the answers of a triple and different ones of the model, with rewards that the markers give."""

from __future__ import annotations

import pytest

from dspa.data.triples import content_of, load_rankings, load_triples
from dspa.demo.smollm2 import markers, rankings
from dspa.demo.smollm2.preferences import REGISTER


def test_rankings(monkeypatch, tmp_path):
    """An empty answer, one that is there already, and the answer of the triple are drawn again."""
    first = next(load_triples(REGISTER.path("heldout")))
    drawn = iter(["", content_of(first.chosen[0]), "Dear Sir, it is so.", "Dear Sir, it is so.", "hey dude"])
    monkeypatch.setattr(rankings, "load_triples", lambda _path: iter([first]))
    monkeypatch.setattr(rankings, "sample_answers", lambda _model, _tokenizer, asked, _n: [next(drawn)] * len(asked))
    rankings.write_rankings(object(), object(), "heldout", tmp_path / "ranked.jsonl")
    (ranking,) = load_rankings(tmp_path / "ranked.jsonl")
    answers = [content_of(response[0]) for response in ranking.responses]
    assert answers[2:] == ["Dear Sir, it is so.", "hey dude"] and ranking.prompt == first.prompt
    counted = [markers.own_register(content_of(first.prompt[0]), answer) for answer in answers]
    assert ranking.rewards == [count / 4 for count in counted]
    assert ranking.rewards[0] > ranking.rewards[1]
    with pytest.raises(StopIteration):
        next(drawn)
