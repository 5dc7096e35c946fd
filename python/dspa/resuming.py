"""Checkpoints in a `TrainingFolder`, and joined processes, for trainings by transformers' Trainer."""

from __future__ import annotations

import json
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from typing_extensions import NotRequired, TypedDict

from dspa.costs import Costs, Measured, Meter
from dspa.data.triples import DigestedExamples
from dspa.distributed import warn_if_alone
from dspa.errors import ModelError, TrainingError, refusal
from dspa.models.layers import NOT_FINITE, CausalLM, device_of
from dspa.models.operations import Cost
from dspa.outputs import workspace, write_atomically
from dspa.schemas import AnyNumber, PositiveInt, check, read_json
from dspa.training_folder import History, TrainingFolder, check_step, reading_checkpoint

# Settings of the trainers that the user does not choose.
SETTINGS: dict[str, Any] = {
    # The model computes in its own dtype: nothing is cast automatically.
    "bf16": False,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "remove_unused_columns": False,
    "dataloader_drop_last": True,
    "dataloader_pin_memory": False,
    "logging_nan_inf_filter": False,
    "disable_tqdm": True,
    "save_strategy": "steps",
}
# File of a checkpoint with the `Measured` of its training so far; there is none in those of earlier versions.
MEASURED = "measured.json"
# Attributes with the probability of a dropout that is not a module.
DROPOUTS = ("attention_dropout", "activation_dropout", "dropout")


class Resumable(ABC):
    """Changes to a trainer that keeps its checkpoints in a `TrainingFolder`, with what the training cost so far."""

    args: Any
    state: Any
    accelerator: Any
    folder: TrainingFolder
    # None where it is not known what earlier runs took.
    meter: Meter | None

    @abstractmethod
    def operations(self, inputs: Mapping[str, Tensor]) -> Cost:
        """Return the operations of a step on a micro-batch, with its way back and without its padding."""

    def floating_point_ops(self, inputs: Mapping[str, Tensor]) -> int:
        """Return `operations`. transformers adds them up, over all processes and runs, as `state.total_flos`."""
        return round(self.operations(inputs).total)

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:  # noqa: B027
        """Write nothing, since a checkpoint holds no model of its own."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            step = self.state.global_step
            written = Path(self.args.output_dir) / f"checkpoint-{step}"
            if self.meter is not None:
                write_atomically(written / MEASURED, json.dumps(asdict(self.meter.measured())).encode())
            self.folder.keep(written, step)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading_checkpoint(Path(checkpoint or "")):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading_checkpoint(Path(checkpoint or "")):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]


def row_lengths(*masks: Tensor) -> list[int]:
    """Return the number of tokens of each row of attention masks [B, T]."""
    return [n for mask in masks for n in mask.sum(dim=1).tolist()]


class Steps(TrainerCallback):
    """Callback of every optimizer step, which moves a bar.

    Attributes:
        shown: labels in the bar of figures that are logged.
    """

    shown: Mapping[str, str] = {"loss": "loss"}

    def __init__(self, bar: tqdm[Any]) -> None:
        self.bar = bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show how far the training came before it was stopped."""
        self.bar.reset(state.max_steps)
        self.bar.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log before a checkpoint, which does not hold the sums of the means that are logged next."""
        self.bar.update()
        control.should_log = control.should_log or control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the figures that were logged last."""
        shown = {label: f"{logs[name]:.4g}" for name, label in self.shown.items() if name in (logs or {})}
        if shown:
            self.bar.set_postfix(shown)


# The entries of transformers' state of a training that are read here.
class _State(TypedDict):
    global_step: PositiveInt
    max_steps: PositiveInt
    log_history: History
    total_flos: NotRequired[AnyNumber]


def without_times(history: Iterable[Mapping[str, float]]) -> History:
    """Return what was logged without timings, and without the summary at the end of a training."""
    kept = [entry for entry in history if "train_runtime" not in entry]
    return [{k: v for k, v in entry.items() if not k.endswith(("_runtime", "_per_second", "_time"))} for entry in kept]


@dataclass(frozen=True)
class Trained:
    """Record of a training besides its weights.

    Attributes:
        history: what was logged.
        flops: its floating-point operations.
        measured: its time and memory, or None where a run of an earlier version took part, which did not measure them.
    """

    history: History
    flops: int
    measured: Measured | None

    def costs(
        self, method: str, examples: DigestedExamples, settings: Mapping[str, Any], trained_digest: str = ""
    ) -> dict[str, Any] | None:
        """Return the `Costs` for the folder's record, None where they are not known.

        Args:
            method: name of the method.
            examples: the triples or rankings, read to their end.
            settings: what the folder records of the model.
            trained_digest: as for `Costs`.
        """
        if self.measured is None:
            return None
        model = {name: settings.get(name, "") for name in ("model_name", "model_digest", "model_dtype")}
        data = (examples.digest, examples.n_examples)
        return asdict(Costs(method, self.flops, self.measured, *data, **model, trained_digest=trained_digest))


def measured_before(checkpoint: Path) -> Measured | None:
    """Return what a training took up to a checkpoint, None if that is not known.

    Raises:
        TrainingError: the checkpoint is damaged.
    """
    path = checkpoint / MEASURED
    if not path.exists():
        return None
    with reading_checkpoint(checkpoint):
        return check(Measured, read_json(path, TrainingError), TrainingError, "its costs")


