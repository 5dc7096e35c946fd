"""Train an SAE for one layer of a model, or fine-tune one, with SAELens' trainer on streamed activations.

Both train a BatchTopK SAE and save what it is at inference: a JumpReLU SAE, in a SAELens folder. A training that was
stopped goes on from its last checkpoint to the result that it would have had.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.data.texts import TextFile
from dspa.errors import ModelError, TrainingError, refusal
from dspa.models.layers import base_model, check_eval, context_length, decoder_layers, loaded_name
from dspa.saes.activations import Activations, Position
from dspa.saes.batchtopk import begin_threshold, jumprelu, new_sae, started_sae
from dspa.saes.config import SAETrainingConfig
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
        progress: show a bar with loss, explained variance, L0 and dead latents of the latest reported batch.
        layers: dotted path of the list of decoder layers, for an unknown architecture.
        model_name: name of the model, if its own name or path does not give it.

    Raises:
        ModelError: no such layer, a model in training mode, or hidden states that are not finite.
        PreferenceError: a file of triples that cannot be used.
        RuntimeError: sae-lens is not installed.
        TextError: a file that cannot be used.
        TrainingError: an `out` with something else, or a `k` out of range.
    """
    _check_k(k, d_sae)
    job = _prepare(model, tokenizer, texts, layer, out, config, layers, model_name, d_sae=d_sae, k=k)
    sae = new_sae(job.held_out.shape[1], d_sae, k, seed=job.config.seed, **job.shared())
    return _fit(job, sae, None, progress)


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
    """
    if k is not None:
        _check_k(k, sae.d_sae)
    job = _prepare(
        model, tokenizer, texts, required_layer(sae), out, config, layers, model_name, d_sae=sae.d_sae, k=k, start=sae
    )
    start = sae.to(job.held_out.device, torch.float32)
    k = evaluate_sae(start, job.sample, max_norm_ratio=0).l0 if k is None else k
    _check_k(k, sae.d_sae, "It is the L0 of `sae` on these tokens: is it the SAE of this layer? Or pass k.")
    before = job.evaluate(start)
    return _fit(job, started_sae(start, k, scale=job.scale, **job.shared()), before, progress)


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
        sample: some of the residuals that are trained on [N, d_in].
        normalize: normalisation of the input at inference.
        read: function that gives what the SAE encodes of residuals [N, d_in], fp32.
        scale: factor to a mean norm of sqrt(d_in), at which a learning rate means the same for any model.
        metadata: metadata of the saved SAE.
    """

    config: SAETrainingConfig
    folder: TrainingFolder
    batches: Callable[[Position | None], Iterator[tuple[Position, Tensor]]]
    held_out: Tensor
    sample: Tensor
    normalize: str
    read: Callable[[Tensor], Tensor]
    scale: float
    metadata: dict[str, Any]

    def shared(self) -> dict[str, Any]:
        """Return the arguments that new and started SAEs share."""
        # The threshold is a running mean. A short training should not keep its beginning.
        return {"threshold_lr": min(1.0, max(0.01, 10 / self.config.n_steps)), "metadata": self.metadata}

    def frozen(self, sae: Any) -> FrozenSAE:
        """Return a training SAE as it is at inference."""
        return FrozenSAE.from_sae_lens(self.inference(sae)).to(self.held_out.device)

    def evaluate(self, sae: FrozenSAE) -> Quality:
        """Return the quality of an SAE on the held-out residuals."""
        return evaluate_sae(sae, self.held_out, max_norm_ratio=self.config.max_norm_ratio)

    def inference(self, sae: Any) -> Any:
        """Return a training SAE as SAELens saves it."""
        return jumprelu(sae, scale=self.scale, normalize_activations=self.normalize)


