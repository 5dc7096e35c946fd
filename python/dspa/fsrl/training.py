"""Training an adapter on preferences: SimPO, DPO or PRO by TRL's trainers, with an L1 penalty on v.

A training that was stopped resumes from its last checkpoint, and ends in the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from typing_extensions import TypedDict

from dspa.costs import Meter
from dspa.data.templates import at_date, check_template_kwargs, date_of_today
from dspa.data.triples import DigestedExamples, Source
from dspa.distributed import rank
from dspa.errors import TrainingError, refusal, require_package
from dspa.files import checksum
from dspa.fsrl.adapter import FSRLAdapter
from dspa.fsrl.config import TrainingConfig
from dspa.fsrl.lending import trainable
from dspa.fsrl.results import HeldOut, HeldOutRankings, held_out, held_out_rankings
from dspa.models.gradients import check_gradients, check_output_layer
from dspa.models.layers import CausalLM, base_model, check_eval, context_length, device_of, loaded_name
from dspa.models.sizes import ModelSizes, sizes_of
from dspa.models.sources import model_source, recorded_weights
from dspa.resuming import Trained, check_processes, finished_before, fit, writing_checkpoints
from dspa.training_folder import RECORD, TrainingFolder, reading_checkpoint

if TYPE_CHECKING:
    from dspa.data.rows import ExampleRows


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Source,
    adapter: FSRLAdapter,
    out: str | Path,
    *,
    config: TrainingConfig | None = None,
    eval_triples: Source | None = None,
    progress: bool = True,
    layers: str | None = None,
    model_name: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> FSRLAdapter:
    """Train `adapter` on the preferences in `triples`.

    The model and the SAE stay as they are, and nothing is attached afterwards.

    The loss is `preference loss + lambda mean sum_j |v_j|`, where lambda is the adapter's `l1`. The mean is over the
    response tokens of a micro-batch, each at its own position (no padding, no prompt), then over micro-batches. Triples
    are tokenised as `score_triples` does: an end token follows a text response, and prompts are never cut.

    In several processes (torchrun), each calls this with the same arguments. Their batches are those of one process.

    Args:
        model: a transformers causal language model, or one in a PEFT wrapper, in evaluation mode, on the device to
            train on.
        tokenizer: the model's tokenizer.
        triples: what `load_triples` takes; for PRO, what `load_rankings` takes.
        adapter: the adapter, whose weights are the start. They change in place, and stay if the training fails.
        out: the folder to write. It gets the adapter, as by `save`, and `training.json` with the settings, the figures
            on held-out triples (`HeldOut`) or rankings (`HeldOutRankings`), and what was logged: loss, preference_loss,
            rewards/accuracies, rewards/margins, l0 and l1, of PRO also ranking_loss and rewards/pairs, and the same on
            `eval_triples` with the prefix eval_. Those of the training are means over batches, as in TRL; those with
            eval_ are means over all triples or rankings, l0 and l1 over all response tokens. A training that was
            stopped resumes in its folder, and a finished one is loaded.
        config: the published settings by default.
        eval_triples: held-out triples, or rankings for PRO, to report on.
        progress: show bars.
        layers: dotted path of the decoder layers, as for `FSRLAdapter.attach`.
        model_name: name of the model, as for `FSRLAdapter.attach`.
        chat_template_kwargs: values of the chat template's variables by name, as for `dspa.collect`.

    Raises:
        RuntimeError: TRL is not installed.
        TrainingError: an `out` with other files or a training of other settings, fewer examples than a batch, or
            devices or processes that training cannot use.
        ModelError: what `attach` refuses, a quantised model without gradients, or, for DPO, an output layer that is
            quantised or adapted, before any triple is read; or a loss that is not finite.
        PreferenceError: a bad triple or ranking.
        ValueError: a batch that the processes do not divide, or invalid `chat_template_kwargs`.
    """
    require_package("trl", "Training an adapter")
    from dspa.data.rows import ExampleRows

    config, inner, folder = config or TrainingConfig(), base_model(model), TrainingFolder(Path(out))
    folder.check()
    check_eval(inner)
    _check_padding(tokenizer)
    check_template_kwargs(tokenizer, chat_template_kwargs)
    # Of several processes, the first holds the folder for all.
    holding = folder.held() if rank() == 0 else nullcontext()
    # The adapter's weights are only a start: on this model they are trained.
    with holding, adapter.attach(model, layers=layers, model_name=model_name, other_weights=True):
        args = _arguments(inner, config, folder, evaluated=eval_triples is not None)
        meter = Meter(device_of(inner.get_input_embeddings()), args.world_size)
        sizes = sizes_of(inner, str(inner.dtype).removeprefix("torch."), layers)
        progress = progress and args.process_index == 0
        if config.loss == "dpo":
            check_output_layer(inner, ', or set `loss` to "simpo"')
        with trainable(inner, tokenizer, adapter, gradient_checkpointing=False):
            check_gradients(inner)
        config = replace(config, max_length=max_length_of(inner, config))
        with args.main_process_first(local=False):
            date = folder.first_date(date_of_today(tokenizer))
        dated = at_date(tokenizer, date)
        reading = (dated, config.max_length, progress, chat_template_kwargs)
        digested = DigestedExamples(config.load(triples))
        data = ExampleRows.read(digested, *reading, noun=config.noun)
        held = None if eval_triples is None else list(config.load(eval_triples))
        held_data = None if held is None else ExampleRows.read(held, *reading, noun=config.noun)
        if len(data.rows) < config.batch_size:
            accepted = f"a batch ({config.batch_size}) or more"
            raise refusal(
                TrainingError, f"The number of {config.noun}s", len(data.rows), accepted, "Lower `batch_size`."
            )
        settings = _settings(inner, adapter, config, data, held_data, model_name)
        settings |= {"chat_template_kwargs": dict(chat_template_kwargs or {}) or None, "template_date": date}
        weights = recorded_weights(inner)
        adapter.trained_on, adapter.trained_with = model_source(inner), weights.get("model_digest", "")
        with args.main_process_first(local=False):
            folder.claim(settings | weights, earlier=weights)
        if not folder.finished:
            trained = _fit(inner, tokenizer, adapter, folder, sizes, config, args, data, held_data, meter, progress)
            figures = None
            if held is not None:
                options = {"chat_template_kwargs": chat_template_kwargs, "progress": progress}
                figures = asdict(measure(inner, dated, held, adapter, config, **options))
            with args.main_process_first(local=False):
                if args.process_index == 0:
                    adapter.save(folder.path)
                    costs = trained.costs("FSRL", digested, settings | weights)
                    folder.finish(
                        {"data": data.counts, "held_out": figures, "costs": costs, "history": trained.history}
                    )
    saved = FSRLAdapter.load(folder.path, adapter.sae)
    adapter.load_state_dict(saved.state_dict())
    return adapter.requires_grad_(False).eval()


def trained_template(
    tokenizer: PreTrainedTokenizerBase, out: str | Path
) -> tuple[PreTrainedTokenizerBase, dict[str, Any] | None]:
    """Return what conversations need to be tokenized as in the training of an adapter.

    Args:
        tokenizer: the model's tokenizer.
        out: the adapter's folder.

    Returns:
        The tokenizer whose chat template writes the date of the training, and the training's `chat_template_kwargs`.
        The tokenizer as it is, and None, for an adapter without the record of a training.
    """
    folder = TrainingFolder(Path(out))
    settings = folder.read()["settings"] if (folder.path / RECORD).exists() else {}
    return at_date(tokenizer, settings.get("template_date")), settings.get("chat_template_kwargs")


def read_held_out(out: str | Path) -> HeldOut | HeldOutRankings | None:
    """Return the figures on held-out data from the folder of a training, or None if it had none.

    Raises:
        TrainingError: a folder without a finished training, or with a damaged record.
    """
    folder = TrainingFolder(Path(out))
    if not folder.finished:
        raise TrainingError(f"{out} holds no finished training; accepted: a folder that `dspa.fsrl.train` wrote.")
    record = folder.read()
    kind = _RankedResults if record["settings"].get("loss") == "pro" else _Results
    return folder.check_record(kind, record)["held_out"]


# The entries of a finished training's record that are read again.
class _Results(TypedDict):
    held_out: HeldOut | None


class _RankedResults(TypedDict):
    held_out: HeldOutRankings | None


def _fit(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    adapter: FSRLAdapter,
    folder: TrainingFolder,
    sizes: ModelSizes,
    config: TrainingConfig,
    args: Any,
    data: ExampleRows,
    held: ExampleRows | None,
    meter: Meter,
    progress: bool,
) -> Trained:
    """Train from the start or the last checkpoint to the end."""
    from dspa.fsrl.trainers import trainer_of

    checkpoint = folder.checkpoints()[-1] if folder.checkpoints() else None
    if checkpoint and (trained := finished_before(checkpoint)) is not None:
        with reading_checkpoint(checkpoint):
            adapter.load_state_dict(FSRLAdapter.load(checkpoint, adapter.sae).state_dict())
        return trained
    with (
        writing_checkpoints(args, folder),
        trainable(model, tokenizer, adapter, gradient_checkpointing=config.gradient_checkpointing),
        tqdm(unit="step", desc="train", disable=not progress) as bar,
    ):
        trainer = trainer_of(
            *(config, args, model, tokenizer, adapter, folder, sizes, bar),
            train_dataset=data.rows,
            eval_dataset=None if held is None else held.rows,
        )
        return fit(trainer, checkpoint, meter)


def measure(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    data: Source,
    adapter: FSRLAdapter | None,
    config: TrainingConfig,
    **options: Any,
) -> HeldOut | HeldOutRankings:
    """Measure a model on held-out data of a loss, by `held_out` with SimPO's settings, or by `held_out_rankings`.

    After DPO they are the usual ones. `options` are `chat_template_kwargs` and `progress`.
    """
    options |= {"max_length": max_length_of(model, config)}
    if config.loss == "pro":
        return held_out_rankings(model, tokenizer, data, adapter, plain=config.plain, **options)
    if config.loss == "simpo":
        options |= {"beta": config.preference_beta, "gamma_beta_ratio": config.gamma_beta_ratio}
    return held_out(model, tokenizer, data, adapter, **options)


def max_length_of(model: CausalLM, config: TrainingConfig) -> int:
    """Return the number of tokens to which a training cuts a response with its prompt."""
    return min(config.max_length, context_length(model) or config.max_length)


def _settings(
    model: CausalLM,
    adapter: FSRLAdapter,
    config: TrainingConfig,
    data: ExampleRows,
    held: ExampleRows | None,
    model_name: str | None,
) -> dict[str, Any]:
    """Return everything that decides the result of a training."""
    return {
        "model_name": model_name or loaded_name(model),
        "model_dtype": str(model.dtype),
        "layer": adapter.sae.layer,
        "sae": adapter.sae.fingerprint,
        **{f"adapter_{name}": value for name, value in asdict(adapter.config).items()},
        "adapter_start": checksum({name: tensor.detach().cpu() for name, tensor in adapter.named_parameters()}),
        "adapter_fraction": adapter.fraction,
        "adapter_mask": None if adapter.mask is None else checksum({"mask": adapter.mask.cpu()}),
        "data": data.sha256,
        "eval_data": None if held is None else held.sha256,
        **config.recorded(),
    }


def _check_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise TrainingError(
            "The tokenizer has no padding token and no end token to pad with. Set tokenizer.pad_token to any token: "
            "padding is masked out."
        )


def _arguments(model: CausalLM, config: TrainingConfig, folder: TrainingFolder, *, evaluated: bool) -> Any:
    """Return TRL's settings, after checking the processes and the device.

    Raises:
        TrainingError: other processes than the launcher asked for, or another device than the model's.
    """
    from dspa.fsrl import trainers

    on_cpu = device_of(model.get_input_embeddings()).type == "cpu"
    args = trainers.arguments(config, folder.path, on_cpu=on_cpu, evaluated=evaluated)
    check_processes(model, args)
    args.gradient_accumulation_steps = config.accumulation(args.world_size)
    return args
