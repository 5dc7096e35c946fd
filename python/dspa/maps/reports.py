"""Reports on a map, for judging it before it is used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dspa.data.tokens import BOUNDARY
from dspa.maps.cdmap import N_LARGE, ConditionalDifferenceMap, MapMeta

# Share of the gates or latents from which on a map is warned of.
MANY = 0.5


class Figure(NamedTuple):
    """One line of a report: a name, its value, and what it means or asks for."""

    name: str
    value: str
    meaning: str


def origin(meta: MapMeta) -> list[Figure]:
    """Describe what a map was made from.

    Args:
        meta: metadata of the map.
    """
    cut = f"from the {meta.k_diff} entries at each end of a row" if meta.sparsify else "none: every entry is kept"
    longest = "" if meta.max_length is None else f" to {meta.max_length} tokens with their prompt"
    tokens = {"all": "all tokens", "text": "tokens that are not special"}[meta.count_tokens]
    return [
        Figure("model", meta.model_name or "not named", "steer this model with it"),
        Figure("input SAE", _describe_sae(meta.layer_in, meta.d_sae_in, meta.sae_in), "one row of A per latent"),
        Figure("output SAE", _describe_sae(meta.layer_out, meta.d_sae_out, meta.sae_out), "edits are made here"),
        Figure("triples", str(meta.n_triples), f"{meta.n_cut} of their responses were cut{longest}"),
        Figure("tokens", _describe_tokens(meta), "what the model read"),
        Figure("gates", f"{meta.gate_rule}, percentile {meta.percentile:g}", f"of densities over {tokens}"),
        Figure("cut", cut, "smaller entries of A are 0"),
        Figure("attention", meta.attention or "not recorded", "the implementation that computed it"),
        Figure("package", meta.package, "the version that made the map"),
    ]


PLACES = {"model": "model from", "sae_in": "input SAE from", "sae_out": "output SAE from"}


def places(cdmap: ConditionalDifferenceMap) -> list[Figure]:
    """Describe where the model and the SAEs of a map were loaded from, as far as it records that."""
    sources = ((PLACES[name], source) for name, source in cdmap.sources.items() if name in PLACES)
    return [Figure(name, source.path, "used where no option names another") for name, source in sources]


def _describe_tokens(meta: MapMeta) -> str:
    """Return how triples became tokens, with the chat template's settings and date where it had any."""
    described = ["prompt and response of a text as one" if meta.boundary == BOUNDARY else "prompt and response apart"]
    if meta.chat_template_kwargs:
        described.append(f"chat template with {json.dumps(meta.chat_template_kwargs)}")
    if meta.template_date:
        described.append(f"chat template of {meta.template_date}")
    return ", ".join(described)


def _describe_sae(layer: int, width: int, fingerprint: str) -> str:
    return f"layer {layer}, {width} latents, {fingerprint}"


def summary(cdmap: ConditionalDifferenceMap, delta: float = 0.05) -> list[Figure]:
    """Describe the gates, rows and columns of a map.

    Args:
        cdmap: the map.
        delta: level of the confidence radius.
    """
    return [*_gate_figures(cdmap), *_row_figures(cdmap, delta), *_size_figures(cdmap)]


def _gate_figures(cdmap: ConditionalDifferenceMap) -> list[Figure]:
    meta, n_gates = cdmap.meta, len(cdmap.n_open)
    always = _describe_share(n_always_open(cdmap), n_gates)
    if meta.gate_rule == "published" and meta.n_zero_percentile is not None:
        always += f", {meta.n_zero_percentile} because their percentile is 0"
    if meta.n_inactive is None:
        inactive, advice = "not recorded", "make the map again (dspa map reduce) to count them"
    else:
        inactive, advice = _describe_share(meta.n_inactive, n_gates), "prompts like these never look up their rows"
    return [
        Figure(
            "gates ever open",
            _describe_share(int((cdmap.n_open > 0).sum()), n_gates),
            "the rows of A that hold anything",
        ),
        Figure("gates open on every prompt", always, "their rows are all the same, the mean difference of all triples"),
        Figure("input latents active on no prompt", inactive, advice),
    ]


def _row_figures(cdmap: ConditionalDifferenceMap, delta: float) -> list[Figure]:
    partly = cdmap.gate_latents.long()
    radius = cdmap.radius(delta)[partly]
    n_beyond = int((largest_means(cdmap)[partly] > radius).sum())
    return [
        Figure("prompts per partly open gate", _describe_quartiles(cdmap.n_open[partly]), "a row is a mean over these"),
        Figure(
            "confidence radius of those rows",
            _describe_quartiles(radius),
            f"a smaller conditional mean may be chance (level {delta:g}); it falls as 1 / sqrt(prompts)",
        ),
        Figure(
            "those rows with an entry beyond it",
            f"{n_beyond} of {len(partly)}",
            "--scoring confident steers by such entries alone"
            if n_beyond
            else "usual: judge the sums of rows, which steer, by dspa map stability. --scoring confident would steer "
            "nothing by these rows",
        ),
    ]


