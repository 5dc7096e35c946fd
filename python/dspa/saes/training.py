"""Train an SAE for one layer of a model, or fine-tune one, with SAELens' trainer on streamed activations.

Both train a BatchTopK SAE and save what it is at inference: a JumpReLU SAE, in a SAELens folder. A training that was
stopped goes on from its last checkpoint to the result that it would have had.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.data.templates import at_date, date_of_today
from dspa.data.texts import TextFile
from dspa.errors import ModelError, TrainingError, refusal, require_package
from dspa.models.layers import base_model, check_eval, context_length, decoder_layers, is_model_name, loaded_name
from dspa.saes.activations import Activations, Position
from dspa.saes.batchtopk import begin_threshold, jumprelu, new_sae, started_sae
from dspa.saes.checkpoints import restore_checkpoint, save_checkpoint
from dspa.saes.config import SAETrainingConfig
from dspa.saes.formats import FIGURES
from dspa.saes.frozen import FrozenSAE
from dspa.saes.metadata import CENTERED, LOADED_WITH
from dspa.saes.placement import check_made_for, required_layer
from dspa.saes.quality import Quality, evaluate_sae
from dspa.training_folder import History, TrainingFolder

# Entries in the history of a training.
REPORTS = 100
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
            `training.json`, with the settings, the quality on held-out tokens before and after, and the history.
        d_sae: number of latents.
        k: active latents per token, on average over a batch.
        config: settings of the training.
        progress: show a bar with loss, explained variance, L0 and dead latents of the latest reported batch, and one
            with the tokens read wherever the model reads.
        layers: dotted path of the list of decoder layers, for an unknown architecture.
        model_name: name of the model, if its own name or path does not give it.

    Raises:
        ModelError: no such layer, a model in training mode, or hidden states that are not finite.
        PreferenceError: a file of triples that cannot be used.
        RuntimeError: sae-lens is not installed.
        TextError: a file that cannot be used.
        TrainingError: an `out` with something else, or a `k` out of range.
        ValueError: held-out tokens without variance.
    """
    _check_k(k, d_sae)
    job = _prepare(model, tokenizer, texts, layer, out, config, layers, model_name, progress, d_sae=d_sae, k=k)
    return _fit(job, progress)


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
        _check_k(k, sae.d_sae)
    given = (model, tokenizer, texts, required_layer(sae), out, config, layers, model_name, progress)
    return _fit(_prepare(*given, d_sae=sae.d_sae, k=k, start=sae), progress)


def read_qualities(out: str | Path) -> dict[str, Quality]:
    """Return the quality on held-out tokens "before" and "after" a finished training, from its folder."""
    record = TrainingFolder(Path(out)).read()
    return {when: Quality(**record[when]) for when in ("before", "after")}


def _check_k(k: float, d_sae: int, advice: str = "") -> None:
    if not 1 <= k <= d_sae:
        raise refusal(TrainingError, "`k`", repr(k), f"1 to d_sae = {d_sae}", advice)


