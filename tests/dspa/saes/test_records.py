"""Records of SAE trainings and the stream of a checkpoint: what their schemas refuse, and what they say about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dspa.errors import TrainingError
from dspa.fsrl import read_held_out
from dspa.saes.quality import Quality
from dspa.saes.records import read_figures, read_record
from dspa.saes.training import read_qualities
from dspa.training_folder import TrainingFolder

QUALITY = {"explained_variance": 0.7, "l0": 7.5, "dead": 3, "mse": 2.5, "n_tokens": 200}
SETTINGS = {"data": "digest", "template_date": None, "sae": None, "d_sae": 96, "n_tokens": 640}
BEGUN = {"settings": SETTINGS, "k": 8, "scale": 0.5, "before": QUALITY}
FINISHED = BEGUN | {"after": QUALITY, "history": [{"tokens": 64, "loss": 0.5}]}
HELD_OUT = {"n_triples": 4, "simpo_loss": 0.7, "accuracy": 0.5, "margin": -0.1, "l0": 3.5, "l1": 0.2}


def write(folder: Path, record: Any) -> TrainingFolder:
    (folder / "training.json").write_text(json.dumps(record))
    return TrainingFolder(folder)


def test_figures_of_a_training(tmp_path: Path) -> None:
    figures = read_figures(write(tmp_path, FINISHED).path)
    assert figures["explained_variance"] == figures["explained_variance_before"] == 0.7
    assert (figures["k"], figures["d_sae"], figures["n_uses"]) == (8, 96, 640 * 8 / 96)
    assert read_figures(write(tmp_path, BEGUN).path) == {}
    with pytest.raises(TrainingError, match="is not the folder of a finished training"):
        read_qualities(tmp_path)
    # Of another program.
    assert read_figures(write(tmp_path, {"after": QUALITY, "epochs": 3}).path) == {}
    assert read_figures(tmp_path / "nothing") == {}


def test_a_record_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    record = {"settings": SETTINGS, "before": QUALITY, "after": QUALITY, "history": []}
    folder = write(tmp_path, record)
    assert read_record(folder).begun is None and read_figures(tmp_path)["l0"] == 7.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"after": QUALITY | {"explained_variance": 1.5}}, "`after.explained_variance` is 1.5; accepted: a finite num"),
        ({"after": QUALITY | {"l0": float("nan")}}, "`after.l0` is nan; accepted: a finite number >= 0"),
        ({"before": QUALITY | {"dead": -1}}, "`before.dead` is -1; accepted: a whole number >= 0"),
        ({"after": QUALITY | {"dead": True}}, "`after.dead` is True"),
        ({"after": QUALITY | {"dead": 97}}, "`after.dead` is 97; accepted: at most 96, the number of latents"),
        ({"after": QUALITY | {"l0": 96.5}}, r"`after.l0` is 96.5; accepted: at most 96"),
        ({"after": None}, "`after` and `history` belong together"),
        ({"k": 0}, "`k` is 0"),
        ({"k": 97}, "`k` is 97.0; accepted: at most 96"),
        ({"k": "8"}, "`k` is '8'"),
        ({"scale": float("inf")}, "`scale` is inf"),
        ({"dead_training": 97}, "`dead_training` is 97"),
        ({"history": [{"loss": "low"}]}, "`history.0.loss.*` is 'low'; accepted: a number"),
        ({"history": 3}, "`history` is 3; accepted: a list"),
        ({"settings": SETTINGS | {"template_date": "yesterday"}}, "`settings.template_date` is 'yesterday'; accepted"),
        ({"settings": SETTINGS | {"template_date": "20260301"}}, "`settings.template_date` is '20260301'"),
        ({"settings": SETTINGS | {"chat_template_kwargs": [1]}}, "`settings.chat_template_kwargs` is"),
        ({"settings": SETTINGS | {"d_sae": 0}}, "`settings.d_sae` is 0"),
        ({"notes": "mine"}, "`notes` is not known"),
    ],
)
def test_what_no_training_wrote(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write(tmp_path, FINISHED | change)
    for read in (lambda: read_record(folder), lambda: read_figures(tmp_path), lambda: read_qualities(tmp_path)):
        with pytest.raises(TrainingError, match=f"training.json is damaged: .*{message}.*") as raised:
            read()
        assert str(raised.value).endswith("Name another folder.")


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        (HELD_OUT | {"accuracy": 1.5}, "`held_out.accuracy` is 1.5; accepted: a number from 0 to 1"),
        (HELD_OUT | {"n_triples": 0}, "`held_out.n_triples` is 0"),
        (HELD_OUT | {"margin": float("nan")}, "`held_out.margin` is nan"),
        (3, "`held_out` is 3; accepted: an object"),
    ],
)
def test_figures_that_no_adapter_has(tmp_path: Path, figures: Any, message: str) -> None:
    record = {"settings": {"data": "digest"}, "held_out": HELD_OUT, "history": []}
    held_out = read_held_out(write(tmp_path, record).path)
    assert held_out is not None and held_out.accuracy == 0.5
    with pytest.raises(TrainingError, match=f"training.json is damaged: {message}"):
        read_held_out(write(tmp_path, record | {"held_out": figures}).path)


def test_quality_is_checked_where_it_is_made() -> None:
    with pytest.raises(ValueError, match=r"`top_variance` is 1\.5; accepted: a number from 0 to 1"):
        Quality(**QUALITY, top_variance=1.5)  # type: ignore[arg-type]