def _size_figures(cdmap: ConditionalDifferenceMap) -> list[Figure]:
    meta, n_entries = cdmap.meta, int((cdmap.values != 0).sum())
    return [
        Figure(
            "columns kept",
            _describe_share(len(cdmap.columns), meta.d_sae_out),
            f"the output latents that can be edited; {4e-6 * cdmap.values.numel():.1f} MB in memory",
        ),
        Figure(
            "entries kept",
            f"{n_entries} ({n_entries / (meta.d_sae_in * meta.d_sae_out):.3%} of all)",
            "published: about 0.2% at 16384 latents; a smaller --k-diff keeps fewer",
        ),
        Figure("hot latents", _describe_calibration(cdmap), "for speed alone: results do not depend on them"),
    ]


def warnings(cdmap: ConditionalDifferenceMap) -> list[str]:
    """Return what is unusual about the tokens and the gates of a map, each with what to do about it."""
    meta, n_always = cdmap.meta, n_always_open(cdmap)
    texts = []
    if meta.boundary != BOUNDARY:
        texts.append(
            "An earlier version tokenized the prompt and the response of a text apart. Texts with an implicit prompt, "
            "and those of a tokenizer that begins a text with a space (Llama-2, Mistral), have other tokens. If the "
            "triples are such texts, make the map again from them, in a new folder. Conversations are not affected."
        )
    if not len(cdmap.gate_latents):
        texts.append(
            "No gate is open on some prompts and closed on others, so that every prompt is steered alike. Use more "
            "triples, of different prompts, and check that the input SAE is of this model and layer."
        )
    if meta.n_inactive is not None and meta.n_inactive > MANY * meta.d_sae_in:
        texts.append(
            f"{meta.n_inactive} of {meta.d_sae_in} input latents are active on no prompt. Check that the input SAE is "
            "of this model and layer. Fine-tune it on texts like these (dspa sae finetune), or use more and longer "
            "prompts."
        )
    if meta.gate_rule == "published" and n_always > MANY * meta.d_sae_in:
        texts.append(
            f"{n_always} of {meta.d_sae_in} rows are one and the same, the mean difference: most of the entries kept, "
            "and most of the column sums, from which Static-SAE chooses. Prompts that look up several of them are all "
            "steered alike; dspa map stability COUNTS shows how many they look up. Where that is more than one or two, "
            "make the map with --gate-rule active."
        )
    return texts


def n_always_open(cdmap: ConditionalDifferenceMap) -> int:
    """Return the number of gates that are open on every prompt."""
    return int((cdmap.n_open == cdmap.meta.n_triples).sum())


def largest_means(cdmap: ConditionalDifferenceMap) -> Tensor:
    """Return the largest absolute value per row [d_sae_in], as a mean over the prompts on which its gate is open."""
    return cdmap.values.abs().amax(dim=1) * cdmap.meta.n_triples / cdmap.n_open.clamp(min=1)


def _describe_share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})"


def _describe_quartiles(values: Tensor) -> str:
    if not len(values):
        return "none is partly open"
    low, middle, high = values.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return f"median {middle:.4g}, half of them {low:.4g} to {high:.4g}"


def _describe_calibration(cdmap: ConditionalDifferenceMap) -> str:
    n_hot = len(cdmap.hot)
    if not n_hot:
        return "none: the map has no calibration"
    return f"{n_hot}; the first {min(n_hot, N_LARGE)} are the largest on {cdmap.hot_share():.1%} of sampled tokens"


@dataclass(frozen=True)
class Column:
    """An output latent, the sum of its column of A, and the number of rows in which it is not 0."""

    latent: int
    total: float
    n_rows: int


def top_columns(cdmap: ConditionalDifferenceMap, n: int) -> tuple[list[Column], list[Column]]:
    """Return the columns with the largest positive sums and those with the smallest negative ones.

    Args:
        cdmap: the map.
        n: largest number of columns at each end.
    """
    sums = cdmap.values.double().sum(dim=0)
    order = sums.argsort(descending=True, stable=True)

    def columns_at(places: Tensor) -> list[Column]:
        return [
            Column(int(cdmap.columns[j]), float(sums[j]), int((cdmap.values[:, j] != 0).sum())) for j in places.tolist()
        ]

    positive, negative = order[sums[order] > 0], order.flip(0)
    return columns_at(positive[:n]), columns_at(negative[sums[negative] < 0][:n])


@dataclass(frozen=True)
class Row:
    """An input latent, the number of prompts on which its gate is open, and the largest entry of its row of A."""

    latent: int
    n_open: int
    column: int
    value: float


def top_rows(cdmap: ConditionalDifferenceMap, n: int) -> list[Row]:
    """Return the rows with the largest absolute entries, of the gates that are open on some prompts and not on all.

    Args:
        cdmap: the map.
        n: largest number of rows.
    """
    latents = cdmap.gate_latents.long()
    sizes, places = cdmap.values[latents].abs().max(dim=1)
    order = sizes.argsort(descending=True, stable=True)
    return [
        Row(i, int(cdmap.n_open[i]), int(cdmap.columns[j]), float(cdmap.values[i, j]))
        for i, j in zip(latents[order].tolist(), places[order].tolist(), strict=True)
        if cdmap.values[i, j] != 0
    ][:n]
