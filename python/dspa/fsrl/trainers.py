"""TRL's trainers for SimPO and DPO, made to train an adapter alone. Importing this needs the extra `train`."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm import tqdm
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer
from trl.experimental.utils import DPODataCollatorWithPadding
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dspa import resuming
from dspa.evaluate.responses import Response
from dspa.evaluate.scores import Scores
from dspa.fsrl.adapter import FSRLAdapter, Moves
from dspa.fsrl.config import TrainingConfig
from dspa.fsrl.lending import MODULE
from dspa.fsrl.progress import Steps
from dspa.fsrl.results import score_moves
from dspa.models.operations import Cost, forward, with_backward
from dspa.models.sizes import ModelSizes
from dspa.resuming import Resumable, check_loss, deprecations_silenced, row_lengths
from dspa.saes.placement import required_layer
from dspa.training_folder import TrainingFolder, reading_checkpoint

with warnings.catch_warnings():
    # The warning says that the interface may change. The extra `train` names the versions that this was written for.
    warnings.filterwarnings("ignore", message=".*trl.experimental")
    from trl.experimental.cpo import CPOConfig, CPOTrainer

# Settings of the trainers that the user does not choose.
SETTINGS = resuming.SETTINGS | {
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "lr_scheduler_type": "cosine",
    # `trainable` switches it on. TRL would also make the embeddings require gradients, and so run all layers below the
    # adapter's backward.
    "gradient_checkpointing": False,
    "ddp_find_unused_parameters": False,
}


class AdapterTrainer(Resumable):
    """Changes to a trainer of an adapter: the L1 term, the evaluation, what is logged, and what a checkpoint holds."""

    model: Any
    control: Any
    callback_handler: Any
    eval_dataset: Any
    log: Callable[[dict[str, float]], None]
    beta: float

    def __init__(
        self,
        adapter: FSRLAdapter,
        folder: TrainingFolder,
        sizes: ModelSizes,
        *,
        recomputes: bool,
        progress: bool,
        **options: Any,
    ) -> None:
        self.adapter, self.folder, self.progress = adapter, folder, progress
        self.sizes, self.recomputes = sizes, recomputes
        super().__init__(**options)
        self.model.add_module(MODULE, adapter)

    def penalised(self, loss: Tensor, moves: Moves, response: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Return `loss + lambda mean sum_j |v_j|`, and what to log, as means over all processes.

        The mean is over the response tokens of this micro-batch, each at its own position. Padding and prompts do not
        count, nor does the last token of a prompt, which predicts the first response token.

        Args:
            loss: preference loss, a scalar.
            moves: the recorded movement of one pass.
            response: [B, T] bool, True for response tokens.

        Raises:
            ModelError: a loss that is not finite.
        """
        response = response.to(moves.l1[0].device)
        l1, l0 = ((passes[0] * response).sum() / response.sum() for passes in (moves.l1, moves.l0))
        total = loss + self.adapter.config.l1 * l1.to(loss.device)
        check_loss(total)
        logged = {"preference_loss": loss, "l1": l1, "l0": l0}
        return total, {name: self._mean_over_processes(value) for name, value in logged.items()}

    def adapted_pass(self, lengths: list[int], n_logits: int) -> Cost:
        """Return the operations of a pass forward and, above the adapter, backward.

        Args:
            lengths: tokens of each row.
            n_logits: number of tokens whose logits are computed.
        """
        sae = self.adapter.sae
        below, above = slice(required_layer(sae) + 1), slice(required_layer(sae) + 1, None)
        cost = forward(self.sizes, lengths, layers=below)
        cost += with_backward(forward(self.sizes, lengths, layers=above, n_logits=n_logits), frozen=True)
        if self.recomputes:
            cost += forward(self.sizes, lengths, layers=above)
        # f, v and their decoding, and on the way back the gradients of v and of W_a.
        return cost + Cost(5 * 2 * sae.d_in * sae.d_sae * sum(lengths))

    @abstractmethod
    def rewards(self, responses: Sequence[Response], logps: Tensor) -> Tensor:
        """Return the rewards of responses, [R], from their mean log-probabilities per token, [R], with the adapter."""

    @abstractmethod
    def losses(self, margins: Tensor) -> Tensor:
        """Return the preference losses of triples, [N], from the margins of their rewards, [N]."""

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Measure the adapter on the held-out triples, and log the figures with the prefix eval_.

        They are means over all triples, L0 and L1 over all response tokens. TRL would take a mean over batches, which
        have to be of one size in all processes.
        """
        self.model.eval()
        rewards, n_tokens, l0, l1 = self._measure_held_out().T
        chosen, rejected = rewards[0::2], rewards[1::2]
        figures = {
            "preference_loss": self.losses(chosen - rejected).mean(),
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/accuracies": (chosen > rejected).double().mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "l0": l0.sum() / n_tokens.sum(),
            "l1": l1.sum() / n_tokens.sum(),
        }
        figures["loss"] = figures["preference_loss"] + self.adapter.config.l1 * figures["l1"]
        metrics = {f"eval_{name}": float(value) for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure_held_out(self) -> Tensor:
        """Return reward, number of tokens, L0 and L1 of each held-out response, [R, 4] fp64: chosen, rejected, ...

        The processes share the triples out.
        """
        own = range(self.args.process_index, len(self.eval_dataset), self.args.world_size)
        rows = [self.eval_dataset[number] for number in own]
        responses = [Response(row["prompt_ids"], row[f"{name}_ids"]) for row in rows for name in ("chosen", "rejected")]
        scores, moved = score_moves(self.model, responses, self.adapter, progress=self.progress)
        columns = self.rewards(responses, _by_response(scores)), _lengths(responses), *moved.T
        table = torch.stack([column.double() for column in columns], dim=1)
        return torch.tensor(gather_object(table.tolist()), dtype=torch.float64)

    def _mean_over_processes(self, value: Tensor) -> float:
        return float(self.accelerator.gather(value.detach()).mean())

    def _send_telemetry(self) -> None:
        """Send nothing. TRL would report the class and the model, unless an environment variable prevents it."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            self.adapter.save(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading_checkpoint(Path(resume_from_checkpoint)):
            saved = FSRLAdapter.load(resume_from_checkpoint, self.adapter.sae)
        self.adapter.load_state_dict(saved.state_dict())


