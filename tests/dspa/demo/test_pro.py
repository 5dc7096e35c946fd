"""Rankings of the demo: the two answers of a triple at the ends, and those that the model samples between them."""

from __future__ import annotations

from dspa.data.triples import load_rankings, load_triples
from dspa.demo import pro
from dspa.demo.load import World


def test_rankings(monkeypatch):
    world = World()
    monkeypatch.setattr(pro, "load_triples", lambda source: list(load_triples(source))[:6])
    rankings = list(load_rankings(pro.rankings_of(world)))
    triples = list(load_triples(world.triples))[:6]
    for ranking, triple in zip(rankings, triples, strict=True):
        assert ranking.prompt == triple.prompt and 3 <= len(ranking.responses) <= 4
        assert list(ranking.responses[:2]) == [triple.chosen, triple.rejected]
        assert ranking.rewards[0] == max(ranking.rewards) > ranking.rewards[1] == min(ranking.rewards)
    data = [ranking | {} for ranking in pro.rankings_of(world)]
    by_name = {name: rows for name, _, rows in pro.trainings(data)}
    shuffled = by_name["PRO without SFT, shuffled"]
    assert shuffled != data and [sorted(row["rewards"]) for row in shuffled] == [sorted(row["rewards"]) for row in data]
    assert all(len(list(load_rankings(rows))) == 6 for rows in by_name.values())