@dataclass(frozen=True)
class _Job:
    """A training that is checked and about to begin.

    Attributes:
        batches: batches of residuals [batch_size, d_in] from a place in the stream on.
        held_out: residuals to report on [N, d_in], those of outlying norm among them.
        d_sae: number of latents.
        k: active latents per token; None for as many as `start` has.
        start: the SAE to continue, in fp32, or None for a new one.
        metadata: metadata of the saved SAE.
    """

    config: SAETrainingConfig
    folder: TrainingFolder
    batches: Callable[[Position | None], Iterator[tuple[Position, Tensor]]]
    held_out: Tensor
    d_sae: int
    k: float | None
    start: FrozenSAE | None
    metadata: dict[str, Any]

    def read(self, rows: Tensor) -> Tensor:
        """Return what the SAE encodes of residuals [N, d_in], fp32."""
        return self.start.normalise(rows) if self.start else rows.float()

    def new_sae(self, k: float, scale: float) -> Any:
        """Return the training SAE before its first step."""
        # The threshold is a running mean. A short training should not keep its beginning.
        shared: dict[str, Any] = {
            "threshold_lr": min(1.0, max(0.01, 10 / self.config.n_steps)),
            "metadata": self.metadata,
        }
        if self.start is None:
            sae = new_sae(self.held_out.shape[1], self.d_sae, k, seed=self.config.seed, **shared)
        else:
            sae = started_sae(self.start, k, scale=scale, **shared)
        return sae.to(self.held_out.device)

    def evaluate(self, sae: FrozenSAE) -> Quality:
        """Return the quality of an SAE on the held-out residuals."""
        return evaluate_sae(sae, self.held_out, max_norm_ratio=self.config.max_norm_ratio)

    def inference(self, sae: Any, scale: float) -> Any:
        """Return a training SAE as SAELens saves it."""
        return jumprelu(sae, scale=scale, normalize_activations=self.start.weights.normalize if self.start else "none")

    def evaluate_training(self, sae: Any, scale: float) -> Quality:
        """Return the quality of a training SAE, at inference."""
        return self.evaluate(FrozenSAE.from_sae_lens(self.inference(sae, scale)).to(self.held_out.device))


@dataclass(frozen=True)
class _Beginning:
    """Numbers that the first batches decide, kept in `training.json`: a resumed training need not read them again.

    Attributes:
        k: active latents per token.
        scale: factor to a mean norm of sqrt(d_in), at which a learning rate means the same for any model.
        before: quality of the SAE before its first step.
    """

    k: float
    scale: float
    before: Quality


def _prepare(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: TextFile | str | Path,
    layer: int,
    out: str | Path,
    config: SAETrainingConfig | None,
    layers: str | None,
    model_name: str | None,
    progress: bool,
    *,
    d_sae: int,
    k: float | None,
    start: FrozenSAE | None = None,
) -> _Job:
    """Check the arguments, claim the folder, and read the held-out text."""
    require_package("sae-lens", "Training an SAE")
    config, inner, folder = config or SAETrainingConfig(), base_model(model), TrainingFolder(Path(out))
    model_name = model_name or loaded_name(inner)
    _check_model(inner, layer, layers, start, model_name)
    folder.check()
    file = texts if isinstance(texts, TextFile) else TextFile(texts)
    max_length = min(config.max_length, context_length(inner) or config.max_length)
    date = folder.first_date(date_of_today(tokenizer))
    settings = {
        "model_name": model_name,
        "model_dtype": str(inner.dtype),
        "layer": layer,
        "sae": start.fingerprint if start else None,
        "d_sae": d_sae,
        "k": k,
        "data": file.digest,
        "template_date": date,
    }
    folder.claim({**settings, **asdict(config), "max_length": max_length}, earlier=EARLIER)
    activations = Activations(
        inner,
        at_date(tokenizer, date),
        file,
        layer,
        max_length=max_length,
        exclude_special_tokens=config.exclude_special_tokens,
        batch_tokens=config.batch_tokens,
        max_norm_ratio=config.max_norm_ratio,
        layers=layers,
        progress=progress,
    )
    held_out, n_held_out = activations.held_out(config.held_out_tokens)
    buffer_tokens = min(config.buffer_tokens, config.n_tokens)
    return _Job(
        config=config,
        folder=folder,
        batches=functools.partial(activations.batches, n_held_out, config.batch_size, buffer_tokens, config.seed),
        held_out=held_out,
        d_sae=d_sae,
        k=k,
        start=start.to(held_out.device, torch.float32) if start else None,
        metadata=_metadata(tokenizer, file, layer, max_length, config, model_name, start),
    )