def finished_before(checkpoint: Path) -> Trained | None:
    """Return what a training left at a checkpoint of its last step, or None for an earlier checkpoint.

    A trainer that resumed from the last step would make one step more.

    Raises:
        TrainingError: the checkpoint is damaged.
    """
    from transformers.trainer import TRAINER_STATE_NAME

    with reading_checkpoint(checkpoint):
        state = check(_State, read_json(checkpoint / TRAINER_STATE_NAME, TrainingError), TrainingError, "its state")
        check_step(checkpoint, state["global_step"], state["max_steps"])
    if state["global_step"] < state["max_steps"]:
        return None
    return Trained(without_times(state["log_history"]), round(state.get("total_flos", 0)), measured_before(checkpoint))


def fit(trainer: Any, checkpoint: Path | None, meter: Meter) -> Trained:
    """Let a `Resumable` trainer train to the end.

    Args:
        trainer: the trainer.
        checkpoint: where it continues, or None for the start.
        meter: of this run.

    Raises:
        TrainingError: the checkpoint is damaged.
    """
    trainer.meter = meter
    if checkpoint is not None:
        if earlier := measured_before(checkpoint):
            meter.add(earlier)
        else:
            trainer.meter = None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    measured = trainer.meter and trainer.meter.measured()
    return Trained(without_times(trainer.state.log_history), round(trainer.state.total_flos), measured)


def check_loss(loss: Tensor) -> None:
    """Raise `ModelError` for the loss of a batch that is not finite."""
    if not math.isfinite(loss.item()):
        raise ModelError(f"The loss of a batch is {loss.item()}. {NOT_FINITE} Or lower the learning rate.")


@contextmanager
def deprecations_silenced() -> Iterator[None]:
    """Silence warnings about names that transformers has changed, and its earlier versions and TRL have not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing.* is deprecated")
        yield


@contextmanager
def lent(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Lend a model and its tokenizer to a trainer within a `with` block, and give them back as they were.

    That holds for attributes of all modules (training mode, hooks, state of gradient checkpointing), configurations,
    which parameters require gradients, and the tokenizer's padding token. Weights stay as they were trained.

    Args:
        model: a transformers model, or a module that holds one, as a PEFT wrapper does.
        tokenizer: its tokenizer.
    """
    owners: list[object] = list(model.modules())
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            owners += [module.config, module.config.get_text_config(), getattr(module, "generation_config", None)]
    with ExitStack() as stack:
        stack.callback(setattr, tokenizer, "pad_token", tokenizer.pad_token)
        for owner in filter(None, {id(owner): owner for owner in owners}.values()):
            stack.enter_context(_attributes_kept(owner))
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
        yield


def remove_dropout(model: nn.Module) -> None:
    """Set the probability of each dropout that is not a module to 0. TRL does it for modules."""
    for module in model.modules():
        for name in DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@contextmanager
def _attributes_kept(owner: object) -> Iterator[None]:
    """Give `owner` its attributes back, and those that are dictionaries their contents."""
    before = dict(vars(owner))
    contents = [(value, dict(value)) for value in before.values() if isinstance(value, dict)]
    try:
        yield
    finally:
        vars(owner).clear()
        vars(owner).update(before)
        for value, content in contents:
            value.clear()
            value.update(content)


@contextmanager
def writing_checkpoints(args: Any, folder: TrainingFolder) -> Iterator[None]:
    """Let a trainer write checkpoints to a workspace of all processes; `TrainingFolder.keep` takes them from there."""
    from accelerate.utils import broadcast_object_list

    with workspace(folder.path) if args.process_index == 0 else nullcontext() as place:
        shared = [str(place)]
        broadcast_object_list(shared)
        args.output_dir = shared[0]
        yield


def check_processes(model: CausalLM, args: Any) -> None:
    """Check that all processes of a launcher train together, each on the device of its model.

    Args:
        model: the model.
        args: the trainer's settings. Making them joined the processes.

    Raises:
        TrainingError: other processes than the launcher asked for, or another device than the model's.
    """
    warn_if_alone()
    n_launched = int(os.environ.get("WORLD_SIZE", "1"))
    if n_launched != args.world_size:
        raise TrainingError(
            f"The launcher asked for {n_launched} processes and {args.world_size} train together. Start them with "
            "torchrun --nproc-per-node K -m dspa ..."
        )
    # A model that is split over GPUs is not moved, so its device need not match.
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) <= 1:
        _check_device(device_of(model.get_input_embeddings()), args)


def _check_device(device: torch.device, args: Any) -> None:
    """Check that the trainer will not copy the model to several GPUs or move it to another device.

    Raises:
        TrainingError: several GPUs, or another device than the model's.
    """
    if args.n_gpu > 1:
        advice = f"Set CUDA_VISIBLE_DEVICES, or start torchrun --nproc-per-node {args.n_gpu} -m dspa ..."
        raise refusal(TrainingError, "The number of GPUs that this process sees", args.n_gpu, "one per process", advice)
    if args.device.type != device.type or (device.index or 0) != (args.device.index or 0):
        raise TrainingError(f"The model is on {device} and this process trains on {args.device}. Move the model there.")
