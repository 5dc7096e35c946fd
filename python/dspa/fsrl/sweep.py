"""Sweeps: adapters of several settings or layers, trained alike and compared on held-out triples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from dspa.data.templates import date_of_today
from dspa.data.triples import Source
from dspa.distributed import Team, rank
from dspa.errors import TrainingError, refusal
from dspa.files import write_csv
from dspa.fsrl.adapter import FSRLAdapter
from dspa.fsrl.config import FSRLConfig, TrainingConfig
from dspa.fsrl.results import Sweep, Trained
from dspa.fsrl.training import measure, read_held_out, train, trained_template
from dspa.models.layers import base_model, check_eval, decoder_layers
from dspa.outputs import held
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import check_sae, required_layer
from dspa.training_folder import TrainingFolder

CSV, PLOT = "sweep.csv", "sweep.png"


def train_sweep(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Source,
    saes: Sequence[FrozenSAE],
    adapters: Sequence[FSRLConfig],
    out: str | Path,
    *,
    eval_triples: Source,
    config: TrainingConfig | None = None,
    progress: bool = True,
    layers: str | None = None,
    model_name: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Sweep:
    """Train an adapter for each pair of SAE and setting, and compare them on `eval_triples`.

    Each adapter is trained in a folder of its own in `out`, so the same call resumes a sweep that was stopped. `out`
    also gets `sweep.csv`, with one row per adapter and one for the base model, and `sweep.png`.

    Args:
        model: as for `train`.
        tokenizer: the model's tokenizer.
        triples: as for `train`.
        saes: SAEs, each of another layer.
        adapters: settings, no two with the same activation and the same `l1`.
        out: the folder to write.
        eval_triples: held-out triples, or rankings for PRO, to compare on.
        config: the published settings by default.
        progress: show bars.
        layers: dotted path of the decoder layers, as for `FSRLAdapter.attach`.
        model_name: name of the model, as for `FSRLAdapter.attach`.
        chat_template_kwargs: as for `train`.

    Raises:
        TrainingError: two SAEs of one layer, two settings alike, an `out` that another process writes, or whatever
            `train` raises.
        ModelError: an SAE that does not fit the model, or whatever `train` raises.
    """
    config, inner, path = config or TrainingConfig(), base_model(model), Path(out)
    check_eval(inner)
    grid = dict(_grid(saes, adapters))
    if len(grid) < len(saes) * len(adapters):
        raise TrainingError(
            f"The sweep's {len(saes)} SAEs and {len(adapters)} settings make {len(grid)} different adapters "
            f"({', '.join(grid)}). Give SAEs of different layers, and settings of different activation or l1."
        )
    if not path.parent.is_dir() or (path.exists() and not path.is_dir()):
        raise refusal(TrainingError, "The output folder", path, "a folder in one that exists")
    for sae in saes:
        check_sae("sae", sae, inner, len(decoder_layers(inner, layers)), model_name)
    with held(path, "The output folder", TrainingError) if rank() == 0 else nullcontext():
        data, evaluated = list(config.load(triples)), list(config.load(eval_triples))
        trained = []
        # All begin on the same date, which the chat template may write.
        Team().in_turn("date", lambda: _begin(date_of_today(tokenizer), [TrainingFolder(path / name) for name in grid]))
        for name, (sae, settings) in grid.items():
            options: dict[str, Any] = {"progress": progress, "layers": layers, "model_name": model_name}
            options["chat_template_kwargs"] = chat_template_kwargs
            adapter = FSRLAdapter(sae, settings)
            train(model, tokenizer, data, adapter, path / name, config=config, eval_triples=evaluated, **options)
            figures = read_held_out(path / name)
            assert figures is not None
            trained.append(Trained(required_layer(sae), settings.activation, settings.l1, path / name, figures))
        options = {"progress": progress, "chat_template_kwargs": chat_template_kwargs}
        dated, _ = trained_template(tokenizer, path / next(iter(grid)))
        result = Sweep(measure(inner, dated, evaluated, None, config, **options), trained)
        if rank() == 0:
            _write(result, path)
        return result


def _begin(today: str | None, folders: Sequence[TrainingFolder]) -> None:
    for folder in folders:
        today = folder.first_date(today)


def _grid(
    saes: Sequence[FrozenSAE], adapters: Sequence[FSRLConfig]
) -> Iterator[tuple[str, tuple[FrozenSAE, FSRLConfig]]]:
    for sae in saes:
        for settings in adapters:
            yield f"layer-{required_layer(sae)}-{settings.activation}-{settings.l1:g}", (sae, settings)


def _write(sweep: Sweep, out: Path) -> None:
    from dspa.fsrl.plots import plot_sweep

    write_csv(out / CSV, sweep.rows())
    plot_sweep(sweep, out / PLOT)
