"""The expensive offline pass: run the model on preference triples, keep integer activation counts.

Counts stay integers until a map is reduced from them, so that it does not depend on how triples were batched, shared
out or ordered. On the way, some response tokens tell which latents tend to hold a token's maximum and where residuals
lie: with that, steering reads less of the encoder, and does nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.data.triples import Triple
from dspa.distributed import Team
from dspa.errors import PreferenceError
from dspa.maps.counting import TripleCounter
from dspa.maps.pieces import DataRecord, Tally, TripleSource
from dspa.maps.shards import Collection
from dspa.saes.frozen import FrozenSAE


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
) -> Collection:
    """Count active latents on every triple, teacher-forced (DSPA, activation densities).

    Each prompt runs once, and both responses go on from its key/value cache; nothing runs above the output layer.
    Where a launcher started several processes (torchrun, accelerate), they share the work, and each returns when all
    of it is done.

    Args:
        model, tokenizer: the model that will be steered.
        triples: what `load_triples` takes, read a window at a time. What can be read twice (a file, a list, a
            `datasets.Dataset`) is read and tokenized first, so that a bad triple is found before the model runs.
        sae_in, sae_out: the SAEs, copied to the devices of their layers where they are elsewhere.
        first: use the first so many triples only.
        max_length: tokens of prompt and response together; longer responses are cut at their end, and a prompt
            that leaves no room is refused. Default: the model's context.
        batch_tokens: tokens of a batch, padding and, for responses, their prompts counted. It becomes less by itself,
            with a warning, where memory does not suffice.
        work_dir: a folder for finished shards, from which a stopped run goes on. Several processes need one. By
            default the counts are in a temporary folder, and go with the result.
        progress: show a bar with the rate and the time left.
        layers, model_name: as for `Steering.attach`.

    Raises:
        PreferenceError: a bad triple. ModelError: an SAE that does not fit, a model in training mode, hidden
        states that are not finite, a triple that the memory does not suffice for.
        MapError: a work_dir of other settings or data, or damaged. OSError: what cannot be written.
    """
    team = Team()
    if team.size > 1 and work_dir is None:
        raise ValueError(
            f"`work_dir` is None for {team.size} processes; accepted: a folder that all of them share. Their counts "
            "meet there."
        )
    reader = TripleCounter(model, tokenizer, sae_in, sae_out, max_length, batch_tokens, layers, model_name)
    settings = reader.settings()
    collection = team.in_turn("manifest", lambda: Collection.start(work_dir, settings))
    source = TripleSource(triples, first)
    if source.known:
        known = _read_ahead(source, reader, team, progress)
        team.in_turn("known", lambda: collection.record(known))
    found = _count_all(collection, source, reader, team, progress)
    if first is not None and found.n_triples < first and team.rank == 0:
        warnings.warn(
            f"`first` is {first} and the data hold {found.n_triples} triples: all were counted.", stacklevel=2
        )
    team.in_turn("found", lambda: collection.record(found))
    team.leave()
    return collection


def _read_ahead(source: TripleSource, reader: TripleCounter, team: Team, progress: bool) -> DataRecord:
    """Read all triples, and tokenize those of every `team.size`-th piece, to find what is wrong with them."""
    tally, refused = Tally(), list[PreferenceError]()
    with tqdm(unit="triple", desc="check", leave=False, disable=not progress or team.rank > 0) as bar:
        for piece in source.pieces():
            tally.add(piece)
            if piece.number % team.size == team.rank:
                for _, triple in piece.triples:
                    try:
                        reader.tokenize(triple)
                    except PreferenceError as error:
                        refused.append(error)
            bar.update(len(piece.triples))
    if refused:
        # All at once: to find one a start would take as many starts.
        others = [str(error).split(":")[0] for error in refused[1:]]
        more = f" {len(others)} more are refused like this: {', '.join(others)}." if others else ""
        raise PreferenceError(f"{refused[0]}{more}") from refused[0]
    return tally.record()


def _count_all(
    collection: Collection, source: TripleSource, reader: TripleCounter, team: Team, progress: bool
) -> DataRecord:
    """Count the pieces that this process gets, and wait for those of the others."""
    tally, mine, known = Tally(), team.claim(), collection.data
    total = known.n_triples if known else None
    with tqdm(total=total, unit="triple", desc="collect", disable=not progress or team.rank > 0) as bar:

        def show(n_triples: int) -> None:
            bar.update(n_triples - bar.n)

        for piece in source.pieces():
            tally.add(piece)
            if known and piece.number >= known.n_pieces:
                # More data than the folder is of: raises before any of them is counted.
                collection.record(tally.record())
            if piece.number != mine:
                continue
            mine = team.claim()
            if collection.has(piece.number, piece.digest):
                # Counted before: no part of the rate, which a bar that is not shown does not have.
                if not bar.disable:
                    bar.initial += len(piece.triples)
            else:
                collection.write(piece.number, piece.digest, reader.count(piece))
            show(team.finished(1, len(piece.triples)))
        found = tally.record()
        team.wait(found.n_pieces, show)
    return found
