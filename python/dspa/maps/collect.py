"""The expensive offline pass: run the model on preference triples and keep integer activation counts.

Counts stay integers until a map is reduced from them, so that the map does not depend on how triples were batched,
distributed or ordered. A sample of response tokens also shows which latents tend to be a token's largest and what the
mean residual is. With these, steering reads less of the encoder; its results do not change.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.costs import Costs, Meter
from dspa.data.templates import at_date
from dspa.data.triples import Triple
from dspa.distributed import Team
from dspa.errors import MapError, ModelError, PreferenceError, listed, refusal
from dspa.maps.collection import FOLDER, Collection
from dspa.maps.cost import Setup, Tokens, collecting, encoding
from dspa.maps.counting import TripleCounter
from dspa.maps.pieces import DataRecord, Tally, TripleSource
from dspa.maps.shards import PARTS
from dspa.models.layers import device_of
from dspa.models.sizes import sizes_of
from dspa.outputs import held
from dspa.saes.frozen import FrozenSAE
from dspa.saes.meanings import top_tokens

# Triples that cannot be tokenized, by name in a message.
N_NAMED = 100


def collect(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Iterable[Triple] | str | Path,
    sae_in: FrozenSAE,
    sae_out: FrozenSAE,
    *,
    first: int | None = None,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    work_dir: str | Path | None = None,
    progress: bool = True,
    layers: str | None = None,
    model_name: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Collection:
    """Count active latents on every triple, teacher-forced (DSPA, activation densities).

    Each prompt runs once, and both responses continue from its key/value cache. Where a model keeps another state, as
    recurrent layers do, each response runs with its prompt instead. Nothing runs above the output layer.
    Where a launcher started several processes (torchrun, accelerate), they share the work, and each returns when all
    of it is done.

    Args:
        model: the model that will be steered.
        tokenizer: its tokenizer.
        triples: what `load_triples` takes, read a window at a time. Data that can be read twice (a file, a list, a
            `datasets.Dataset`) are read and tokenized first, so that an invalid triple is found before the model runs.
        sae_in: the SAE whose latents are counted on prompts, copied to the device of its layer if it is elsewhere.
        sae_out: the SAE whose latents are counted on responses, copied in the same way.
        first: use only the first N triples.
        max_length: tokens of prompt and response together. Longer responses are cut at their end, and a prompt that
            leaves no room is refused. Default: the model's context.
        batch_tokens: tokens per batch, including padding and, for responses, their prompts. It is lowered
            automatically, with a warning, where memory does not suffice.
        work_dir: folder of the finished shards, from which a stopped run continues. Several processes need one. By
            default the counts are in a temporary folder that is removed with the result.
        progress: show a bar with the rate and the remaining time.
        layers: as for `Steering.attach`.
        model_name: as for `Steering.attach`.
        chat_template_kwargs: values of the chat template's variables by name, such as `{"enable_thinking": False}`,
            for conversations. Those of a triple come first.

    Raises:
        PreferenceError: an invalid triple.
        ModelError: an SAE that does not fit, a model in training mode, hidden states that are not finite, or not
            enough memory for one triple alone.
        MapError: a `work_dir` of other settings or data, a damaged one, or one that cannot be written or that another
            process writes.
        OSError: a file that cannot be written.
        ValueError: an invalid `max_length`, several processes without a `work_dir`, or `chat_template_kwargs` that
            are reserved or that the template does not read.
    """
    team = Team()
    if team.size > 1 and work_dir is None:
        got, accepted = f"None for {team.size} processes", "a folder that all of them share"
        raise refusal(ValueError, "`work_dir`", got, accepted, "Their counts are joined there.")
    counter = TripleCounter(
        *(model, tokenizer, sae_in, sae_out, max_length, batch_tokens, layers, model_name, chat_template_kwargs)
    )
    if not counter.shares_prompts and team.rank == 0:
        warnings.warn(
            f"{type(counter.model).__name__} keeps more of a prompt than keys and values per token, such as the state "
            "of recurrent layers. Each response is therefore read in a whole pass with its prompt, which takes longer.",
            stacklevel=2,
        )
    settings = counter.settings()
    meter = Meter(device_of(counter.model.get_input_embeddings()), team.size)
    # Of several processes, the first holds the folder for all.
    holding = nullcontext() if work_dir is None or team.rank else held(Path(work_dir), FOLDER, MapError)
    with holding:
        collection = team.in_turn("manifest", lambda: Collection.start(work_dir, settings, counter.sources()))
        if collection.measured:
            meter.add(collection.measured)
        # Of what an earlier version counted, it is not known what it took.
        is_measured = team.rank == 0 and bool(collection.measured or not collection.has_shards)
        counter.tokenizer = at_date(tokenizer, collection.settings.template_date)
        source = TripleSource(triples, first)
        if source.rereadable:
            expected = _check_triples(source, counter, team, progress)
            team.in_turn("expected", lambda: collection.record(expected))
        counted = _count_all(collection, source, counter, team, meter if is_measured else None, progress)
        if first is not None and counted.n_triples < first and team.rank == 0:
            warnings.warn(
                f"`first` is {first} and the data hold {counted.n_triples} triples: all were counted.", stacklevel=2
            )
        team.in_turn("counted", lambda: collection.record(counted))
        if team.rank == 0 and not collection.promoted:
            _record_promoted(collection, counter, progress)
        if is_measured and not collection.costs:
            collection.record_costs(_costs(collection, counter, meter))
        team.leave()
        return collection


def _check_triples(source: TripleSource, counter: TripleCounter, team: Team, progress: bool) -> DataRecord:
    """Read all triples, tokenize those of this rank's share of pieces, and raise `PreferenceError` for invalid ones."""
    tally, errors = Tally(), dict[int, tuple[str, PreferenceError]]()
    with tqdm(unit="triple", desc="check", leave=False, disable=not progress or team.rank > 0) as bar:
        for piece in source.pieces():
            tally.add(piece)
            if piece.number % team.size == team.rank:
                for index, triple in piece.triples:
                    try:
                        counter.tokenize(triple)
                    except PreferenceError as error:
                        errors[index] = triple.name, error
            bar.update(len(piece.triples))
    if errors:
        # All in one message, instead of one per start, and in the order of the data: pieces are sorted by length.
        (_, first_error), *others = (errors[index] for index in sorted(errors))
        names = listed((name for name, _ in others), N_NAMED)
        more = f" {len(others)} more cannot be tokenized either: {names}." if others else ""
        raise PreferenceError(f"{first_error}{more}") from first_error
    return tally.record()


