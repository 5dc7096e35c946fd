"""What the trainers of all baselines have in common. Importing this needs the extra `train`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainingArguments

from dspa.resuming import SETTINGS, Resumable, Steps, deprecations_silenced
from dspa.training_folder import TrainingFolder, reading_checkpoint


@dataclass(frozen=True)
class Examples:
    """What a trainer reads.

    Attributes:
        rows: the examples, as the trainer's collator takes them.
        digest: SHA-256 of the token ids of the triples.
        counts: numbers for the training's record, `n_triples` among them.
    """

    rows: Sequence[Any]
    digest: str
    counts: Mapping[str, int]


class BaselineTrainer(Resumable):
    """A trainer whose loss is a mean over micro-batches, with a bar."""

    settings: type[TrainingArguments] = TrainingArguments
    remove_callback: Callable[[Any], None]

    def __init__(self, config: Any, folder: TrainingFolder, bar: tqdm[Any], **options: Any) -> None:
        self.config, self.folder = config, folder
        super().__init__(callbacks=[Steps(bar)], **options)  # type: ignore[call-arg]
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)

    @classmethod
    @abstractmethod
    def read(
        cls,
        triples: Any,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        chat_template_kwargs: Mapping[str, Any] | None,
        config: Any,
        progress: bool,
    ) -> Examples:
        """Read and tokenize triples.

        Raises:
            PreferenceError: a bad triple.
        """

    @staticmethod
    @abstractmethod
    def collate(rows: Sequence[Any]) -> dict[str, Any]:
        """Return a batch of rows."""

    @classmethod
    def arguments(cls, config: Any, out: Path, *, on_cpu: bool, **settings: Any) -> Any:
        """Return the trainer's settings. Making them joins the processes of a launcher."""
        with deprecations_silenced():
            args = cls.settings(
                **SETTINGS,
                **settings,
                learning_rate=config.lr,
                per_device_train_batch_size=config.micro_batch_size,
                seed=config.seed,
                logging_steps=config.log_every,
                save_steps=config.checkpoint_every,
                report_to="none",
                use_cpu=on_cpu,
                output_dir=str(out),
            )
        args.gradient_accumulation_steps = config.accumulation(args.world_size)
        return args

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading_checkpoint(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]


def load_lora(model: Any, folder: Path) -> None:
    """Give the LoRA of a PEFT model the weights that are in a folder.

    Raises:
        TrainingError: the folder is damaged.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    with reading_checkpoint(folder):
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
