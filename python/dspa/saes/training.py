"""Train SAEs for layers of a model, or fine-tune one, with SAELens' trainer on streamed activations.

All train BatchTopK SAEs and save what they are at inference: JumpReLU SAEs, in SAELens folders. A training that was
stopped goes on from its last checkpoint to the result that it would have had.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dspa.data.templates import at_date, date_of_today
from dspa.data.texts import TextFile
from dspa.errors import ModelError, TrainingError, refusal, require_package
from dspa.models.layers import (
    base_model,
    check_eval,
    context_length,
    decoder_layers,
    device_of,
    is_model_name,
    loaded_name,
)
from dspa.models.sources import recorded_weights
from dspa.saes.activations import Activations
from dspa.saes.config import SAETrainingConfig
from dspa.saes.fitting import Job, check_k, fit
from dspa.saes.frozen import FrozenSAE
from dspa.saes.metadata import CENTERED, LOADED_WITH
from dspa.saes.placement import check_made_for, required_layer
from dspa.saes.quality import Quality
from dspa.saes.records import read_record
from dspa.training_folder import TrainingFolder

# What a folder means in which a setting is not recorded, because it was made before there was this setting.
EARLIER = {"max_norm_ratio": 0.0}


def train_sae(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: TextFile | str | Path,
    layer: int,
    out: str | Path,
    *,
    d_sae: int,
    k: float = 64,
    config: SAETrainingConfig | None = None,
    progress: bool = True,
    layers: str | None = None,
    model_name: str | None = None,
) -> FrozenSAE:
    """Train a new SAE on the residuals at the output of a decoder layer.

    Args:
        model: a transformers model, or one in a PEFT wrapper, in evaluation mode.
        tokenizer: its tokenizer.
        texts: a `TextFile`, or the path of one: plain text, records with `text`, or preference triples.
        layer: the decoder layer, from 0.
        out: the folder to write, a new one or one in which the same training was stopped. It gets the SAE and
            `training.json`, with the settings, the quality on held-out tokens before and after, and the history. A
            training that was finished there with the same settings is not repeated: its SAE is returned.
        d_sae: number of latents.
        k: active latents per token, on average over a batch.
        config: settings of the training.
        progress: show a bar with loss, explained variance and L0 of the latest reported batch, and the latents that
            were dead in the last window (from the first report on), and one with the tokens read wherever the model
            reads.
        layers: dotted path of the list of decoder layers, for an unknown architecture.
        model_name: name of the model, if its own name or path does not give it.

    Raises:
        ModelError: no such layer, a model in training mode, or hidden states that are not finite.
        PreferenceError: a file of triples that cannot be used.
        RuntimeError: sae-lens is not installed.
        TextError: a file that cannot be used.
        TrainingError: an `out` with something else, or that another process trains in, or a `k` out of range.
        ValueError: held-out tokens without variance.
    """
    return train_saes(
        *(model, tokenizer, texts, [layer], out),
        d_sae=d_sae,
        k=k,
        config=config,
        progress=progress,
        layers=layers,
        model_name=model_name,
    )[0]


def train_saes(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: TextFile | str | Path,
    indices: Sequence[int],
    out: str | Path,
    *,
    d_sae: int | Sequence[int],
    k: float | Sequence[float] = 64,
    config: SAETrainingConfig | None = None,
    progress: bool = True,
    layers: str | None = None,
    model_name: str | None = None,
) -> list[FrozenSAE]:
    """Train a new SAE on each of several layers, all from one pass of the model over the text.

    Each is the SAE that `train_sae` would make of its layer with the same settings. Layers that are finished are left
    as they are, so a stopped training goes on, also if another layer was finished.

    Args:
        model: as for `train_sae`.
        tokenizer: as for `train_sae`.
        texts: as for `train_sae`.
        indices: the decoder layers, from 0.
        out: the folder in which layer 8 gets the folder `layer_8`, as `train_sae` writes it, and so on. One layer alone
            gets `out` itself.
        d_sae: number of latents, for all layers or one per layer.
        k: active latents per token, for all layers or one per layer.
        config: as for `train_sae`.
        progress: as for `train_sae`.
        layers: as for `train_sae`.
        model_name: as for `train_sae`.

    Returns:
        SAEs in the order of `indices`.

    Raises:
        ModelError: as for `train_sae`.
        PreferenceError: as for `train_sae`.
        RuntimeError: as for `train_sae`.
        TextError: as for `train_sae`.
        TrainingError: as for `train_sae`, no layer or one given twice, or a number of values that is not that of the
            layers.
        ValueError: as for `train_sae`.
    """
    widths, ks = sizes_of_layers(indices, d_sae, k)
    saes = [_SAE(*given) for given in zip(indices, layer_folders(out, indices), widths, ks, strict=True)]
    return _train(model, tokenizer, texts, saes, config, layers, model_name, progress)


def finetune_sae(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: TextFile | str | Path,
    sae: FrozenSAE,
    out: str | Path,
    *,
    k: float | None = None,
    config: SAETrainingConfig | None = None,
    progress: bool = True,
    layers: str | None = None,
    model_name: str | None = None,
) -> FrozenSAE:
    """Continue to train `sae`, of any architecture, on the residuals at its layer.

    It becomes a BatchTopK SAE. Thresholds that differ between latents are kept, as the scale of each latent. An SAE
    that normalises its input is trained on the normalised input, and a centred one on residuals less their mean.

    Args:
        model: as for `train_sae`.
        tokenizer: as for `train_sae`.
        texts: as for `train_sae`.
        sae: the SAE to start from.
        out: as for `train_sae`.
        k: active latents per token, on average over a batch. By default the L0 of `sae` on a sample of the text.
        config: as for `train_sae`.
        progress: as for `train_sae`.
        layers: as for `train_sae`.
        model_name: as for `train_sae`.

    Raises:
        ModelError: as for `train_sae`, an SAE that does not say its layer, or one of another model.
        PreferenceError: as for `train_sae`.
        RuntimeError: as for `train_sae`.
        TextError: as for `train_sae`.
        TrainingError: as for `train_sae`.
        ValueError: as for `train_sae`.
    """
    if k is not None:
        check_k(k, sae.d_sae)
    folder = TrainingFolder(Path(out))
    folder.check()
    start = _SAE(required_layer(sae), folder, sae.d_sae, k, sae)
    return _train(model, tokenizer, texts, [start], config, layers, model_name, progress)[0]


def sizes_of_layers(
    indices: Sequence[int], d_sae: int | Sequence[int], k: float | Sequence[float]
) -> tuple[list[int], list[float]]:
    """Return the number of latents and that of active latents of each layer's SAE, with the arguments of `train_saes`.

    Raises:
        TrainingError: as for `train_saes`.
    """
    if not indices or len(set(indices)) < len(indices):
        raise refusal(TrainingError, "`indices`", repr(list(indices)), "one or more layers, each once")
    widths, ks = _per_layer("d_sae", d_sae, len(indices)), _per_layer("k", k, len(indices))
    for width, active in zip(widths, ks, strict=True):
        check_k(active, width)
    return widths, ks


def layer_folders(out: str | Path, indices: Sequence[int]) -> list[TrainingFolder]:
    """Return the folder of each layer in `out`, and `out` itself for one layer alone.

    Raises:
        TrainingError: a folder with something else.
    """
    out = Path(out)
    folders = [TrainingFolder(out / f"layer_{index}" if len(indices) > 1 else out) for index in indices]
    if len(indices) == 1 or out.exists() or not out.parent.is_dir():
        for folder in folders:
            folder.check()
    return folders


def read_qualities(out: str | Path) -> dict[str, Quality]:
    """Return the quality on held-out tokens "before" and "after" a finished training, from its folder.

    Raises:
        TrainingError: a folder without a finished training.
    """
    record = read_record(TrainingFolder(Path(out)))
    if record.before is None or record.after is None:
        raise refusal(TrainingError, str(out), "not the folder of a finished training", "what `train_sae` wrote")
    return {"before": record.before, "after": record.after}


def _per_layer(name: str, values: Any, n_layers: int) -> list[Any]:
    """Return a value per layer, of one for all or of one each."""
    given = list(values) if isinstance(values, Sequence) else [values]
    if len(given) not in (1, n_layers):
        raise refusal(TrainingError, f"`{name}`", f"{len(given)} values", f"one, or one per layer ({n_layers})")
    return given * n_layers if len(given) == 1 else given


@dataclass(frozen=True, eq=False)
class _SAE:
    """An SAE to train, as it was asked for.

    Attributes:
        layer: the decoder layer.
        folder: where it goes.
        d_sae: number of latents.
        k: active latents per token; None for as many as `start` has.
        start: the SAE to continue, or None for a new one.
    """

    layer: int
    folder: TrainingFolder
    d_sae: int
    k: float | None
    start: FrozenSAE | None = None


def _train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: TextFile | str | Path,
    saes: Sequence[_SAE],
    config: SAETrainingConfig | None,
    layers: str | None,
    model_name: str | None,
    progress: bool,
) -> list[FrozenSAE]:
    """Check the arguments, claim the folders, read the held-out text, and train what is not finished."""
    require_package("sae-lens", "Training an SAE")
    given, inner = config or SAETrainingConfig(), base_model(model)
    model_name = model_name or loaded_name(inner)
    for sae in saes:
        _check_model(inner, sae.layer, layers, sae.start, model_name)
    with ExitStack() as holding:
        for sae in saes:
            holding.enter_context(sae.folder.held())
        unfinished = [sae for sae in saes if not sae.folder.finished]
        file = texts if isinstance(texts, TextFile) else TextFile(texts)
        max_length = min(given.max_length, context_length(inner) or given.max_length)
        date, weights = date_of_today(tokenizer), recorded_weights(inner)
        configs = [replace(given, max_length=max_length).resolved(sae.d_sae, new=sae.start is None) for sae in saes]
        for sae, resolved in zip(saes, configs, strict=True):
            date = sae.folder.first_date(date)
            settings = {
                "model_name": model_name,
                "model_dtype": str(inner.dtype),
                "layer": sae.layer,
                "sae": sae.start.fingerprint if sae.start else None,
                "d_sae": sae.d_sae,
                "k": sae.k,
                "data": file.digest,
                "template_date": date,
            }
            sae.folder.claim({**settings, **weights, **asdict(resolved)}, earlier=EARLIER | weights)
        if not unfinished:
            return _load(saes, inner, layers)
        activations = Activations(
            inner,
            at_date(tokenizer, date),
            file,
            [sae.layer for sae in unfinished],
            max_length=max_length,
            exclude_special_tokens=given.exclude_special_tokens,
            batch_tokens=given.batch_tokens,
            max_norm_ratio=given.max_norm_ratio,
            layers=layers,
            progress=progress,
        )
        held_out, n_held_out = activations.held_out(given.held_out_tokens)
        jobs = [
            Job(
                config=resolved,
                folder=sae.folder,
                layer=sae.layer,
                held_out=held_out[sae.layer],
                d_sae=sae.d_sae,
                k=sae.k,
                start=sae.start.to(held_out[sae.layer].device, torch.float32) if sae.start else None,
                metadata=_metadata(tokenizer, file, sae.layer, resolved, model_name, sae.start),
            )
            for sae, resolved in zip(saes, configs, strict=True)
            if sae in unfinished
        ]
        fit(jobs, activations, n_held_out, progress)
        return _load(saes, inner, layers)


def _load(saes: Sequence[_SAE], model: nn.Module, layers: str | None) -> list[FrozenSAE]:
    """Return the trained SAEs, each on the device of its layer."""
    stack = decoder_layers(model, layers)
    return [FrozenSAE.load(sae.folder.path, device=device_of(stack[sae.layer])) for sae in saes]


def _metadata(
    tokenizer: PreTrainedTokenizerBase,
    file: TextFile,
    layer: int,
    config: SAETrainingConfig,
    model_name: str,
    start: FrozenSAE | None,
) -> dict[str, Any]:
    """Return the metadata of the trained SAE, by SAELens' names."""
    metadata = {
        "model_name": model_name if is_model_name(model_name) else start and start.model_name,
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "context_size": config.max_length,
        "prepend_bos": tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id],
        "exclude_special_tokens": config.exclude_special_tokens,
        "max_norm_ratio": config.max_norm_ratio,
        "dataset_path": file.path.name,
    }
    if start and start.centered:
        metadata[LOADED_WITH] = {CENTERED: True}
    return metadata


def _check_model(model: nn.Module, layer: int, layers: str | None, start: FrozenSAE | None, model_name: str) -> None:
    check_eval(model)
    n_layers = len(decoder_layers(model, layers))
    if not 0 <= layer < n_layers:
        raise refusal(ModelError, "`layer`", repr(layer), f"0 to {n_layers - 1}, the model's layers")
    if start is not None:
        check_made_for("sae", start, model, model_name)
