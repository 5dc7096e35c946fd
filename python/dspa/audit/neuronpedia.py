"""Contexts, densities and promoted tokens of latents in Neuronpedia's export of an SAE, beside the explanations.

An export has a folder per SAE, with the folders `features`, `activations` and `explanations` of `batch-N.jsonl.gz`.
Batches of features and explanations are cut from all latents ordered by their index *as text* (0, 1, 10, 100, ...), so
that all have to be read for one latent. Batch N of activations holds the latents from 1024 N. `dspa.saes.labels` reads
the explanations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspa.audit.evidence import Context
from dspa.data.records import JSON, ending_of
from dspa.errors import LabelError, refusal
from dspa.saes.frozen import FrozenSAE
from dspa.saes.labels import LatentSpace, check_origin, latent_of, read_rows
from dspa.schemas import Count, Fraction, Number, Text, check

LATENTS_PER_BATCH = 1024


@dataclass(frozen=True)
class Feature:
    """A latent in an export.

    Attributes:
        density: share of tokens on which it is active.
        promoted: tokens that it promotes most, by the logit lens.
        suppressed: tokens that it suppresses most.
    """

    density: float
    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]


def read_features(folder: str | Path, sae: FrozenSAE | LatentSpace, latents: Iterable[int]) -> dict[int, Feature]:
    """Read the features of latents from the export of an SAE.

    Args:
        folder: the folder of the SAE, which holds `features`.
        sae: the SAE.
        latents: latents of the SAE.

    Returns:
        Features by latent, of those that are in the export.

    Raises:
        LabelError: a folder that is not an export, features of another layer or model, or a damaged file.
    """
    wanted, features = set(latents), dict[int, Feature]()
    for name, row in read_rows(_folder(folder, "features")):
        check_origin(name, row, sae)
        if (latent := latent_of(name, row)) in wanted:
            density = _checked(Fraction, row, "frac_nonzero", name)
            tokens = (tuple(_checked(list[Text], row, key, name)) for key in ("pos_str", "neg_str"))
            features[latent] = Feature(density, *tokens)
    return features


def read_contexts(
    folder: str | Path, sae: FrozenSAE | LatentSpace, latents: Iterable[int], *, window: int = 10
) -> dict[int, list[Context]]:
    """Read contexts in which latents are active from the export of an SAE.

    Args:
        folder: the folder of the SAE, which holds `activations`.
        sae: the SAE.
        latents: latents of the SAE.
        window: tokens to keep on either side of the one on which the latent is strongest.

    Returns:
        Contexts by latent, the strongest first. A latent that is never active has none.

    Raises:
        LabelError: a folder that is not an export, or has no batch of a latent, activations of another layer or model,
            or a damaged file.
    """
    contexts: dict[int, list[Context]] = {latent: [] for latent in latents}
    place = _folder(folder, "activations")
    for batch in sorted({latent // LATENTS_PER_BATCH for latent in contexts}):
        for entry, (name, row) in enumerate(read_rows(_batch(place, batch)), start=1):
            check_origin(name, row, sae)
            latent = latent_of(name, row)
            if latent // LATENTS_PER_BATCH != batch:
                first = batch * LATENTS_PER_BATCH
                accepted = f"latents {first} to {first + LATENTS_PER_BATCH - 1}, those of batch {batch} of activations"
                raise refusal(LabelError, f"{name}: `index`", latent, accepted)
            if latent in contexts:
                contexts[latent].append(_context(name, row, entry, window))
    return {latent: sorted(several, key=lambda c: (-c.value, c.entry)) for latent, several in contexts.items()}


def _context(name: str, row: Mapping[str, Any], entry: int, window: int) -> Context:
    tokens, values = _checked(list[Text], row, "tokens", name), _checked(list[Number], row, "values", name)
    strongest = _checked(Count, row, "maxValueTokenIndex", name)
    if not strongest < len(tokens) == len(values):
        got = f"{len(tokens)} tokens and {len(values)} values, strongest at {strongest}"
        raise refusal(LabelError, name, got, "as many values as tokens, and the place of one of them")
    start = max(0, strongest - window)
    around = slice(start, strongest + window + 1)
    return Context(entry, strongest - start, tuple(tokens[around]), tuple(max(0.0, value) for value in values[around]))


def _checked(kind: Any, row: Mapping[str, Any], key: str, name: str) -> Any:
    return check(kind, row.get(key), LabelError, f"{name}: `{key}`")


def _folder(folder: str | Path, name: str) -> Path:
    place = Path(folder) / name
    if not place.is_dir():
        raise refusal(LabelError, str(folder), f"without a folder {name!r}", "the folder of an SAE in an export")
    return place


def _batch(place: Path, number: int) -> Path:
    for file in sorted(place.iterdir()):
        if ending_of(file) in JSON and file.name.partition(".")[0] == f"batch-{number}":
            return file
    first = number * LATENTS_PER_BATCH
    raise LabelError(
        f"{place} has no batch-{number}, that of latents {first} to {first + LATENTS_PER_BATCH - 1}. Download it too."
    )
