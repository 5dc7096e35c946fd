"""Adapters of several settings, or of SAEs at several layers, trained alike and compared on held-out triples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from dspa.data.triples import Triple, load_triples
from dspa.distributed import rank
from dspa.errors import TrainingError
from dspa.files import write_csv
from dspa.fsrl.adapter import FSRLAdapter
from dspa.fsrl.config import FSRLConfig, TrainingConfig
from dspa.fsrl.results import Sweep, Trained, held_out
from dspa.fsrl.training import read_held_out, scoring, train
from dspa.models.layers import base_model, check_eval, decoder_layers
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import check_sae, required_layer

CSV, PLOT = "sweep.csv", "sweep.png"


def train_sweep(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Iterable[Triple | Mapping[str, Any]] | str | Path,
    saes: Sequence[FrozenSAE],
    adapters: Sequence[FSRLConfig],
    out: str | Path,
    *,
    eval_triples: Iterable[Triple | Mapping[str, Any]] | str | Path,
    config: TrainingConfig | None = None,
    progress: bool = True,
    layers: str | None = None,
    model_name: str | None = None,
) -> Sweep:
    """Train an adapter of each of the settings on each of the SAEs, and compare them on `eval_triples`.

    Each is trained in its own folder in `out`, so that the same call goes on where a sweep was stopped. Beside them are
    written `sweep.csv`, a row an adapter and one of the base model, and `sweep.png`.

    Args:
        saes: at layers that all differ.
        adapters: settings of which no two have both the same activation and the same `l1`.
        The rest is as for `train`, and so is what is raised.
    """
    config, inner, path = config or TrainingConfig(), base_model(model), Path(out)
    check_eval(inner)
    grid = dict(_grid(saes, adapters))
    if len(grid) < len(saes) * len(adapters):
        raise TrainingError(
            f"The sweep has {len(saes)} SAEs and {len(adapters)} settings, of which some are the same: {len(grid)} "
            f"differ ({', '.join(grid)}). Accepted: SAEs of different layers, settings of different activation or l1."
        )
    if not path.parent.is_dir() or path.is_file():
        raise TrainingError(f"The output folder is {path}; accepted: a folder, in one that exists.")
    for sae in saes:
        check_sae("sae", sae, inner, len(decoder_layers(inner, layers)), model_name)
    path.mkdir(exist_ok=True)
    data, held = list(load_triples(triples)), list(load_triples(eval_triples))
    found = []
    for name, (sae, settings) in grid.items():
        options: dict[str, Any] = {"progress": progress, "layers": layers, "model_name": model_name}
        adapter = FSRLAdapter(sae, settings)
        train(model, tokenizer, data, adapter, path / name, config=config, eval_triples=held, **options)
        figures = read_held_out(path / name)
        assert figures is not None
        found.append(Trained(required_layer(sae), settings.activation, settings.l1, path / name, figures))
    result = Sweep(held_out(inner, tokenizer, held, **scoring(inner, config), progress=progress), found)
    if rank() == 0:
        _write(result, path)
    return result


def _grid(
    saes: Sequence[FrozenSAE], adapters: Sequence[FSRLConfig]
) -> Iterator[tuple[str, tuple[FrozenSAE, FSRLConfig]]]:
    for sae in saes:
        for settings in adapters:
            yield f"layer-{required_layer(sae)}-{settings.activation}-{settings.l1:g}", (sae, settings)


def _write(found: Sweep, out: Path) -> None:
    from dspa.fsrl.plots import plot_sweep

    write_csv(out / CSV, found.rows())
    plot_sweep(found, out / PLOT)