def _metadata(
    tokenizer: PreTrainedTokenizerBase,
    file: TextFile,
    layer: int,
    max_length: int,
    config: SAETrainingConfig,
    model_name: str,
    start: FrozenSAE | None,
) -> dict[str, Any]:
    """Return the metadata of the trained SAE, by SAELens' names."""
    metadata = {
        "model_name": model_name if is_model_name(model_name) else start and start.model_name,
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "context_size": max_length,
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


def _begin(job: _Job, first: list[Tensor]) -> tuple[Any, _Beginning]:
    """Return the SAE before its first step, and what its first batches [batch_size, d_in] decided."""
    sample, k = torch.cat(first), job.k
    if k is None:
        assert job.start is not None
        # Outliers have left the batches already.
        k = evaluate_sae(job.start, sample, max_norm_ratio=0).l0
        _check_k(k, job.d_sae, "It is the L0 of `sae` on these tokens: is it the SAE of this layer? Or pass `k`.")
    scale = float(sample.shape[1] ** 0.5 / job.read(sample).norm(dim=-1).mean())
    sae = job.new_sae(k, scale)
    begin_threshold(sae, job.read(first[0]) * scale)
    before = job.evaluate(job.start) if job.start else job.evaluate_training(sae, scale)
    return sae, _Beginning(k, scale, before)


def _fit(job: _Job, progress: bool) -> FrozenSAE:
    """Train an SAE from its start or its checkpoint, and save what it is at inference."""
    config, total = job.config, job.config.n_steps * job.config.batch_size
    record, stream = job.folder.read(), job.batches(None)
    first: list[tuple[Position, Tensor]] = []
    if "before" in record:
        begun = _Beginning(record["k"], record["scale"], Quality(**record["before"]))
        sae = job.new_sae(begun.k, begun.scale)
    else:
        first = list(islice(stream, max(1, config.held_out_tokens // config.batch_size)))
        sae, begun = _begin(job, [rows for _, rows in first])
        job.folder.write(record | asdict(begun))
    trainer = _trainer(config, sae)
    trainer.activation_scaler.scaling_factor = begun.scale
    position, history = restore_checkpoint(job.folder, trainer)
    batches = job.batches(position) if position else chain(first, stream)
    done, every = trainer.n_training_samples, max(1, config.n_steps // REPORTS)
    with tqdm(total=total, initial=done, unit="token", unit_scale=True, disable=not progress, desc="train") as bar:
        while trainer.n_training_steps < config.n_steps:
            position, rows = next(batches)
            output = trainer.step(job.read(rows))
            trainer.n_training_steps += 1
            bar.update(len(rows))
            if trainer.n_training_steps % every == 0:
                history.append(_report(trainer, output))
                bar.set_postfix({name: f"{value:.4g}" for name, value in history[-1].items() if name != "tokens"})
            if trainer.n_training_steps % config.checkpoint_every == 0:
                save_checkpoint(job.folder, trainer, position, history)
    return _finish(job, sae, begun.scale, history, position.n_left_out if position else 0)


def _finish(job: _Job, sae: Any, scale: float, history: History, n_left_out: int) -> FrozenSAE:
    """Save what a trained SAE is at inference, with its quality and the number of rows left out of the training."""
    after, inference = job.evaluate_training(sae, scale), job.inference(sae, scale)
    for name, field in FIGURES.items():
        setattr(inference.cfg.metadata, name, getattr(after, field))
    inference.save_model(job.folder.path)
    job.folder.finish({"after": asdict(after), "n_left_out": n_left_out, "history": history})
    return FrozenSAE.load(job.folder.path, device=job.held_out.device)


def _trainer(config: SAETrainingConfig, sae: Any) -> Any:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    schedule = SAETrainerConfig(
        total_training_samples=config.n_steps * config.batch_size,
        train_batch_size_samples=config.batch_size,
        lr=config.lr,
        lr_end=config.lr,
        lr_warm_up_steps=config.n_steps // 20,
        lr_decay_steps=config.n_steps // 5,
        dead_feature_window=config.dead_feature_window,
        device=str(sae.device),
    )
    # `step` gets the rows, one batch at a time.
    return SAETrainer(schedule, sae, iter(()))


def _report(trainer: Any, output: Any) -> dict[str, float]:
    """Return the numbers of the latest batch, in the units of the training."""
    log = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
    return {
        "tokens": trainer.n_training_samples,
        "loss": log["losses/overall_loss"],
        "explained_variance": log["metrics/explained_variance"],
        "l0": log["metrics/l0"],
        "dead": log["sparsity/dead_features"],
    }
