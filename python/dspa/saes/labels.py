"""Categories of latents, from labels: read, and counted in what an adapter moves.

A labels file, or each file in a folder of them, is one of two kinds.

*Descriptions*, as Neuronpedia exports explanations (a folder of `batch-N.jsonl.gz`): JSON Lines or a JSON list, gzipped
or not, of objects with `modelId`, `layer` ("12-gemmascope-res-65k"), `index` (a number, also as text), `description`
and `explanationModelName`; other keys are ignored. A description becomes a category by rules, a JSON object
`{category: [regular expression, ...]}`: the first category one of whose expressions is found in the description, upper
or lower case, takes it, and "other" what none does.

*Categories* themselves: a JSON object `{"12": "style"}`, or a list or JSON Lines of objects with `index` and `category`
or `label`, in which `modelId` and `layer` may stand too.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias

from dspa.errors import LabelError
from dspa.models.layers import same_model
from dspa.saes.frozen import FrozenSAE

Rules: TypeAlias = dict[str, list[re.Pattern[str]]]

OTHER, UNLABELLED = "other", "unlabelled"
GZIP = b"\x1f\x8b"
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
# Numbers that a message names.
SHOWN = 10
ACCEPTED = (
    "a Neuronpedia export of explanations, an object of latents and categories, or a list of objects with `index` and "
    "`category`"
)


@dataclass(frozen=True)
class Labels:
    """The category of each labelled latent of an SAE of `d_sae` latents."""

    categories: dict[int, str]
    d_sae: int

    def of(self, category: str) -> list[int]:
        """Latents of a category. Raises `LabelError` for one that no latent has."""
        found = sorted(latent for latent, each in self.categories.items() if each == category)
        if not found:
            known = ", ".join(sorted(set(self.categories.values())))
            raise LabelError(f"No latent is of the category {category!r}; accepted: {known}.")
        return found


def read_labels(
    path: str | Path, sae: FrozenSAE, *, rules: str | Path | None = None, explainer: str | None = None
) -> Labels:
    """The labels in a file or folder, for the latents of `sae`. A description that is empty labels nothing.

    Args:
        rules: a file of rules, by which descriptions become categories.
        explainer: keep the descriptions of this `explanationModelName` alone.

    Raises:
        LabelError: what holds no labels or rules; latents that the SAE does not have; latents of two categories; labels
            of another layer or model; descriptions without rules, or rules without descriptions.
    """
    path, patterns = Path(path), None if rules is None else read_rules(rules)
    found: dict[int, str] = {}
    outside, twice, described = list[int](), dict[int, str](), False
    for name, row in _rows(path):
        _check_origin(name, row, sae)
        if explainer is not None and row.get("explanationModelName") != explainer:
            continue
        latent, category = _latent(name, row["index"]), _category(name, row, patterns)
        described = described or "description" in row
        if not 0 <= latent < sae.d_sae:
            outside.append(latent)
        elif category is not None and found.setdefault(latent, category) != category:
            twice[latent] = f"{latent} ({found[latent]!r} and {category!r})"
    if outside:
        raise LabelError(f"{path} labels latents {_some(outside)}; accepted: 0 to {sae.d_sae - 1}, those of {sae!r}.")
    if twice:
        raise LabelError(
            f"{path} gives two categories to latents {_some(twice.values())}; accepted: one. Keep one label of each; "
            "of an export, the descriptions of one `explanationModelName`."
        )
    if not found:
        by = "" if explainer is None else f" by {explainer!r}"
        raise LabelError(f"{path} labels no latent{by}; accepted: {ACCEPTED}.")
    if patterns is not None and not described:
        raise LabelError(f"{path} holds categories and no descriptions, for which rules are. Leave them out.")
    return Labels(found, sae.d_sae)


def read_rules(path: str | Path) -> Rules:
    """Rules in their order. Raises `LabelError` for another file, and for expressions that are none."""
    accepted = 'a JSON object {"category": ["regular expression", ...]}'
    try:
        given = json.loads(_content(Path(path)), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise LabelError(f"{path} holds no rules ({error}); accepted: {accepted}.") from error
    if not isinstance(given, dict) or not given:
        raise LabelError(f"{path} holds no rules; accepted: {accepted}.")
    rules: Rules = {}
    for category, expressions in given.items():
        if category == UNLABELLED or not isinstance(expressions, list) or not expressions:
            raise LabelError(f"{path}: {category!r}: {expressions!r}; accepted: {accepted}, not {UNLABELLED!r}.")
        try:
            rules[category] = [re.compile(each, re.IGNORECASE) for each in expressions]
        except (re.error, TypeError) as error:
            raise LabelError(f"{path}: {category!r} has an expression that is none ({error}).") from error
    return rules


def _content(path: Path) -> str:
    """Text of a file, gzipped or not."""
    if not path.is_file():
        raise LabelError(f"{path} is not a file; accepted: a file that exists.")
    content = path.read_bytes()
    try:
        return (gzip.decompress(content) if content.startswith(GZIP) else content).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise LabelError(f"{path} is damaged, or not UTF-8 ({error}).") from error


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects with `index`, each with what errors call it."""
    files = [path]
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.name.endswith(SUFFIXES))
        if not files:
            raise LabelError(f"{path} holds no file of labels; accepted: {', '.join(SUFFIXES)}.")
    for file in files:
        for number, row in enumerate(_entries(file), start=1):
            name = f"{file} entry {number}"
            if not isinstance(row, dict) or "index" not in row:
                raise LabelError(f"{name} is {str(row)[:60]!r}; accepted: {ACCEPTED}.")
            yield name, row


