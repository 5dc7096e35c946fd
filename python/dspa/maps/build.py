"""Collect counts and reduce them to a map, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from dspa.data.triples import Triple
from dspa.distributed import rank
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.maps.collect import collect
from dspa.maps.reduce import check_settings, reduce
from dspa.saes.frozen import FrozenSAE


def build_map(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Iterable[Triple] | str | Path,
    sae_in: FrozenSAE,
    sae_out: FrozenSAE,
    *,
    first: int | None = None,
    percentile: float = 90.0,
    gate_rule: str = "published",
    count_tokens: str = "all",
    k_diff: int = 16,
    sparsify: bool = True,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    work_dir: str | Path | None = None,
    progress: bool = True,
    layers: str | None = None,
    model_name: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ConditionalDifferenceMap | None:
    """Make the conditional-difference map of a model from preference triples (DSPA, offline).

    Several processes (torchrun, accelerate) share the counting, and the process of rank 0 alone reduces the counts.

    Args:
        model: the model that will be steered.
        tokenizer: its tokenizer.
        triples: what `load_triples` takes.
        sae_in: the SAE whose latents gate, on prompts.
        sae_out: the SAE whose latents are steered.
        first: as for `collect`.
        percentile: as for `reduce`.
        gate_rule: as for `reduce`.
        count_tokens: as for `reduce`.
        k_diff: as for `reduce`.
        sparsify: as for `reduce`.
        max_length: as for `collect`.
        batch_tokens: as for `collect`.
        work_dir: as for `collect`. Maps of other settings can be made from the same folder: `reduce(work_dir, ...)`.
        progress: show bars.
        layers: as for `Steering.attach`.
        model_name: as for `Steering.attach`.
        chat_template_kwargs: as for `collect`.

    Returns:
        The map. Where several processes run, the map on rank 0 and None on the others.

    Raises:
        ValueError: an invalid setting.
        PreferenceError: as for `collect`.
        ModelError: as for `collect`.
        MapError: as for `collect` and `reduce`.
        OSError: as for `collect`.
    """
    check_settings(percentile, gate_rule, k_diff, sae_out.d_sae, count_tokens)
    counts = collect(
        model,
        tokenizer,
        triples,
        sae_in,
        sae_out,
        first=first,
        max_length=max_length,
        batch_tokens=batch_tokens,
        work_dir=work_dir,
        progress=progress,
        layers=layers,
        model_name=model_name,
        chat_template_kwargs=chat_template_kwargs,
    )
    if rank() > 0:
        return None
    return reduce(
        counts,
        percentile=percentile,
        gate_rule=gate_rule,
        count_tokens=count_tokens,
        k_diff=k_diff,
        sparsify=sparsify,
        progress=progress,
    )
