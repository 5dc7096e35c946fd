"""TRL's trainers made to train an adapter alone, by SimPO, DPO or PRO. Importing this needs the extra `train`."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from dspa.fsrl.adapter import FSRLAdapter, Moves
from dspa.fsrl.config import TrainingConfig
from dspa.fsrl.lending import MODULE
from dspa.fsrl.progress import Steps
from dspa.fsrl.ranking import Order, order_of, pro_loss, sft_loss
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

    def responses_of(self, row: Mapping[str, Any]) -> list[list[int]]:
        """Return the token ids of the responses of a row."""
        return [row["chosen_ids"], row["rejected_ids"]]

    @abstractmethod
    def measure(
        self, rows: Sequence[Mapping[str, Any]], responses: Sequence[Response], scores: Tensor
    ) -> dict[str, Tensor]:
        """Return figures of held-out rows, [N] each, the preference loss among them.

        Args:
            rows: N rows, none in a process that has no share in few of them.
            responses: all their responses, R.
            scores: their mean log-probabilities per token, with the adapter, [R] fp64.
        """

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Measure the adapter on the held-out rows, and log the figures with the prefix eval_.

        They are means over all rows, L0 and L1 over all response tokens. TRL would take a mean over batches, which
        have to be of one size in all processes. The processes share the rows out.
        """
        self.model.eval()
        own = range(self.args.process_index, len(self.eval_dataset), self.args.world_size)
        rows = [self.eval_dataset[number] for number in own]
        responses = [Response(row["prompt_ids"], ids) for row in rows for ids in self.responses_of(row)]
        scores, moved = score_moves(self.model, responses, self.adapter, progress=self.progress)
        by_row = self.measure(rows, responses, scores.double())
        table = torch.stack([figure.double() for figure in by_row.values()], dim=1)
        sums = [float(_lengths(responses).sum()), *moved.sum(dim=0).tolist()]
        means = torch.tensor(gather_object(table.tolist()), dtype=torch.float64).mean(dim=0)
        n_tokens, l0, l1 = torch.tensor(gather_object([sums]), dtype=torch.float64).sum(dim=0).tolist()
        figures = dict(zip(by_row, means.tolist(), strict=True)) | {"l0": l0 / n_tokens, "l1": l1 / n_tokens}
        figures["loss"] = figures["preference_loss"] + self.adapter.config.l1 * figures["l1"]
        metrics = {f"eval_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

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


class AdapterCPOTrainer(AdapterTrainer, CPOTrainer):  # type: ignore[misc]
    """Base of the trainers that have no reference model, by TRL's CPOTrainer."""

    # TRL would add these tags to the model.
    _tag_names: list[str] = []  # noqa: RUF012

    @staticmethod
    def get_batch_logps(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Return log-probabilities in fp32, for a 16-bit model too: SimPO multiplies their difference by 10."""
        logps: Tensor = CPOTrainer.get_batch_logps(logits.float(), labels, **options)
        return logps


class AdapterSimPOTrainer(AdapterCPOTrainer):
    """SimPO (arXiv 2405.14734)."""

    simpo_gamma: float

    @staticmethod
    def collator(padding: int) -> Any:
        """Return the function that makes a batch of rows."""
        pad = DPODataCollatorWithPadding(pad_token_id=padding)
        return lambda rows: pad([_labelled(row) for row in rows])

    def operations(self, inputs: Mapping[str, Tensor]) -> Cost:
        """Return those of a pass over both responses, with all logits."""
        lengths = row_lengths(inputs["chosen_attention_mask"], inputs["rejected_attention_mask"])
        return self.adapted_pass(lengths, sum(lengths))

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: str = "train") -> tuple[Tensor, Any]:
        """Return the loss with its penalty, and what is logged."""
        with self.adapter.recording() as moves:
            loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
        response = self.concatenated_inputs(batch)["concatenated_labels"] != -100
        loss, logged = self.penalised(loss, moves, response)
        return loss, metrics | logged

    def measure(
        self, rows: Sequence[Mapping[str, Any]], responses: Sequence[Response], scores: Tensor
    ) -> dict[str, Tensor]:
        """Return those of rewards, beta times the scores, and `-log sigmoid(margin - gamma)`."""
        rewards = self.beta * scores
        return _of_pairs(rewards) | {"preference_loss": softplus(self.simpo_gamma - _margins(rewards))}


class AdapterPROTrainer(AdapterCPOTrainer):
    """PRO (arXiv 2306.17492) on rankings, whose numbers of responses may differ within a batch."""

    def __init__(self, *args: Any, training: TrainingConfig, **options: Any) -> None:
        self.plain, self.sft_weight = training.plain, training.sft_weight
        super().__init__(*args, **options)

    @staticmethod
    def collator(padding: int) -> Any:
        """Return the function that makes a batch of rows."""
        return partial(_ranked, padding)

    def operations(self, inputs: Mapping[str, Tensor]) -> Cost:
        """Return those of a pass over all responses, with all logits."""
        lengths = row_lengths(inputs["attention_mask"])
        return self.adapted_pass(lengths, sum(lengths))

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: str = "train") -> tuple[Tensor, Any]:
        """Return the loss with its penalty, and what is logged."""
        labels, sizes = batch["response_labels"], batch["n_responses"].tolist()
        with self.adapter.recording() as moves:
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        sums = self.get_batch_logps(logits, labels)
        scores = sums / (labels != -100).sum(dim=1)
        rewards = batch["rewards"].split(sizes)
        ranked = [pro_loss(r, R, plain=self.plain) for r, R in zip(scores.split(sizes), rewards, strict=True)]
        tuned = [sft_loss(p, R, self.sft_weight) for p, R in zip(sums.split(sizes), rewards, strict=True)]
        loss, logged = self.penalised(torch.stack(ranked).mean() + torch.stack(tuned).mean(), moves, labels != -100)
        orders = [order_of(r, R) for r, R in zip(scores.detach().split(sizes), rewards, strict=True)]
        figures = _of_orders(orders) | {"ranking_loss": torch.stack(ranked)}
        means = {name: self._mean_over_processes(figure.mean().to(loss)) for name, figure in figures.items()}
        return loss, logged | means

    def responses_of(self, row: Mapping[str, Any]) -> list[list[int]]:
        """Return the token ids of the responses of a row."""
        ids: list[list[int]] = row["response_ids"]
        return ids

    def measure(
        self, rows: Sequence[Mapping[str, Any]], responses: Sequence[Response], scores: Tensor
    ) -> dict[str, Tensor]:
        """Return the loss with and without the SFT term, and how the responses are ordered."""
        rewards = [torch.tensor(row["rewards"], dtype=torch.float64) for row in rows]
        sizes, lengths = [len(R) for R in rewards], _lengths(responses)
        ranked = [pro_loss(r, R, plain=self.plain) for r, R in zip(scores.split(sizes), rewards, strict=True)]
        sums = (scores * lengths).split(sizes)
        tuned = [sft_loss(p, R, self.sft_weight) for p, R in zip(sums, rewards, strict=True)]
        losses = torch.tensor([ranked, tuned], dtype=torch.float64)
        orders = [order_of(r, R) for r, R in zip(scores.split(sizes), rewards, strict=True)]
        return _of_orders(orders) | {"ranking_loss": losses[0], "preference_loss": losses.sum(dim=0)}


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

    def measure(
        self, rows: Sequence[Mapping[str, Any]], responses: Sequence[Response], scores: Tensor
    ) -> dict[str, Tensor]:
        """Return those of rewards, and `-log sigmoid(margin)`.

        Rewards are beta times the difference to the reference's log-probabilities of whole responses.
        """
        with self.adapter.disabled():
            reference, _ = score_moves(self.model, responses, None, progress=self.progress)
        rewards = self.beta * _lengths(responses) * (scores - reference)
        return _of_pairs(rewards) | {"preference_loss": softplus(-_margins(rewards))}

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


def _margins(rewards: Tensor) -> Tensor:
    return rewards[0::2] - rewards[1::2]


def _of_pairs(rewards: Tensor) -> dict[str, Tensor]:
    """Return what is logged of the rewards of N triples, [2 N]: chosen and rejected in turn."""
    chosen, rejected = rewards[0::2], rewards[1::2]
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": chosen > rejected,
        "rewards/margins": chosen - rejected,
    }


def _of_orders(orders: Sequence[Order]) -> dict[str, Tensor]:
    """Return what is logged of the order of the responses of N rankings."""
    table = [[order.best, order.pairs, order.margin] for order in orders]
    best, pairs, margins = torch.tensor(table, dtype=torch.float64).view(-1, 3).T
    return {"rewards/accuracies": best, "rewards/pairs": pairs, "rewards/margins": margins}


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


def _ranked(padding: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return a batch of B rankings with R responses: [R, T], the number of each, [B], and the rewards, [R]."""
    ids, labels = list[Tensor](), list[Tensor]()
    for row in rows:
        for response in row["response_ids"]:
            ids.append(torch.tensor(row["prompt_ids"] + response))
            labels.append(torch.tensor([-100] * len(row["prompt_ids"]) + response))
    masks = [torch.ones_like(text) for text in ids]
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        "input_ids": pad(ids, padding_value=padding),
        "attention_mask": pad(masks),
        # Trainers count tokens with `labels`.
        "response_labels": pad(labels, padding_value=-100),
        "n_responses": torch.tensor([len(row["response_ids"]) for row in rows]),
        "rewards": torch.tensor([reward for row in rows for reward in row["rewards"]], dtype=torch.float64),
    }


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
    length = config.max_length
    with deprecations_silenced():
        if config.loss == "pro":
            return CPOConfig(**SETTINGS, **rates, max_length=length)
        beta = config.preference_beta
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
    kind: Any = {"simpo": AdapterSimPOTrainer, "dpo": AdapterDPOTrainer, "pro": AdapterPROTrainer}[config.loss]
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
        **({"training": config} if config.loss == "pro" else {}),
        **data,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