def _entries(file: Path) -> list[Any]:
    text = _content(file)
    try:
        given = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError:
        return _lines(file, text)
    if isinstance(given, dict) and "index" not in given:
        return [{"index": latent, "category": category} for latent, category in given.items()]
    return given if isinstance(given, list) else [given]


def _lines(path: Path, text: str) -> list[Any]:
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                found.append(json.loads(line, object_pairs_hook=_once))
            except json.JSONDecodeError as error:
                raise LabelError(f"{path} line {number} is not JSON ({error}); accepted: {ACCEPTED}.") from error
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, of which JSON itself would keep the last of several values of a key."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise LabelError(f"{key!r} is given twice, as {found[key]!r} and as {value!r}; accepted: one.")
    return found


def _latent(name: str, index: object) -> int:
    if isinstance(index, int) and not isinstance(index, bool):
        return index
    if isinstance(index, str) and re.fullmatch(r"-?[0-9]+", index):
        return int(index)
    raise LabelError(f"{name}: `index` is {index!r}; accepted: a whole number, the number of a latent.")


def _category(name: str, row: Mapping[str, Any], rules: Rules | None) -> str | None:
    """The category that a row gives or that its description has by the rules; None for an empty description."""
    for key in ("category", "label"):
        if key in row:
            value = row[key]
            if not isinstance(value, str) or not value.strip() or value == UNLABELLED:
                raise LabelError(f"{name}: `{key}` is {value!r}; accepted: a name, not {UNLABELLED!r}.")
            return value
    if "description" not in row or not isinstance(row["description"], (str, NoneType)):
        problem = f"`description` is {row.get('description')!r}"
        raise LabelError(f"{name}: {problem}; accepted: text, or a `category` in its place.")
    if rules is None:
        raise LabelError(f"{name} is a description; accepted: with rules, by which it becomes a category.")
    description = row["description"] or ""
    if not description.strip():
        return None
    matching = (category for category, patterns in rules.items() if any(p.search(description) for p in patterns))
    return next(matching, OTHER)


def _check_origin(name: str, row: Mapping[str, Any], sae: FrozenSAE) -> None:
    """Raise for a label of a latent of another SAE, as far as it says."""
    if "layer" in row:
        # Neuronpedia's are "12-gemmascope-res-65k".
        layer = re.match(r"[0-9]+", str(row["layer"]))
        if layer is None or int(layer[0]) != sae.layer:
            raise LabelError(f"{name} is of layer {row['layer']!r}; accepted: {sae.layer}, that of {sae!r}.")
    model = row.get("modelId")
    if model is not None and sae.model_name and not same_model(str(model), sae.model_name):
        raise LabelError(f"{name} is of the model {model!r}; accepted: {sae.model_name!r}, that of {sae!r}.")


def _some(values: Any) -> str:
    found = [str(each) for each in values]
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more
