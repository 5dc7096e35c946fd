"""Effects of latents on style: a model's answers with one latent ablated at a time, kept as they are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.baselines.random_set import response_counts
from dspa.data.lines import check_file
from dspa.data.messages import Text as Prompt
from dspa.errors import PersonaError, refusal
from dspa.evaluate.compare.prompts import spoken
from dspa.evaluate.generation import check_prompts, continue_prompts, decode, end_tokens
from dspa.evaluate.responses import Response
from dspa.evaluate.style import StyleAxis
from dspa.intervals import Values
from dspa.models.layers import CausalLM, base_model, check_eval, loaded_name
from dspa.models.sources import Source, model_digest, model_source
from dspa.outputs import held, write_atomically
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import required_layer
from dspa.schemas import Count, NonNegative, OneOf, PositiveInt, Text, check, parse_json, schema
from dspa.steering.latent_sets import LatentSet
from dspa.steering.latents import LatentSteering
from dspa.version import __version__

FORMAT = "dspa.effects.1"


@schema
class Measurement:
    """The first line of a file of effects: all that the answers depend on, and those without an ablation.

    Attributes:
        sae: fingerprint of the SAE.
        layer: its layer.
        d_sae: its number of latents.
        alpha: strength of the ablation.
        max_new_tokens: largest number of tokens per answer.
        prompts: token ids of the prompts.
        asked: texts of the prompts, of messages that of the last one.
        model_name: name of the model, empty if that is not known.
        model_digest: its weights, as `dspa.models.sources.model_digest` gives them, or empty.
        sources: where the model and the SAE were loaded from.
        base: token ids of the model's own answers.
        answers: their texts.
        package: version of the package that wrote the file.
        format: FORMAT.
    """

    sae: Text
    layer: Count
    d_sae: PositiveInt
    alpha: NonNegative
    max_new_tokens: PositiveInt
    prompts: list[list[Count]]
    asked: list[Text]
    model_name: Text = ""
    model_digest: Text = ""
    sources: dict[Text, Source] = field(default_factory=dict)
    base: list[list[Count]] = field(default_factory=list)
    answers: list[Text] = field(default_factory=list)
    package: Text = __version__
    format: Annotated[str, OneOf((FORMAT,))] = FORMAT


@schema
class Ablated:
    """A further line: the answers with one latent ablated.

    Attributes:
        latent: the latent.
        answers: texts by the number of the prompt, from 0. Where the latent is not active in the model's own answer,
            ablating it changes nothing, and there is none.
    """

    latent: Count
    answers: dict[Text, Text]


@dataclass(frozen=True)
class Effects:
    """Answers to N prompts, with each of some latents ablated.

    Attributes:
        measurement: what they depend on.
        ablated: answers by latent and prompt, where they can differ from the model's own.
    """

    measurement: Measurement
    ablated: dict[int, dict[int, str]] = field(default_factory=dict)

    def changes(self, axes: Mapping[str, StyleAxis]) -> dict[int, Values]:
        """Return the change of each axis on each prompt [N, A] by the ablation of each latent."""
        asked, own = self.measurement.asked, self.measurement.answers
        base = [axis_values(axes, *pair) for pair in zip(asked, own, strict=True)]
        changes = {latent: np.zeros((len(asked), len(axes))) for latent in self.ablated}
        for latent, answers in self.ablated.items():
            for n, answer in answers.items():
                if answer != own[n]:
                    changes[latent][n] = axis_values(axes, asked[n], answer) - base[n]
        return changes

    def summary(self, axes: Mapping[str, StyleAxis]) -> list[dict[str, float]]:
        """Return a row per latent: how many answers it changes, and each axis' mean change with its standard error."""
        own, n = self.measurement.answers, len(self.measurement.asked)
        rows = []
        for latent, change in self.changes(axes).items():
            n_changed = sum(answer != own[k] for k, answer in self.ablated[latent].items())
            errors = change.std(axis=0, ddof=1) / n**0.5 if n > 1 else np.zeros(len(axes))
            row: dict[str, float] = {"latent": latent, "answers_changed": n_changed}
            for axis, mean, error in zip(axes, change.mean(axis=0).tolist(), errors.tolist(), strict=True):
                row |= {axis: mean, f"{axis}_error": error}
            rows.append(row)
        return rows

    @classmethod
    def read(cls, path: Path) -> Effects:
        """Read a file that `measure_effects` wrote. The line that a killed process was writing does not count.

        Raises:
            PersonaError: a file of something else, or a damaged one.
        """
        first, *lines = _whole_lines(path) or [""]
        accepted = "a file that dspa personal effects wrote"
        record = parse_json(first, PersonaError, f"{path} line 1", accepted)
        measurement = check(Measurement, record, PersonaError, f"{path} line 1")
        effects = cls(measurement)
        numbers = {str(n): n for n in range(len(measurement.asked))}
        for number, line in enumerate(lines, start=2):
            name = f"{path} line {number}"
            one = check(Ablated, parse_json(line, PersonaError, name, accepted), PersonaError, name)
            if one.latent >= measurement.d_sae or not one.answers.keys() <= numbers.keys():
                got = f"of latent {one.latent} and prompts {', '.join(one.answers)}"
                raise refusal(PersonaError, name, got, f"latents and prompts of this file, {len(numbers)} prompts")
            effects.ablated[one.latent] = {numbers[n]: answer for n, answer in one.answers.items()}
        return effects


