"""The two stages of RAHF-SCIT.

A stage that was stopped resumes from its last checkpoint, and ends in the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from dspa.baselines.rahf.config import AlignmentConfig, TuningConfig
from dspa.baselines.training import Training, Triples
from dspa.errors import require_package
from dspa.models.layers import CausalLM, base_model, decoder_layers


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

    training = Training(*("tune", inner, tokenizer, triples, out, config, progress, model_name, chat_template_kwargs))
    with training.held() as weights:
        from dspa.baselines.rahf.trainers import TuningTrainer

        load, save = training.load_weights, training.save_model
        training.run(TuningTrainer, lambda _n_triples: settings, inner, load, save, weights)
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
    from peft import LoraConfig

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

    training = Training(*("align", inner, tokenizer, triples, out, config, progress, model_name, chat_template_kwargs))
    with training.held() as weights, training.lora(lora) as adapted:
        from dspa.baselines.rahf.trainers import AlignmentTrainer, Residuals
        from dspa.baselines.trainers import load_lora

        trained = Residuals(adapted, targets)
        training.run(
            *(AlignmentTrainer, settings, trained, partial(load_lora, adapted), adapted.save_pretrained),
            weights | {"targets": list(targets)},
        )
    return adapted.eval()