def _count_all(
    collection: Collection,
    source: TripleSource,
    counter: TripleCounter,
    team: Team,
    meter: Meter | None,
    progress: bool,
) -> DataRecord:
    """Count the pieces that this process claims, wait for those of the others, and return the record of the data."""
    tally, claimed, recorded = Tally(), team.claim(), collection.data
    total = recorded.n_triples if recorded else None
    with tqdm(total=total, unit="triple", desc="collect", disable=not progress or team.rank > 0) as bar:

        def show(n_triples: int) -> None:
            bar.update(n_triples - bar.n)

        for piece in source.pieces():
            tally.add(piece)
            if recorded and piece.number >= recorded.n_pieces:
                # The data go on beyond those of the folder: raises before any more are counted.
                collection.record(tally.record())
            if piece.number != claimed:
                continue
            claimed = team.claim()
            if collection.has(piece.number, piece.digest):
                # Counted earlier, and so no part of the rate. A bar that is not shown has none.
                if not bar.disable:
                    bar.initial += len(piece.triples)
            else:
                collection.write(piece.number, piece.digest, counter.count(piece))
                if meter is not None:
                    collection.record_measured(meter.measured())
            show(team.add_finished(1, len(piece.triples)))
        counted = tally.record()
        team.wait(counted.n_pieces, show)
    return counted


def _costs(collection: Collection, counter: TripleCounter, meter: Meter) -> Costs:
    """Return the costs of complete counts."""
    settings, dtype = collection.settings, str(counter.model.dtype)
    sizes = sizes_of(counter.model, dtype.removeprefix("torch."), counter.layers)
    places = {name: getattr(settings, name) for name in ("layer_in", "layer_out", "d_sae_in", "d_sae_out")}
    setup = Setup(sizes, **places, shares_prompts=counter.shares_prompts)
    lengths = torch.stack([collection.triples()[part] for part in PARTS], dim=1)
    tokens = [Tokens(*row) for row in lengths.tolist()]
    return Costs(
        method="DSPA",
        flops=round(sum(collecting(setup, t).total + encoding(setup, t) for t in tokens)),
        measured=meter.measured(),
        triples=collection.triples_digest(),
        n_triples=collection.n_triples,
        model_name=settings.model_name,
        model_digest=settings.model_digest,
        model_dtype=dtype,
    )


def _record_promoted(collection: Collection, counter: TripleCounter, progress: bool) -> None:
    """Record the tokens that the latents of both SAEs promote, or warn where the model does not show them."""
    options: dict[str, Any] = {"layers": counter.layers, "model_name": counter.name, "progress": progress}
    try:
        promoted = {
            name: top_tokens(sae, counter.model, counter.tokenizer, **options)
            for name, sae in (("sae_in", counter.sae_in), ("sae_out", counter.sae_out))
        }
    except ModelError as error:
        warnings.warn(f"Maps of these counts will not show what their latents mean. {error}", stacklevel=3)
        return
    collection.record_promoted(promoted)