def _whole_lines(path: Path) -> list[str]:
    """Return the lines of a file, without one at its end that was cut."""
    check_file(path, PersonaError)
    return path.read_bytes().decode(errors="replace").split("\n")[:-1]


def axis_values(axes: Mapping[str, StyleAxis], prompt: str, answer: str) -> Values:
    """Return the value of each axis for an answer [A]."""
    return np.array([axis(prompt, answer) for axis in axes.values()], dtype=np.float64)


def measure_effects(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sae: FrozenSAE,
    prompts: Sequence[Prompt],
    encode: Callable[[Prompt], Sequence[int]],
    latents: Sequence[int],
    path: Path,
    *,
    alpha: float = 1.0,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    batch_tokens: int = 8192,
    progress: bool = True,
    layers: str | None = None,
    model_name: str | None = None,
) -> Effects:
    """Let a model answer prompts by greedy decoding, with nothing and with each of some latents ablated.

    The rows of a batch have different latents. A latent that is not active in the model's own answer to a prompt
    cannot change it, and is not run there.

    Args:
        model: a transformers causal language model in evaluation mode, to which nothing is attached.
        tokenizer: the model's tokenizer.
        sae: the SAE.
        prompts: texts, or lists of messages.
        encode: returns the token ids of a prompt.
        latents: the latents.
        path: file to write, a line as each latent is done. Those that are in it are not run again.
        alpha: strength of the ablation; 1 sets a latent to 0 wherever it is active.
        max_new_tokens: largest number of tokens per answer; None: as `check_prompts` chooses.
        batch_size: number of answers that are generated together.
        batch_tokens: tokens per batch, padding included, in passes over given texts.
        progress: show a bar.
        layers: dotted path of the decoder layers, for an unknown architecture.
        model_name: name of the model, if its own name or path does not give it.

    Returns:
        The effects of all latents that are in the file.

    Raises:
        PersonaError: a file of something else, or of other prompts, settings, weights or another SAE.
        ModelError: an SAE that does not fit the model, or a model in training mode.
        ValueError: no prompts, latents that the SAE does not have, or as for `check_prompts`.
    """
    inner = base_model(model)
    check_eval(inner)
    ids, latents = [list(encode(prompt)) for prompt in prompts], list(dict.fromkeys(latents))
    if not ids:
        raise refusal(ValueError, "`prompts`", "empty", "one prompt or more")
    sources = {"model": model_source(inner), "sae": sae.source}
    measurement = Measurement(
        sae=sae.fingerprint,
        layer=required_layer(sae),
        d_sae=sae.d_sae,
        alpha=alpha,
        max_new_tokens=check_prompts(inner, ids, max_new_tokens, special=tokenizer.all_special_ids),
        prompts=ids,
        asked=list(map(spoken, prompts)),
        model_name=model_name or loaded_name(inner) or "",
        model_digest=model_digest(inner) or "",
        sources={name: source for name, source in sources.items() if source},
    )
    ablation = LatentSteering(sae, {str(latent): LatentSet.of([latent]) for latent in latents}, alpha=alpha)
    names: dict[str, Any] = {"layers": layers, "model_name": model_name}
    with held(path, "The file of effects", PersonaError, file=True):
        effects = _continued(path, measurement)
        with ablation.attach(inner, **names), tqdm(unit="answer", disable=not progress) as bar:
            answering = _Answering(inner, tokenizer, ablation, measurement, batch_size, bar)
            if effects is None:
                base = answering.base()
                texts = [decode(tokenizer, answer) for answer in base]
                effects = Effects(replace(measurement, base=base, answers=texts))
            _write(path, effects)
            missing = [latent for latent in latents if latent not in effects.ablated]
            own = [Response(*pair) for pair in zip(ids, effects.measurement.base, strict=True)]
            active = torch.zeros(len(ids), len(missing), dtype=torch.bool)
            for numbers, counts in response_counts(inner, sae, own, layers=layers, batch_tokens=batch_tokens):
                active[numbers] = counts[:, missing] > 0
            where = {latent: active[:, n].nonzero().flatten().tolist() for n, latent in enumerate(missing)}
            with path.open("a", encoding="utf-8") as file:
                for latent, answers in answering.ablated(where):
                    effects.ablated[latent] = answers
                    file.write(_line(latent, answers))
                    file.flush()
    return effects


