"""TRL's trainers for SimPO and DPO, training an adapter alone. Importing this needs the extra `train`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl import DPOConfig, DPOTrainer
from trl.experimental.utils import DPODataCollatorWithPadding
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dspa.errors import ModelError
from dspa.fsrl.adapter import FSRLAdapter, Moves
from dspa.fsrl.config import TrainingConfig
from dspa.models.layers import NOT_FINITE
from dspa.training_folder import TrainingFolder

with warnings.catch_warnings():
    # That its interface may change; the extra `train` names the versions that this was written for.
    warnings.filterwarnings("ignore", message=".*trl.experimental")
    from trl.experimental.cpo import CPOConfig, CPOTrainer

# The settings of the trainers that are not asked for.
SETTINGS = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "lr_scheduler_type": "cosine",
    # The model computes in the dtype that it has, and the adapter is kept in fp32: nothing is cast automatically.
    "bf16": False,
    # Switched on where the model is lent: TRL would also have the embeddings require gradients, and so all layers
    # below the adapter's be run backward.
    "gradient_checkpointing": False,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "ddp_find_unused_parameters": False,
    "remove_unused_columns": False,
    "dataloader_drop_last": True,
    "dataloader_pin_memory": False,
    "logging_nan_inf_filter": False,
    "disable_tqdm": True,
}


class Rows(Dataset):  # type: ignore[misc]
    """Triples as token ids, which TRL need not tokenise: `prompt_ids`, `chosen_ids`, `rejected_ids`."""

    def map(self, *_args: Any, **_kwargs: Any) -> Rows:
        """Itself."""
        return self


class AdapterTrainer:
    """What training an adapter changes in a trainer: the L1 term, what is logged, what a checkpoint holds."""

    args: Any
    accelerator: Any
    state: Any

    def __init__(self, adapter: FSRLAdapter, folder: TrainingFolder, **options: Any) -> None:
        self.adapter, self.folder = adapter, folder
        super().__init__(**options)

    def penalised(self, loss: Tensor, moves: Moves, response: Tensor) -> tuple[Tensor, dict[str, float]]:
        """`loss + lambda mean sum_j |v_j|`, and what to log of it, over all processes.

        The mean is over the response tokens of this micro-batch, each at its own position, where `response` [B, T] is
        True; padding and prompts do not count, nor does the last token of a prompt, from which a response begins.
        """
        response = response.to(moves.l1[0].device)
        l1, l0 = ((each[0] * response).sum() / response.sum() for each in (moves.l1, moves.l0))
        total = loss + self.adapter.config.l1 * l1.to(loss.device)
        if not math.isfinite(total.item()):
            raise ModelError(f"The loss of a batch is {total.item()}. {NOT_FINITE} Or lower the learning rate.")
        logged = {"preference_loss": loss, "l1": l1, "l0": l0}
        return total, {name: self._over_processes(value) for name, value in logged.items()}

    def _over_processes(self, value: Tensor) -> float:
        return float(self.accelerator.gather(value.detach()).mean())

    def floating_point_ops(self, _inputs: Any) -> int:
        """Not counted: it takes a pass over all parameters of the model every time."""
        return 0

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        """None: a checkpoint holds no model."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            self.adapter.save(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            step = self.state.global_step
            self.folder.keep(Path(self.args.output_dir) / f"checkpoint-{step}", step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = FSRLAdapter.load(resume_from_checkpoint, self.adapter.sae)
        self.adapter.load_state_dict(saved.state_dict())


class AdapterSimPOTrainer(AdapterTrainer, CPOTrainer):  # type: ignore[misc]
    """SimPO (arXiv 2405.14734) as TRL's CPOTrainer has it."""

    # What TRL would add to a list of the model.
    _tag_names: list[str] = []  # noqa: RUF012

    @staticmethod
    def collator(padding: int) -> Any:
        """Makes batches of rows."""
        pad = DPODataCollatorWithPadding(pad_token_id=padding)
        return lambda rows: pad([_labelled(row) for row in rows])

    @staticmethod
    def get_batch_logps(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Log-probabilities, in fp32 for a 16-bit model too: SimPO multiplies their difference by 10."""
        found: Tensor = CPOTrainer.get_batch_logps(logits.float(), labels, **options)
        return found

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: str = "train") -> tuple[Tensor, Any]:
        """The loss with its penalty, and what is logged."""
        with self.adapter.recording() as moves:
            loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
        response = self.concatenated_inputs(batch)["concatenated_labels"] != -100
        loss, logged = self.penalised(loss, moves, response)
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, metrics | {f"{prefix}{name}": value for name, value in logged.items()}


class AdapterDPOTrainer(AdapterTrainer, DPOTrainer):  # type: ignore[misc]
    """DPO as TRL's DPOTrainer has it. The reference is the model itself without the adapter, not a copy of it."""

    _tag_names: list[str] = []  # noqa: RUF012

    @staticmethod
    def collator(padding: int) -> Any:
        """Makes batches of rows."""
        return DataCollatorForPreference(pad_token_id=padding)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss with its penalty."""
        chosen, rejected = self.compute_ref_log_probs(self.model, inputs)
        inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        with self.adapter.recording() as moves:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, logged = self.penalised(loss, moves, inputs["completion_mask"])
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in logged.items():
            metrics[name].append(value)
        # Counted from 0 again where a training goes on.
        metrics.pop("num_tokens", None)
        return loss

    @torch.no_grad()
    def compute_ref_log_probs(self, model: Any, inputs: Any) -> tuple[Tensor, ...]:
        """Of the chosen and of the rejected responses, [B] each. TRL's own would switch gradient checkpointing off and
        on again, and with it what is backward below the adapter."""
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with self.adapter.disabled():
            found = model(**tokens, labels=labels, use_cache=False, fused_lm_head=True).log_probs
        return tuple(found.sum(dim=1).chunk(2))

    def _prepare_dataset(self, dataset: Any, *_args: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_args: Any) -> Any:
        """Nothing, which `compute_loss` does batch by batch. TRL is told that this was done, and so loads no model."""
        return dataset


def _labelled(row: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """A row as CPOTrainer's collator wants it."""
    found, prompt = {}, row["prompt_ids"]
    for name in ("chosen", "rejected"):
        ids = prompt + row[f"{name}_ids"]
        found[f"{name}_input_ids"], found[f"{name}_attention_mask"] = ids, [1] * len(ids)
        found[f"{name}_labels"] = [-100] * len(prompt) + row[f"{name}_ids"]
    return found


class Steps(TrainerCallback):
    """What is done at every step of the optimizer."""

    def __init__(self, adapter: FSRLAdapter, bar: tqdm[Any]) -> None:
        self.adapter, self.bar = adapter, bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show how far a training came before it was stopped."""
        self.bar.reset(state.max_steps)
        self.bar.update(state.global_step)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Thresholds are not negative: one that was would get no gradient, and stay where it is."""
        if self.adapter.config.activation == "soft_threshold":
            self.adapter.threshold.clamp_(min=0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log before a checkpoint: what is logged is a mean since the last time, which a checkpoint does not hold."""
        self.bar.update()
        control.should_log = control.should_log or control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show how it goes."""
        names = {"loss": "loss", "rewards/accuracies": "accuracy", "l0": "L0", "l1": "L1"}
        shown = {label: f"{logs[name]:.4g}" for name, label in names.items() if name in (logs or {})}
        if shown:
            self.bar.set_postfix(shown)


def without_times(history: Iterable[Mapping[str, float]]) -> list[dict[str, float]]:
    """What was logged, less what differs from run to run and what TRL writes of a whole training at its end."""
    kept = [entry for entry in history if "train_runtime" not in entry]
    return [{k: v for k, v in entry.items() if not k.endswith(("_runtime", "_per_second", "_time"))} for entry in kept]


def whole_history(checkpoint: Path) -> list[dict[str, float]] | None:
    """What was logged up to a checkpoint of the last step, from which a trainer would make one step more; None for
    another."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return without_times(state.log_history) if state.global_step >= state.max_steps else None


@contextmanager
def old_names() -> Iterator[None]:
    """Say nothing of names that transformers has changed and TRL has not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing.* is deprecated")
        yield


def arguments(config: TrainingConfig, out: Path, *, on_cpu: bool, evaluated: bool) -> Any:
    """TRL's settings. Making them joins the processes of a launcher."""
    rates = {
        "learning_rate": config.lr,
        "warmup_steps": config.warmup,
        "per_device_train_batch_size": config.micro_batch_size,
        "per_device_eval_batch_size": config.micro_batch_size,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "logging_steps": config.log_every,
        "save_strategy": "steps",
        "save_steps": config.checkpoint_every,
        "eval_strategy": "steps" if evaluated else "no",
        "eval_steps": config.eval_every,
        "report_to": config.report_to,
        "use_cpu": on_cpu,
        "output_dir": str(out),
    }
    beta, length = config.preference_beta, config.max_length
    with old_names():
        if config.loss == "dpo":
            return DPOConfig(**SETTINGS, **rates, beta=beta, max_length=None, precompute_ref_log_probs=True)
        # What TRL calls gamma is not its ratio to beta.
        simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": config.gamma_beta_ratio * beta}
        return CPOConfig(**SETTINGS, **rates, beta=beta, max_length=length, **simpo)


def trainer_of(
    config: TrainingConfig,
    args: Any,
    model: Any,
    tokenizer: Any,
    adapter: FSRLAdapter,
    folder: TrainingFolder,
    bar: tqdm[Any],
    **data: Any,
) -> Any:
    """The trainer of the configured loss. `data` are its `train_dataset` and `eval_dataset`."""
    kind = AdapterDPOTrainer if config.loss == "dpo" else AdapterSimPOTrainer
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    trainer = kind(
        adapter,
        folder,
        model=model,
        args=args,
        processing_class=tokenizer,
        data_collator=kind.collator(padding),
        callbacks=[Steps(adapter, bar)],
        **data,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