def _prepare(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: TextFile | str | Path,
    layer: int,
    out: str | Path,
    config: SAETrainingConfig | None,
    layers: str | None,
    model_name: str | None,
    *,
    d_sae: int,
    k: float | None,
    start: FrozenSAE | None = None,
) -> _Job:
    """Check the arguments, claim the folder, and read the first rows."""
    if find_spec("sae_lens") is None:
        raise RuntimeError('Training an SAE needs sae-lens: pip install "dspa-kernels[saelens]".')
    config, inner, folder = config or SAETrainingConfig(), base_model(model), TrainingFolder(Path(out))
    model_name = model_name or loaded_name(inner)
    _check_model(inner, layer, layers, start, model_name)
    folder.check()
    file = texts if isinstance(texts, TextFile) else TextFile(texts)
    max_length = min(config.max_length, context_length(inner) or config.max_length)
    settings = {
        "model_name": model_name,
        "model_dtype": str(inner.dtype),
        "layer": layer,
        "sae": start.fingerprint if start else None,
        "d_sae": d_sae,
        "k": k,
        "data": file.digest,
    }
    folder.claim({**settings, **asdict(config), "max_length": max_length}, earlier=EARLIER)
    activations = Activations(
        inner,
        tokenizer,
        file,
        layer,
        max_length=max_length,
        exclude_special_tokens=config.exclude_special_tokens,
        batch_tokens=config.batch_tokens,
        max_norm_ratio=config.max_norm_ratio,
        layers=layers,
    )
    held_out, n_held_out = activations.held_out(config.held_out_tokens)
    buffer_tokens = min(config.buffer_tokens, config.n_tokens)
    batches = functools.partial(activations.batches, n_held_out, config.batch_size, buffer_tokens, config.seed)
    n_sampled = max(1, config.held_out_tokens // config.batch_size)
    sample = torch.cat([rows for _, rows in islice(batches(None), n_sampled)])
    read = start.to(sample.device, torch.float32).normalise if start else Tensor.float
    metadata = {
        "model_name": model_name or None,
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "context_size": max_length,
        "prepend_bos": tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id],
        "exclude_special_tokens": config.exclude_special_tokens,
        "max_norm_ratio": config.max_norm_ratio,
        "dataset_path": file.path.name,
    }
    if start and start.centered:
        metadata[LOADED_WITH] = {CENTERED: True}
    return _Job(
        config=config,
        folder=folder,
        batches=batches,
        held_out=held_out,
        sample=sample,
        normalize=start.weights.normalize if start else "none",
        read=read,
        scale=float(sample.shape[1] ** 0.5 / read(sample).norm(dim=-1).mean()),
        metadata=metadata,
    )


def _check_model(model: nn.Module, layer: int, layers: str | None, start: FrozenSAE | None, model_name: str) -> None:
    check_eval(model)
    n_layers = len(decoder_layers(model, layers))
    if not 0 <= layer < n_layers:
        raise refusal(ModelError, "`layer`", repr(layer), f"0 to {n_layers - 1}, the model's layers")
    if start is not None:
        check_made_for("sae", start, model, model_name)


def _fit(job: _Job, sae: Any, before: Quality | None, progress: bool) -> FrozenSAE:
    """Train `sae` from its start or its checkpoint, and save what it is at inference."""
    config, total = job.config, job.config.n_steps * job.config.batch_size
    sae.to(job.held_out.device)
    begin_threshold(sae, job.read(job.sample[: config.batch_size]) * job.scale)
    before = before or job.evaluate(job.frozen(sae))
    trainer = _trainer(config, sae)
    trainer.activation_scaler.scaling_factor = job.scale
    position, history = restore_checkpoint(job.folder, trainer)
    batches = job.batches(position)
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
    return _finish(job, sae, before, history, position.n_left_out if position else 0)


def _finish(job: _Job, sae: Any, before: Quality, history: History, n_left_out: int) -> FrozenSAE:
    """Save what a trained SAE is at inference, with its quality and the number of rows left out of the training."""
    after, inference = job.evaluate(job.frozen(sae)), job.inference(sae)
    metadata = inference.cfg.metadata
    metadata.explained_variance, metadata.l0, metadata.num_dead_features = (
        after.explained_variance,
        after.l0,
        after.dead,
    )
    inference.save_model(job.folder.path)
    job.folder.finish({"before": asdict(before), "after": asdict(after), "n_left_out": n_left_out, "history": history})
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


def save_checkpoint(folder: TrainingFolder, trainer: Any, position: Position, history: History) -> None:
    """Save the state of an `SAETrainer`, its place in the stream and its history, in place of the checkpoint before."""
    partial = folder.partial
    shutil.rmtree(partial, ignore_errors=True)
    trainer.save_trainer_state(partial)
    save_file(trainer.sae.state_dict(), partial / "sae.safetensors")
    stream = {"position": asdict(position), "history": history}
    (partial / "stream.json").write_text(json.dumps(stream), encoding="utf-8")
    folder.keep(partial, trainer.n_training_steps)


def restore_checkpoint(folder: TrainingFolder, trainer: Any) -> tuple[Position | None, History]:
    """Set `trainer` back to the newest checkpoint, if there is one. Returns its place in the stream and its history.

    Raises:
        TrainingError: a damaged checkpoint.
    """
    checkpoints = folder.checkpoints()
    if not checkpoints:
        return None, []
    newest = checkpoints[-1]
    try:
        # SAELens reads its state with torch.load's default, weights_only.
        trainer.load_trainer_state(newest)
        trainer.sae.load_state_dict(load_file(newest / "sae.safetensors"))
        stream = json.loads((newest / "stream.json").read_text(encoding="utf-8"))
        return Position(**stream["position"]), stream["history"]
    # Each of the three formats has its own errors, and torch's would advise to unpickle what is not trusted.
    except Exception as error:
        raise TrainingError(
            f"The checkpoint {newest} is damaged ({type(error).__name__}). Delete it, then the training begins again."
        ) from error