class AdapterSimPOTrainer(AdapterTrainer, CPOTrainer):  # type: ignore[misc]
    """SimPO (arXiv 2405.14734) by TRL's CPOTrainer."""

    simpo_gamma: float
    # TRL would add these tags to the model.
    _tag_names: list[str] = []  # noqa: RUF012

    @staticmethod
    def collator(padding: int) -> Any:
        """Return the function that makes a batch of rows."""
        pad = DPODataCollatorWithPadding(pad_token_id=padding)
        return lambda rows: pad([_labelled(row) for row in rows])

    def operations(self, inputs: Mapping[str, Tensor]) -> Cost:
        """Return those of a pass over both responses, with all logits."""
        lengths = row_lengths(inputs["chosen_attention_mask"], inputs["rejected_attention_mask"])
        return self.adapted_pass(lengths, sum(lengths))

    @staticmethod
    def get_batch_logps(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Return log-probabilities in fp32, for a 16-bit model too: SimPO multiplies their difference by 10."""
        logps: Tensor = CPOTrainer.get_batch_logps(logits.float(), labels, **options)
        return logps

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: str = "train") -> tuple[Tensor, Any]:
        """Return the loss with its penalty, and what is logged."""
        with self.adapter.recording() as moves:
            loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
        response = self.concatenated_inputs(batch)["concatenated_labels"] != -100
        loss, logged = self.penalised(loss, moves, response)
        return loss, metrics | logged

    def rewards(self, responses: Sequence[Response], logps: Tensor) -> Tensor:
        """Return beta times the mean log-probabilities."""
        return self.beta * logps

    def losses(self, margins: Tensor) -> Tensor:
        """Return `-log sigmoid(margin - gamma)`."""
        return softplus(self.simpo_gamma - margins)


class NoReference(nn.Module):
    """The reference model that TRL is given. It is never run: `compute_loss` runs the model without its adapter.

    TRL hashes all weights of the reference, which takes long for a large model and fails for a quantised one.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config


class AdapterDPOTrainer(AdapterTrainer, DPOTrainer):  # type: ignore[misc]
    """DPO by TRL's DPOTrainer. The reference is the same model without the adapter, not a copy of it."""

    _tag_names: list[str] = []  # noqa: RUF012

    def __init__(self, *args: Any, model: Any, **options: Any) -> None:
        super().__init__(*args, model=model, ref_model=NoReference(model), **options)

    @staticmethod
    def collator(padding: int) -> Any:
        """Return the function that makes a batch of rows."""
        return DataCollatorForPreference(pad_token_id=padding)

    def operations(self, inputs: Mapping[str, Tensor]) -> Cost:
        """Return those of a pass and of the reference's, with the logits that predict responses."""
        lengths, n_logits = row_lengths(inputs["attention_mask"]), int(inputs["completion_mask"].sum())
        return self.adapted_pass(lengths, n_logits) + forward(self.sizes, lengths, n_logits=n_logits)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the loss with its penalty."""
        chosen, rejected = self.compute_ref_log_probs(self.model, inputs)
        inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        with self.adapter.recording() as moves:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, logged = self.penalised(loss, moves, inputs["completion_mask"])
        metrics = self._metrics["train"]
        for name, value in logged.items():
            metrics[name].append(value)
        # TRL counts from 0 again when a training is resumed.
        metrics.pop("num_tokens", None)
        return loss

    def rewards(self, responses: Sequence[Response], logps: Tensor) -> Tensor:
        """Return beta times the difference to the reference's log-probabilities of whole responses."""
        with self.adapter.disabled():
            reference, _ = score_moves(self.model, responses, None, progress=self.progress)
        return self.beta * _lengths(responses) * (logps - _by_response(reference))

    def losses(self, margins: Tensor) -> Tensor:
        """Return `-log sigmoid(margin)`."""
        return softplus(-margins)

    @torch.no_grad()
    def compute_ref_log_probs(self, model: Any, inputs: Any) -> tuple[Tensor, ...]:
        """Return reference log-probabilities of the chosen and the rejected responses, [B] each.

        TRL's method would switch gradient checkpointing off and on again, and then run layers below the adapter
        backward.
        """
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with self.adapter.disabled():
            logps = model(**tokens, labels=labels, use_cache=False, fused_lm_head=True).log_probs
        return tuple(logps.sum(dim=1).chunk(2))

    def _prepare_dataset(self, dataset: Any, *_args: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_args: Any) -> Any:
        """Do nothing: `compute_loss` does it per batch. Since TRL believes it done, it loads no reference model."""
        return dataset


def _by_response(scores: Scores) -> Tensor:
    """Return the scores of N triples as [2 N]: chosen and rejected in turn."""
    return torch.stack([scores.chosen, scores.rejected], dim=1).flatten()


def _lengths(responses: Sequence[Response]) -> Tensor:
    return torch.tensor([len(response.ids) for response in responses])


def _labelled(row: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Return a row in the form of CPOTrainer's collator."""
    columns, prompt = {}, row["prompt_ids"]
    for name in ("chosen", "rejected"):
        ids = prompt + row[f"{name}_ids"]
        columns[f"{name}_input_ids"], columns[f"{name}_attention_mask"] = ids, [1] * len(ids)
        columns[f"{name}_labels"] = [-100] * len(prompt) + row[f"{name}_ids"]
    return columns


def arguments(config: TrainingConfig, out: Path, *, on_cpu: bool, evaluated: bool) -> Any:
    """Return TRL's settings. Making them joins the processes of a launcher."""
    rates = {
        "learning_rate": config.lr,
        "warmup_steps": config.warmup,
        "per_device_train_batch_size": config.micro_batch_size,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "logging_steps": config.log_every,
        "save_steps": config.checkpoint_every,
        "eval_strategy": "steps" if evaluated else "no",
        "eval_steps": config.eval_every,
        "report_to": config.report_to,
        "use_cpu": on_cpu,
        "output_dir": str(out),
    }
    beta, length = config.preference_beta, config.max_length
    with deprecations_silenced():
        if config.loss == "dpo":
            return DPOConfig(**SETTINGS, **rates, beta=beta, max_length=None, precompute_ref_log_probs=True)
        # TRL's gamma is not a ratio to beta.
        simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": config.gamma_beta_ratio * beta}
        return CPOConfig(**SETTINGS, **rates, beta=beta, max_length=length, **simpo)


def trainer_of(
    config: TrainingConfig,
    args: Any,
    model: Any,
    tokenizer: Any,
    adapter: FSRLAdapter,
    folder: TrainingFolder,
    sizes: ModelSizes,
    bar: tqdm[Any],
    **data: Any,
) -> Any:
    """Return the trainer of the configured loss. `data` are its `train_dataset` and `eval_dataset`."""
    kind = AdapterDPOTrainer if config.loss == "dpo" else AdapterSimPOTrainer
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    trainer = kind(
        adapter,
        folder,
        sizes,
        recomputes=config.gradient_checkpointing,
        progress=not bar.disable,
        model=model,
        args=args,
        processing_class=tokenizer,
        data_collator=kind.collator(padding),
        callbacks=[Steps(adapter, bar)],
        **data,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
