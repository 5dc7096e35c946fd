"""The steps of SAE trainings that are read from one stream, from their beginnings or checkpoints to what they save."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, StrictFloat
from torch import Tensor
from tqdm import tqdm

from dspa.errors import TrainingError
from dspa.outputs import workspace
from dspa.saes.activations import Activations, Position
from dspa.saes.batchtopk import begin_at_data, begin_threshold, jumprelu, new_sae, started_sae
from dspa.saes.checkpoints import restore_checkpoint, save_checkpoint
from dspa.saes.config import MAX_NORM_RATIO, SAETrainingConfig
from dspa.saes.formats.saelens import FIGURES
from dspa.saes.frozen import FrozenSAE
from dspa.saes.outliers import typical_rows
from dspa.saes.quality import Quality, evaluate_sae
from dspa.saes.records import Beginning, read_record
from dspa.schemas import Accepts, PositiveInt, check
from dspa.training_folder import History, TrainingFolder

# Entries in the history of a training.
REPORTS = 100


def check_k(k: float, d_sae: int, advice: str = "") -> None:
    """Raise `TrainingError` unless `k` of `d_sae` latents can be active."""
    check(PositiveInt, d_sae, TrainingError, "`d_sae`")
    number: Any = Annotated[StrictFloat, Field(ge=1, le=d_sae), Accepts(f"1 to d_sae = {d_sae}")]
    check(number, k, TrainingError, "`k`", advice)


@dataclass(frozen=True)
class Job:
    """The training of one layer's SAE, checked and about to begin.

    Attributes:
        config: settings, none of which is left to a default rule.
        folder: the folder, claimed.
        layer: the decoder layer.
        held_out: residuals to report on [N, d_in], those of outlying norm among them.
        d_sae: number of latents.
        k: active latents per token; None for as many as `start` has.
        start: the SAE to continue, in fp32, or None for a new one.
        metadata: metadata of the saved SAE.
    """

    config: SAETrainingConfig
    folder: TrainingFolder
    layer: int
    held_out: Tensor
    d_sae: int
    k: float | None
    start: FrozenSAE | None
    metadata: dict[str, Any]

    def read(self, rows: Tensor) -> Tensor:
        """Return what the SAE encodes of residuals [N, d_in], fp32."""
        return self.start.normalise(rows) if self.start else rows.float()

    def new_sae(self, k: float, scale: float) -> Any:
        """Return the training SAE before its first step, without what its first batches decide."""
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
        """Return the quality of an SAE on the held-out residuals, without outliers even if it is trained on them."""
        return evaluate_sae(sae, self.held_out, max_norm_ratio=self.config.max_norm_ratio or MAX_NORM_RATIO)

    def inference(self, sae: Any, scale: float) -> Any:
        """Return a training SAE as SAELens saves it."""
        return jumprelu(sae, scale=scale, normalize_activations=self.start.weights.normalize if self.start else "none")

    def evaluate_training(self, sae: Any, scale: float) -> Quality:
        """Return the quality of a training SAE, at inference."""
        return self.evaluate(FrozenSAE.from_sae_lens(self.inference(sae, scale)).to(self.held_out.device))


class Training:
    """A job on its way, from its beginning or its newest checkpoint.

    Attributes:
        position: place in the stream after the last step; None before the first one.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.position: Position | None = None
        self.history: History = []
        self._first: list[tuple[Position, Tensor]] = []
        self._trainer: Any = None
        if begun := read_record(job.folder).begun:
            self._begun = begun
            self._trainer = _trainer(job.config, job.new_sae(self._begun.k, self._begun.scale))
            self.position, self.history = restore_checkpoint(job.folder, self._trainer)
        elif job.folder.checkpoints():
            raise TrainingError(
                f"{job.folder.path} holds a checkpoint of an earlier version, which did not record how the training "
                "began. Delete it, then the training begins again, or name another folder."
            )

    @property
    def n_steps_left(self) -> int:
        """Steps until the end."""
        return self.job.config.n_steps - (self._trainer.n_training_steps if self._trainer else 0)

    def take(self, position: Position, rows: Tensor) -> Iterator[dict[str, float] | None]:
        """Take the next batch [batch_size, d_in], and yield after every step the latest report, None before the first.

        The first batches are kept until there are enough of them to begin with, and then taken one after the other.
        """
        self._first.append((position, rows))
        if self._trainer is None and len(self._first) < self.job.config.n_first_batches:
            return
        first, self._first = self._first, []
        if self._trainer is None:
            self._begin([rows for _, rows in first])
        for position, rows in first[: self.n_steps_left]:
            self._step(position, rows)
            yield self.history[-1] if self.history else None

    def _begin(self, first: list[Tensor]) -> None:
        """Make the SAE before its first step, by its first batches [batch_size, d_in]."""
        job, sample = self.job, torch.cat(first)
        k = job.k
        if k is None:
            assert job.start is not None
            # Outliers have left the batches already.
            k = evaluate_sae(job.start, sample, max_norm_ratio=0).l0
            check_k(k, job.d_sae, "It is the L0 of `sae` on these tokens: is it the SAE of this layer? Or pass `k`.")
        scale = float(sample.shape[1] ** 0.5 / job.read(sample).norm(dim=-1).mean())
        sae = job.new_sae(k, scale)
        if job.start is None:
            # Also where outliers are trained on, which would move the mean away from all other rows.
            begin_at_data(sae, sample[typical_rows(sample, MAX_NORM_RATIO)] * scale, job.config.seed)
        begin_threshold(sae, job.read(first[0]) * scale)
        before = job.evaluate(job.start) if job.start else job.evaluate_training(sae, scale)
        self._begun, self._trainer = Beginning(k, scale, before), _trainer(job.config, sae)
        self._trainer.activation_scaler.scaling_factor = scale
        job.folder.write(job.folder.read() | asdict(self._begun))

    def _step(self, position: Position, rows: Tensor) -> None:
        trainer, config = self._trainer, self.job.config
        output = trainer.step(self.job.read(rows))
        trainer.n_training_steps += 1
        self.position = position
        if trainer.n_training_steps % max(1, config.n_steps // REPORTS) == 0:
            self.history.append(_report(trainer, output))
        if trainer.n_training_steps % config.checkpoint_every == 0:
            save_checkpoint(self.job.folder, trainer, position, self.history)

    def finish(self) -> FrozenSAE:
        """Save what the SAE is at inference, with its quality and what the training left out and left dead."""
        job, sae, scale = self.job, self._trainer.sae, self._begun.scale
        after, inference = job.evaluate_training(sae, scale), job.inference(sae, scale)
        for name, field in FIGURES.items():
            setattr(inference.cfg.metadata, name, getattr(after, field))
        # Both files are made in a workspace: safetensors writes through a name of its own, which a kill would leave.
        with workspace(job.folder.path) as made:
            for file in inference.save_model(made / "sae"):
                os.replace(file, job.folder.path / file.name)
        n_dead, n_steps = _dead(self._trainer)
        results = {
            "after": asdict(after),
            "n_left_out": self.position.n_left_out if self.position else 0,
            "dead_training": n_dead,
            "dead_window_tokens": n_steps * job.config.batch_size,
            "history": self.history,
        }
        job.folder.finish(results)
        return FrozenSAE.load(job.folder.path, device=job.held_out.device)


def fit(jobs: Sequence[Job], activations: Activations, n_held_out: int, progress: bool) -> list[FrozenSAE]:
    """Train the SAEs of jobs, in one pass over the text, and return them. They share their settings.

    Args:
        jobs: the trainings, one per layer.
        activations: residuals of their layers.
        n_held_out: entries at the start of the file that are held out.
        progress: show a bar.
    """
    config, trainings = jobs[0].config, {job.layer: Training(job) for job in jobs}
    stream = activations.batches(
        n_held_out,
        config.batch_size,
        min(config.buffer_tokens, config.n_tokens),
        config.seed,
        {layer: training.position for layer, training in trainings.items()},
    )
    total, left = config.n_steps * len(jobs), sum(training.n_steps_left for training in trainings.values())
    shown = {"unit": "token", "unit_scale": True, "disable": not progress, "desc": "train"}
    with tqdm(total=total * config.batch_size, initial=(total - left) * config.batch_size, **shown) as bar:
        while any(training.n_steps_left for training in trainings.values()):
            layer, position, rows = next(stream)
            for report in trainings[layer].take(position, rows):
                bar.update(len(rows))
                if report:
                    where = {"layer": layer} if len(jobs) > 1 else {}
                    figures = {name: f"{value:.4g}" for name, value in report.items() if name != "tokens"}
                    bar.set_postfix(where | figures)
    return [training.finish() for training in trainings.values()]


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
        "dead": _dead(trainer)[0],
    }


def _dead(trainer: Any) -> tuple[int, int]:
    """Return the number of latents that were silent in the last steps, and the number of these steps.

    They are the last `dead_feature_window`, or all that were taken so far.
    """
    n_steps = min(trainer.cfg.dead_feature_window, trainer.n_training_steps)
    return int((trainer.n_forward_passes_since_fired >= n_steps).sum()), n_steps
