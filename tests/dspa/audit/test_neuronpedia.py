"""Features and activations of an export of Neuronpedia."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dspa.audit.evidence import Context
from dspa.audit.neuronpedia import Feature, read_contexts, read_features
from dspa.errors import LabelError
from dspa.saes.labels import LatentSpace

D_SAE = 3000
SPACE = LatentSpace(12, "12", D_SAE, "gemma-2-2b")
ORIGIN = {"modelId": "gemma-2-2b", "layer": "12-gemmascope-res-65k"}


def feature(latent: int) -> dict[str, Any]:
    return {
        **ORIGIN,
        "index": str(latent),
        "frac_nonzero": latent / D_SAE,
        "pos_str": [f" up{latent}"],
        "pos_values": [1.0],
        "neg_str": [f" down{latent}"],
        "vector": [0.5],
    }


def activation(latent: int, peak: float, **changed: Any) -> dict[str, Any]:
    tokens, values = ["a", " b", " c", " d", " e"], [0.0, -0.5, 1.0, peak, 0]
    strongest = {"maxValue": peak, "maxValueTokenIndex": 3}
    return {**ORIGIN, "index": str(latent), "tokens": tokens, "values": values, **strongest} | changed


def write(folder: Path, name: str, batches: dict[int, Sequence[dict[str, Any]]]) -> Path:
    (folder / name).mkdir(parents=True)
    for number, rows in batches.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / f"batch-{number}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    return folder


def test_features_are_ordered_as_text(tmp_path: Path):
    """The thousand and first latents are in the first batch, and the second one is in the last."""
    ordered = [feature(int(text)) for text in sorted(map(str, range(D_SAE)))]
    write(tmp_path, "features", {n // 1024: ordered[n : n + 1024] for n in range(0, D_SAE, 1024)})
    assert read_features(tmp_path, SPACE, [2, 1000, 2999]) == {
        latent: Feature(latent / D_SAE, (f" up{latent}",), (f" down{latent}",)) for latent in (2, 1000, 2999)
    }


def test_contexts_are_in_batches_by_number(tmp_path: Path):
    """The batch of other latents is not read."""
    rows = [activation(1024, 2.0), activation(1030, 1.5), activation(1024, 3.0)]
    write(tmp_path, "activations", {0: [{"broken": 1}], 1: rows, 10: []})
    contexts = read_contexts(tmp_path, SPACE, [1024, 1025], window=1)
    expected = [Context(entry, 1, (" c", " d", " e"), (1.0, peak, 0.0)) for entry, peak in ((3, 3.0), (1, 2.0))]
    assert contexts == {1024: expected, 1025: []}
    (whole,) = read_contexts(tmp_path, SPACE, [1030])[1030]
    # A value below 0 is not an activation.
    assert (whole.place, whole.values) == (3, (0.0, 0.0, 1.0, 1.5, 0.0))
    with pytest.raises(LabelError, match="has no batch-2, that of latents 2048 to 3071"):
        read_contexts(tmp_path, SPACE, [1030, 2050])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (activation(7, 1.0), "`index` is 7; accepted: latents 1024 to 2047"),
        (activation(1024, 1.0, layer="13-gemmascope-res-65k"), "of layer '13-gemmascope-res-65k'"),
        (activation(1024, 1.0, modelId="gpt2-small"), "of the model 'gpt2-small'"),
        (activation(1024, 1.0, values=[1.0]), "5 tokens and 1 values"),
        (activation(1024, 1.0, maxValueTokenIndex=5), "strongest at 5"),
        (activation(1024, 1.0, tokens=None), "`tokens` is None"),
    ],
)
def test_activations_that_are_refused(tmp_path: Path, row: dict[str, Any], message: str):
    write(tmp_path, "activations", {1: [row]})
    with pytest.raises(LabelError, match=re.escape(message)):
        read_contexts(tmp_path, SPACE, [1024])


def test_a_folder_that_is_not_an_export(tmp_path: Path):
    for read, name in ((read_features, "features"), (read_contexts, "activations")):
        with pytest.raises(LabelError, match=f"without a folder '{name}'"):
            read(tmp_path, SPACE, [1])
