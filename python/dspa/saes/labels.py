"""Labels: the categories of latents, read from files.

A labels file, or each file in a folder of them, is one of two kinds.

*Descriptions*, as Neuronpedia exports explanations (a folder of `batch-N.jsonl.gz`, or the folder of an SAE in which it
is, next to others such as `explanations-gpt-4o-mini`): JSON Lines or a JSON list, gzipped or not, of objects with
`modelId`, `layer` ("12-gemmascope-res-65k"), `index` (a number, also as text), `description` and
`explanationModelName`. Other keys are ignored. Rules give each description its category. They are a JSON object
`{category: [regular expression, ...]}`. A description has the first category of which an expression matches it, in
upper or lower case, or "other" if none does.

*Categories* themselves: a JSON object `{"12": "style"}`, or a list or JSON Lines of objects with `index` and `category`
or `label`. `modelId` and `layer` are allowed in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias

from dspa.data.lines import read_lines, read_text
from dspa.data.records import JSON, ending_of
from dspa.errors import LabelError, listed, refusal
from dspa.expressions import compile_expression, count_matches
from dspa.models.layers import same_model
from dspa.saes.frozen import FrozenSAE
from dspa.schemas import is_json, parse_json

Rules: TypeAlias = dict[str, list[re.Pattern[str]]]

OTHER, UNLABELLED = "other", "unlabelled"
# Neuronpedia's names of the folders of explanations in that of an SAE, the second by an explainer.
EXPLANATIONS = re.compile("explanations(-.*)?")
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
        """Return the latents of a category, or raise `LabelError` if it has none."""
        latents = sorted(latent for latent, name in self.categories.items() if name == category)
        if not latents:
            known = ", ".join(sorted(set(self.categories.values())))
            raise LabelError(f"No latent is of the category {category!r}; accepted: {known}.")
        return latents


def read_labels(
    path: str | Path,
    sae: FrozenSAE | LatentSpace,
    *,
    rules: str | Path | None = None,
    explainer: str | None = None,
) -> Labels:
    """Read the labels of the latents of `sae` from a file or folder. An empty description labels nothing.

    Args:
        path: the file or folder.
        sae: the SAE whose latents are labelled.
        rules: file of rules, which give descriptions their categories.
        explainer: read only the descriptions of this `explanationModelName`.

    Raises:
        LabelError: files without labels or rules, latents that the SAE does not have, latents of two categories, labels
            of another layer or model, descriptions without rules, or rules without descriptions.
    """
    path, patterns = Path(path), None if rules is None else read_rules(rules)
    categories: dict[int, str] = {}
    outside, twice, described = list[int](), dict[int, str](), False
    for name, row in read_rows(path):
        check_origin(name, row, sae)
        if explainer is not None and row.get("explanationModelName") != explainer:
            continue
        latent, category = latent_of(name, row), _category(name, row, patterns)
        described = described or "description" in row
        if not 0 <= latent < sae.d_sae:
            outside.append(latent)
        elif category is not None and categories.setdefault(latent, category) != category:
            twice[latent] = f"{latent} ({categories[latent]!r} and {category!r})"
    _check_latents(path, outside, sae)
    if twice:
        raise LabelError(
            f"{path} gives two categories to latents {listed(twice.values())}; accepted: one. Keep one label of each, "
            "or of an export the descriptions of one `explanationModelName`."
        )
    if not categories:
        raise LabelError(f"{path} labels no latent{_by(explainer)}; accepted: {ACCEPTED}.")
    if patterns is not None and not described:
        raise LabelError(
            f"{path} holds categories and no descriptions, and rules are for descriptions. Leave the rules out."
        )
    return Labels(categories, sae.d_sae)


@dataclass(frozen=True)
class LatentSpace:
    """The facts about an SAE that labels of its latents have to agree with, without the SAE itself."""

    layer: int | None
    neuronpedia_place: str
    d_sae: int
    model_name: str | None

    def __str__(self) -> str:
        return f"an SAE of {self.d_sae} latents at layer {self.layer}"


@dataclass(frozen=True)
class Explanation:
    """What a file says a latent stands for.

    Attributes:
        text: the text.
        explainer: name of the model that wrote it, or empty if the file does not say.
        method: name of the method, as "oai_token-act-pair", or empty if the file does not say.
    """

    text: str
    explainer: str = ""
    method: str = ""


def read_explanations(
    path: str | Path, sae: FrozenSAE | LatentSpace, *, explainer: str | None = None
) -> dict[int, list[Explanation]]:
    """Read what a file or folder says of the latents of `sae`: descriptions, or categories. Empty texts say nothing.

    Args:
        path: the file or folder.
        sae: the SAE whose latents are explained.
        explainer: read only the explanations of this `explanationModelName`.

    Returns:
        Explanations by latent, in the order of the files, each once.

    Raises:
        LabelError: files that explain no latent, latents that the SAE does not have, or labels of another layer or
            model.
    """
    path = Path(path)
    explanations: dict[int, dict[Explanation, None]] = {}
    for name, row in read_rows(path):
        check_origin(name, row, sae)
        if explainer is None or row.get("explanationModelName") == explainer:
            text = row.get("category") or row.get("label") or row.get("description") or ""
            if not isinstance(text, str):
                raise refusal(LabelError, f"{name}: its label", repr(text), "text")
            if text.strip():
                by, method = (str(row.get(key) or "") for key in ("explanationModelName", "typeName"))
                explanations.setdefault(latent_of(name, row), {})[Explanation(text.strip(), by, method)] = None
    _check_latents(path, [latent for latent in explanations if not 0 <= latent < sae.d_sae], sae)
    if not explanations:
        raise LabelError(f"{path} labels no latent{_by(explainer)}; accepted: {ACCEPTED}.")
    return {latent: list(several) for latent, several in explanations.items()}


def read_descriptions(
    path: str | Path, sae: FrozenSAE | LatentSpace, *, explainer: str | None = None
) -> dict[int, str]:
    """Read what a file or folder says of the latents of `sae`, as `read_explanations` does.

    Args:
        path: as for `read_explanations`.
        sae: as for `read_explanations`.
        explainer: as for `read_explanations`.

    Returns:
        Text by latent. Several texts on a latent are joined.

    Raises:
        LabelError: as for `read_explanations`.
    """
    explanations = read_explanations(path, sae, explainer=explainer)
    return {
        latent: "; ".join(dict.fromkeys(explanation.text for explanation in several))
        for latent, several in explanations.items()
    }


def _check_latents(path: Path, outside: list[int], sae: FrozenSAE | LatentSpace) -> None:
    """Raise `LabelError` for latents that the SAE does not have."""
    if outside:
        raise LabelError(f"{path} labels latents {listed(outside)}; accepted: 0 to {sae.d_sae - 1}, those of {sae}.")


def _by(explainer: str | None) -> str:
    return "" if explainer is None else f" by {explainer!r}"


def read_rules(path: str | Path) -> Rules:
    """Read rules, in their order; raise `LabelError` for another file or an invalid expression."""
    text, accepted = read_text(path, LabelError), 'a JSON object {"category": ["regular expression", ...]}'
    given = parse_json(text, LabelError, str(path), accepted)
    if not isinstance(given, dict) or not given:
        raise LabelError(f"{path} holds no rules; accepted: {accepted}.")
    rules: Rules = {}
    for category, expressions in given.items():
        if category == UNLABELLED or not isinstance(expressions, list) or not expressions:
            raise LabelError(f"{path}: {category!r}: {expressions!r}; accepted: {accepted}, not {UNLABELLED!r}.")
        try:
            rules[category] = [compile_expression(expression, re.IGNORECASE) for expression in expressions]
        except ValueError as error:
            raise LabelError(f"{path}: {category!r} has an invalid expression ({error}).") from error
    return rules


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects with `index` in a file or folder, each with its name in messages.

    Raises:
        LabelError: a folder without a file of them, a file that is damaged, or an object without `index`.
    """
    for file in _files(path) if path.is_dir() else [path]:
        for number, row in enumerate(_entries(file), start=1):
            name = f"{file} entry {number}"
            if not isinstance(row, dict) or "index" not in row:
                raise refusal(LabelError, name, repr(str(row)[:60]), ACCEPTED)
            yield name, row


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder, or those of the folders of explanations in it."""
    inner = sorted(place for place in folder.iterdir() if place.is_dir() and EXPLANATIONS.fullmatch(place.name))
    files = [file for place in inner or [folder] for file in sorted(place.iterdir()) if ending_of(file) in JSON]
    if not files:
        raise LabelError(f"{folder} holds no file of labels; accepted: {', '.join(JSON)}, also as .gz.")
    return files


def _entries(file: Path) -> Iterator[Any]:
    for given in _values(file):
        if isinstance(given, dict) and "index" not in given:
            yield from ({"index": latent, "category": category} for latent, category in given.items())
        elif isinstance(given, list):
            yield from given
        else:
            yield given


def _values(file: Path) -> Iterator[Any]:
    """Yield the values of JSON Lines, or the one value of another file."""
    _, first = next(read_lines(file, LabelError), ("", ""))
    if is_json(first):
        for name, line in read_lines(file, LabelError):
            yield parse_json(line, LabelError, name, ACCEPTED)
    else:
        yield parse_json(read_text(file, LabelError), LabelError, str(file), ACCEPTED)


def latent_of(name: str, row: Mapping[str, Any]) -> int:
    """Return the latent that an object is about: its `index`, a number or its text, as Neuronpedia writes it.

    Raises:
        LabelError: another `index`.
    """
    index = row["index"]
    if isinstance(index, int) and not isinstance(index, bool):
        return index
    if isinstance(index, str) and re.fullmatch(r"-?[0-9]+", index):
        return int(index)
    raise refusal(LabelError, f"{name}: `index`", repr(index), "a whole number, the number of a latent")


def _category(name: str, row: Mapping[str, Any], rules: Rules | None) -> str | None:
    """Return the category of a row, its own or by the rules, or None for an empty description."""
    for key in ("category", "label"):
        if key in row:
            value = row[key]
            if not isinstance(value, str) or not value.strip() or value == UNLABELLED:
                raise refusal(LabelError, f"{name}: `{key}`", repr(value), f"a name, not {UNLABELLED!r}")
            return value
    if "description" not in row or not isinstance(row["description"], (str, NoneType)):
        got, accepted = repr(row.get("description")), "text, or a `category` instead"
        raise refusal(LabelError, f"{name}: `description`", got, accepted)
    if rules is None:
        raise refusal(LabelError, name, "a description", "descriptions with rules, which give them categories")
    description = row["description"] or ""
    if not description.strip():
        return None
    try:
        return next((category for category, patterns in rules.items() if _matches(patterns, description)), OTHER)
    except ValueError as error:
        raise LabelError(f"{name}: {error}") from error


def _matches(patterns: Iterable[re.Pattern[str]], text: str) -> bool:
    return any(count_matches(pattern, text, most=1) for pattern in patterns)


def _place(given: str, sae: FrozenSAE | LatentSpace) -> str:
    """Return what `given` should be: the layer of `sae`, or its place on Neuronpedia, as "12-gemmascope-res-65k"."""
    _, _, source = given.partition("-")
    if not source:
        return str(sae.layer)
    # Where all of the place is known, so must be the labels': SAEs of one layer have other latents.
    return sae.neuronpedia_place if "-" in sae.neuronpedia_place else f"{sae.neuronpedia_place}-{source}"


def check_origin(name: str, row: Mapping[str, Any], sae: FrozenSAE | LatentSpace) -> None:
    """Raise `LabelError` for an object that names another layer or model than those of `sae`."""
    if "layer" in row:
        wanted = _place(str(row["layer"]), sae)
        if str(row["layer"]) != wanted:
            advice = "Neuronpedia may have another name for it: that of `neuronpedia_id` in the SAE's metadata, if set."
            raise refusal(LabelError, name, f"of layer {row['layer']!r}", f"{wanted}, that of {sae}", advice)
    model = row.get("modelId")
    if model is not None and not same_model(str(model), sae.model_name or ""):
        raise refusal(LabelError, name, f"of the model {model!r}", f"{sae.model_name!r}, that of {sae}")