@dataclass
class _Answering:
    """Answers of a model to the prompts of a measurement."""

    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    ablation: LatentSteering
    measurement: Measurement
    batch_size: int
    bar: Any

    def base(self) -> list[list[int]]:
        """Return the token ids of the model's own answers."""
        numbers = range(len(self.measurement.prompts))
        self._begin("base", len(numbers))
        return [answer for _, answer in self._run([(None, n) for n in numbers])]

    def ablated(self, where: Mapping[int, Sequence[int]]) -> Iterator[tuple[int, dict[int, str]]]:
        """Yield each latent, when it is done, with its answers to the prompts whose numbers are given."""
        self._begin("effects", sum(map(len, where.values())))
        answers = self._run([(str(latent), n) for latent, numbers in where.items() for n in numbers])
        for latent, numbers in where.items():
            yield latent, {n: decode(self.tokenizer, ids) for n, ids in islice(answers, len(numbers))}

    def _begin(self, name: str, total: int) -> None:
        self.bar.set_description(name)
        self.bar.reset(total)

    def _run(self, rows: Sequence[tuple[str | None, int]]) -> Iterator[tuple[int, list[int]]]:
        """Yield the number of a prompt and the token ids of its answer, for names of sets and numbers of prompts."""
        ends = end_tokens(self.model, self.tokenizer)
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            prompts = [self.measurement.prompts[n] for _, n in batch]
            with self.ablation.rows([name for name, _ in batch]):
                answers = continue_prompts(
                    *(self.model, self.tokenizer, prompts, ends),
                    max_new_tokens=self.measurement.max_new_tokens,
                    do_sample=False,
                )
            self.bar.update(len(batch))
            yield from ((n, answer.ids) for (_, n), answer in zip(batch, answers, strict=True))


def _continued(path: Path, measurement: Measurement) -> Effects | None:
    """Return the effects that a file holds so far, None without a file.

    Raises:
        PersonaError: effects that were measured in another way.
    """
    if not path.exists():
        return None
    effects = Effects.read(path)
    then = effects.measurement
    own = {"base", "answers", "package", "sources"}
    differing = [
        f.name for f in fields(then) if f.name not in own and getattr(then, f.name) != getattr(measurement, f.name)
    ]
    if differing:
        got = f"{path}, which holds effects with other {', '.join(f'`{name}`' for name in differing)}"
        accepted = "a new file, or one of the same prompts, settings, model and SAE, which is continued"
        raise refusal(PersonaError, "The file of effects", got, accepted, "Name another.")
    return effects


def _write(path: Path, effects: Effects) -> None:
    """Write a whole file: a cut line of an earlier one goes."""
    lines = [json.dumps(asdict(effects.measurement)) + "\n"]
    lines += [_line(latent, answers) for latent, answers in effects.ablated.items()]
    write_atomically(path, "".join(lines).encode())


def _line(latent: int, answers: Mapping[int, str]) -> str:
    return json.dumps({"latent": latent, "answers": answers}) + "\n"
