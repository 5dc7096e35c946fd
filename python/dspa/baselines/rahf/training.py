"""The two stages of RAHF-SCIT.

A stage that was stopped resumes from its last checkpoint, and ends in the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.baselines.rahf.config import AlignmentConfig, TrainingSettings, TuningConfig
from dspa.baselines.rahf.instructions import digest, read_instructed
from dspa.data.templates import at_date, check_template_kwargs, date_of_today
from dspa.data.triples import Triple
from dspa.distributed import rank
from dspa.errors import TrainingError, refusal, require_package
from dspa.models.layers import CausalLM, base_model, check_eval, context_length, decoder_layers, device_of, loaded_name
from dspa.models.sources import recorded_weights
from dspa.resuming import check_processes, deprecations_silenced, whole_history, without_times, writing_checkpoints
from dspa.training_folder import History, TrainingFolder

Triples = Iterable[Triple | Mapping[str, Any]] | str | Path


def tune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Triples,
    out: str | Path,
    *,
    config: TuningConfig | None = None,
    progress: bool = True,
    model_name: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> CausalLM:
    """Train all weights of `model` to tell good from bad answers by instructions: stage 1 of RAHF-SCIT.

    Each triple gives two examples: the chosen response after the good instruction, and the rejected one after the bad
    instruction. Each is compared with the same response after the opposite instruction. In several processes
    (torchrun), each calls this with the same arguments.

    Args:
        model: a transformers causal language model in evaluation mode, on the device to train on. Its weights change,
            also where the training fails.
        tokenizer: the model's tokenizer.
        triples: what `load_triples` takes.
        out: the folder to write: the model with its tokenizer, and `training.json` with the settings and what was
            logged. A training that was stopped resumes in its folder, and a finished one is loaded.
        config: the published settings by default.
        progress: show bars.
        model_name: name of the model, if its own name or path does not give it.
        chat_template_kwargs: values of the chat template's variables by name, for conversations.

    Returns:
        `model`, in evaluation mode.

    Raises:
        RuntimeError: the packages that train are not installed.
        TrainingError: an `out` with other files or a training of other settings, fewer examples than a batch, or
            devices or processes that training cannot use.
        ModelError: a model in training mode, or a loss that is not finite.
        PreferenceError: a bad triple.
        ValueError: a batch that the processes do not divide.
    """
    config, inner = config or TuningConfig(), base_model(model)
    settings = {
        "lr_scheduler_type": "linear",
        "warmup_steps": config.warmup,
        "num_train_epochs": config.epochs,
        "gradient_checkpointing": config.gradient_checkpointing,
    }

    def load(folder: Path) -> None:
        saved = type(inner).from_pretrained(folder, dtype=inner.dtype)
        inner.load_state_dict(saved.state_dict())

    def save(folder: Path) -> None:
        inner.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    with _stage("tune", inner, tokenizer, triples, out, config, progress, model_name, chat_template_kwargs) as stage:
        stage.run(lambda _n_triples: settings, inner, load, save)
    return inner.eval()


def align(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Triples,
    out: str | Path,
    *,
    config: AlignmentConfig | None = None,
    progress: bool = True,
    model_name: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Train a LoRA that shifts residuals from bad towards good without an instruction: stage 2 of RAHF-SCIT.

    For a response of each triple, chosen or rejected at random, the residuals h at the target layers should become
    `h + alpha (h_good - h_bad)`, where `h_good` and `h_bad` are those of the same tokens after the instructions. The
    model without its LoRA is the base, so it is in memory once.

    Args:
        model: the model that `tune` returned, as for `tune`. Its own weights stay as they are.
        tokenizer: the model's tokenizer.
        triples: what `load_triples` takes; in RAHF others than those of `tune`.
        out: the folder to write: the LoRA in PEFT's format, and `training.json`, as for `tune`.
        config: the published settings by default.
        progress: show bars.
        model_name: name of the model, if its own name or path does not give it.
        chat_template_kwargs: values of the chat template's variables by name, for conversations.

    Returns:
        The PEFT model of `model` with the LoRA, in evaluation mode. Its `unload()` returns `model` without it, and
        `merge_and_unload()` with the LoRA in its weights.

    Raises:
        RuntimeError: as for `tune`, like all others but the next.
        TrainingError: as for `tune`.
        ModelError: as for `tune`.
        PreferenceError: as for `tune`.
        ValueError: target layers that the model does not have, or projections of other names than q_proj and v_proj.
    """
    require_package("peft", "Training a LoRA")
    from peft import LoraConfig, get_peft_model

    config, inner = config or AlignmentConfig(), base_model(model)
    targets = config.target_layers(len(decoder_layers(inner)))
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.dropout,
        target_modules=["q_proj", "v_proj"],
        # As published, up to the last target. Its own LoRA comes after what is read, and stays at 0.
        layers_to_transform=list(range(targets[-1] + 1)),
        task_type="CAUSAL_LM",
    )

    def settings(n_triples: int) -> dict[str, Any]:
        return {
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "max_steps": config.steps(n_triples),
            # The LoRA of the last target layer takes part in nothing.
            "ddp_find_unused_parameters": True,
        }

    with _stage("align", inner, tokenizer, triples, out, config, progress, model_name, chat_template_kwargs) as stage:
        from dspa.baselines.rahf.trainers import Residuals, load_lora

        required = [(parameter, parameter.requires_grad) for parameter in inner.parameters()]
        with torch.random.fork_rng(), deprecations_silenced():
            torch.manual_seed(config.seed)
            adapted = get_peft_model(inner, lora)
        try:
            stage.run(settings, Residuals(adapted, targets), lambda f: load_lora(adapted, f), adapted.save_pretrained)
        except BaseException:
            adapted.unload()
            raise
        finally:
            for parameter, requires in required:
                parameter.requires_grad_(requires)
    return adapted.eval()


