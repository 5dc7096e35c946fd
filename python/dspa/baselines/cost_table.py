"""Costs of several methods side by side, where they were made from the same triples with the same model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspa.costs import Costs, Measured, read_costs
from dspa.errors import refusal
from dspa.models.sources import may_be_one

# By the formula of the publication, for two passes over the data and 768 tokens per text.
PUBLISHED_RATIO = 4.47


@dataclass(frozen=True)
class CostRow:
    """Costs of a method, or of all stages of one together.

    Attributes:
        method: its name.
        flops: floating-point operations.
        measured: time and memory.
    """

    method: str
    flops: int
    measured: Measured


@dataclass(frozen=True)
class CostTable:
    """Costs of methods.

    Attributes:
        rows: the methods. What others are compared with comes first.
        n_triples: number of triples that all were made from.
        model_name: name of the model that all were made with.
        doubts: why figures may not be comparable, as sentences.
    """

    rows: tuple[CostRow, ...]
    n_triples: int
    model_name: str
    doubts: tuple[str, ...]


def cost_table(paths: Sequence[Path]) -> CostTable:
    """Return the costs of methods side by side.

    A stage whose model is what another stage trained belongs to that one: both are also added up.

    Args:
        paths: a map, a vector, a folder of counts, or the folder of a finished training, each once.

    Raises:
        ValueError: something without costs, or made from other triples or with another model than the first.
    """
    records = {path: read_costs(path) for path in paths}
    (first, reference), *others = records.items()
    for path, costs in others:
        if costs.triples != reference.triples:
            got = f"made from {costs.n_triples} triples of digest {costs.triples}"
            accepted = f"those of {first}: {reference.n_triples} of digest {reference.triples}"
            raise refusal(ValueError, str(path), got, accepted, "Make both from the same triples.")
        if not may_be_one([costs.model_digest, reference.model_digest]) and _before(costs, records) is None:
            got = f"made with a model of weights {costs.model_digest} ({costs.model_name})"
            accepted = (
                f"those of {first}, {reference.model_digest} ({reference.model_name}), or what one of them trained"
            )
            raise refusal(ValueError, str(path), got, accepted, "Give the earlier stage, too, or use one model.")
    rows = []
    for costs in records.values():
        rows.append(CostRow(costs.method, costs.flops, costs.measured))
        if (before := _before(costs, records)) is not None:
            name = f"{costs.method.partition(',')[0]}, both stages"
            rows.append(CostRow(name, before.flops + costs.flops, before.measured + costs.measured))
    return CostTable(tuple(rows), reference.n_triples, reference.model_name, tuple(_doubts(records)))


def _before(costs: Costs, records: Mapping[Path, Costs]) -> Costs | None:
    """Return the costs of the stage that trained the model of this one."""
    return next(
        (
            other
            for other in records.values()
            if len(other.trained_digest) > 0 and other.trained_digest == costs.model_digest
        ),
        None,
    )


def _doubts(records: Mapping[Path, Costs]) -> list[str]:
    """Return why figures of records may not be comparable."""
    doubts = []
    for what, values in (
        ("machines", {costs.measured.machine for costs in records.values()}),
        ("numbers of processes", {str(costs.measured.processes) for costs in records.values()}),
        ("dtypes of the model", {costs.model_dtype for costs in records.values()}),
    ):
        if len(values) > 1:
            doubts.append(f"The {what} differ: {', '.join(sorted(values))}. Compare operations, not seconds or memory.")
    if unknown := [str(path) for path, costs in records.items() if not costs.model_digest]:
        doubts.append(f"The weights of the model are not known of {', '.join(unknown)}.")
    return doubts
