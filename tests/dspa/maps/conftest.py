"""Small models and their counts."""

from __future__ import annotations

import pytest

from dspa import collect
from dspa.maps import pieces
from dspa.maps.collection import Collection
from dspa.testing import ENGLISH, L_IN, L_OUT, make_model, make_sae, word_tokenizer

from ..support.counts import Case, make_case


@pytest.fixture
def case() -> Case:
    """A case that a test may break."""
    return make_case("qwen3")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut windows of 4 triples and pieces of 2, so that 8 triples are 4 shards."""
    monkeypatch.setattr(pieces, "TRIPLES_PER_WINDOW", 4)
    monkeypatch.setattr(pieces, "TRIPLES_PER_PIECE", 2)


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Counts of 60 triples in which the response repeats the prompt's first word or its last."""
    rows = [
        {
            "prompt": " ".join(ENGLISH[(n + i * i) % 47] for i in range(6)),
            "chosen": " ".join(ENGLISH[(n + i) % 40] for i in range(5)),
            "rejected": " ".join(ENGLISH[(2 * n + 3 * i) % 47] for i in range(7)),
        }
        for n in range(60)
    ]
    saes = make_sae(L_IN, 96, seed=1), make_sae(L_OUT, 128, seed=2)
    folder = tmp_path_factory.mktemp("counts")
    return collect(make_model("qwen3"), word_tokenizer(), rows, *saes, work_dir=folder, progress=False)