@dataclass(frozen=True)
class _Stage:
    """One training in a folder that is held.

    Attributes:
        name: "tune" or "align".
        model: the model, whose weights are those of `weights`.
        weights: the entry by which a folder records them.
        tokenizer, triples, config, progress, model_name, chat_template_kwargs: as for `tune` and `align`.
        folder: the folder to write.
    """

    name: str
    model: CausalLM
    weights: dict[str, str]
    tokenizer: PreTrainedTokenizerBase
    triples: Triples
    folder: TrainingFolder
    config: Any
    progress: bool
    model_name: str | None
    chat_template_kwargs: Mapping[str, Any] | None

    def run(
        self,
        settings: Callable[[int], dict[str, Any]],
        trained: nn.Module,
        load: Callable[[Path], None],
        save: Callable[[Path], Any],
    ) -> None:
        """Train, or continue, or load what was trained.

        Args:
            settings: returns those of the trainer that only this stage has, for a number of triples.
            trained: what the trainer gets as its model.
            load: reads what was trained from a folder.
            save: writes it to one.
        """
        from dspa.baselines.rahf import trainers

        config, folder = self.config, self.folder
        kind: Any = trainers.TuningTrainer if self.name == "tune" else trainers.AlignmentTrainer
        on_cpu = device_of(self.model.get_input_embeddings()).type == "cpu"
        args = trainers.arguments(config, folder.path, on_cpu=on_cpu)
        check_processes(self.model, args)
        with args.main_process_first(local=False):
            date = folder.first_date(date_of_today(self.tokenizer))
        length = min(config.max_length, context_length(self.model) or config.max_length)
        progress = self.progress and args.process_index == 0
        tokenizer = at_date(self.tokenizer, date)
        triples = read_instructed(self.triples, tokenizer, length, self.chat_template_kwargs, progress)
        rows = kind.rows(triples, config)
        if len(rows) < config.batch_size:
            accepted = f"a batch ({config.batch_size}) or more"
            raise refusal(TrainingError, "The number of examples", len(rows), accepted, "Lower `batch_size`.")
        args = trainers.arguments(config, folder.path, on_cpu=on_cpu, **settings(len(triples)))
        recorded = {
            "stage": self.name,
            "model_name": self.model_name or loaded_name(self.model),
            "model_dtype": str(self.model.dtype),
            "data": digest(triples),
            "chat_template_kwargs": dict(self.chat_template_kwargs or {}) or None,
            "template_date": date,
            **asdict(config),
        }
        recorded |= {"targets": list(trained.targets)} if isinstance(trained, trainers.Residuals) else {}
        with args.main_process_first(local=False):
            folder.claim(recorded | self.weights)
        if folder.finished:
            load(folder.path)
            return
        history = self._fit(kind, args, trained, rows, load, progress)
        with args.main_process_first(local=False):
            if args.process_index == 0:
                save(folder.path)
                folder.finish({"n_triples": len(triples), "history": history})

    def _fit(
        self, kind: Any, args: Any, trained: nn.Module, rows: list[Any], load: Callable[[Path], None], progress: bool
    ) -> History:
        checkpoint = self.folder.checkpoints()[-1] if self.folder.checkpoints() else None
        if checkpoint and (history := whole_history(checkpoint)) is not None:
            load(checkpoint)
            return history
        with (
            deprecations_silenced(),
            writing_checkpoints(args, self.folder),
            tqdm(unit="step", desc=self.name, disable=not progress) as bar,
        ):
            trainer = kind(
                *(self.config, self.folder, bar),
                model=trained,
                args=args,
                train_dataset=rows,
                data_collator=kind.collate,
                processing_class=self.tokenizer,
            )
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            return without_times(trainer.state.log_history)


@contextmanager
def _stage(
    name: str,
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    triples: Triples,
    out: str | Path,
    config: TrainingSettings,
    progress: bool,
    model_name: str | None,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> Iterator[_Stage]:
    """Check what is quick to check, and hold the folder of a training, within a `with` block."""
    require_package("accelerate", "Training")
    folder = TrainingFolder(Path(out))
    folder.check()
    check_eval(model)
    check_template_kwargs(tokenizer, chat_template_kwargs)
    # Of several processes, the first holds the folder for all.
    with folder.held() if rank() == 0 else nullcontext():
        weights = recorded_weights(model)
        yield _Stage(
            *(name, model, weights, tokenizer, triples, folder, config, progress, model_name, chat_template_kwargs)
        )
