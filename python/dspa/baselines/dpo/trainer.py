"""TRL's DPOTrainer on triples that dspa tokenizes. Importing this needs the extra `train`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dspa.baselines.dpo.config import DPOSettings
from dspa.baselines.trainers import BaselineTrainer, Examples
from dspa.data.rows import ExampleRows
from dspa.models.operations import Cost, forward
from dspa.resuming import check_loss, remove_dropout, row_lengths


class BaselineDPOTrainer(BaselineTrainer, DPOTrainer):  # type: ignore[misc]
    """DPO. The reference of a LoRA is the model without it, and that of all weights a copy of the model."""

    method = "DPO"
    settings = DPOConfig
    # TRL would add these tags to the model.
    _tag_names: list[str] = []  # noqa: RUF012

    def __init__(self, config: DPOSettings, *args: Any, model: Any, **options: Any) -> None:
        remove_dropout(model)
        # TRL would load the reference by the model's name. The model is still the untrained one, also when a training
        # is resumed: its checkpoint is loaded later.
        reference = None if config.lora else copy.deepcopy(model).requires_grad_(False)
        super().__init__(config, *args, model=model, ref_model=reference, **options)
        if config.lora:
            # TRL takes the LoRA for one that was trained before, and makes a copy of it the reference. Without the copy
            # it is the model without a LoRA.
            model.delete_adapter("ref")

    @classmethod
    def read(
        cls,
        triples: Any,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        chat_template_kwargs: Mapping[str, Any] | None,
        config: Any,
        progress: bool,
    ) -> Examples:
        """Read prompts with both responses."""
        data = ExampleRows.read(triples, tokenizer, max_length, progress, chat_template_kwargs)
        return Examples(data.rows, data.sha256, data.counts)

    @staticmethod
    def collate(rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return a batch of B triples, [2 B, T]: with the chosen responses, then with the rejected ones."""
        batch: dict[str, Tensor] = DataCollatorForPreference(pad_token_id=0)(rows)
        return batch

    def operations(self, inputs: Mapping[str, Tensor]) -> Cost:
        """Return those of the model and of its reference on all rows, with the logits that predict responses.

        On its way back, TRL computes these logits again.
        """
        lengths, n_logits = row_lengths(inputs["attention_mask"]), int(inputs["completion_mask"].sum())
        reference = forward(self.sizes, lengths, n_logits=n_logits)
        again = forward(self.sizes, [], n_logits=n_logits)
        return self.trained_pass(lengths, n_logits=n_logits) + reference + again

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the loss."""
        loss: Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        check_loss(loss)
        # TRL counts from 0 again when a training is resumed.
        self._metrics["train"].pop("num_tokens", None)
        return loss

    def _prepare_dataset(self, dataset: Any, *_args: Any) -> Any:
        return dataset

    def _send_telemetry(self) -> None:
        """Send nothing. TRL would report the class and the model, unless an environment variable prevents it."""
