"""Answers to the questions of a benchmark by the base model and by methods, in batches, and resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.baselines.random_set import response_densities
from dspa.data.templates import at_date, date_of_today
from dspa.errors import refusal
from dspa.evaluate.answers.draws import GREEDY_BELOW, decoding, sampling_settings
from dspa.evaluate.answers.folder import FORMAT, AnswerFolder, MethodRecord, Turn, TurnBatch
from dspa.evaluate.answers.formats import answer_files, temperature_of
from dspa.evaluate.benchmarks import Benchmark, BenchmarkQuestion
from dspa.evaluate.compare.methods import Method, controls_of
from dspa.evaluate.compare.prompts import encode
from dspa.evaluate.compare.run import attached, check_attaching, check_methods, check_runs, versions
from dspa.evaluate.generation import (
    continue_prompts,
    decode,
    end_tokens,
    sampling_arguments,
    unsteered_prompts,
)
from dspa.evaluate.responses import Response
from dspa.files import digest_of
from dspa.models.layers import CausalLM, base_model, check_eval, context_length, loaded_name
from dspa.models.sources import model_digest
from dspa.saes.frozen import FrozenSAE
from dspa.steering.dspa import attached_steerings


def answer_questions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    methods: Sequence[Method],
    out: str | Path,
    *,
    controls: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    max_new_tokens: int = 1024,
    temperature: float | None = None,
    top_p: float | None = None,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
    layers: str | None = None,
    model_name: str | None = None,
    other_weights: bool = False,
) -> list[MethodRecord]:
    """Answer the questions of a benchmark by the base model and by methods, and write files for its judges.

    Questions are put into the chat template. A further turn of a question follows the method's own answers to the
    earlier ones. Random numbers depend on the seed, the question and the turn alone, and are the same for every method.
    Each batch is kept as it ends, so that a stopped call continues with the next, and its files are those of a call
    that was not stopped.

    Args:
        model: a transformers causal language model in evaluation mode, to which nothing is attached.
        tokenizer: the model's tokenizer, with a chat template.
        benchmark: the questions.
        methods: what `Method.dspa`, `.joint`, `.static`, `.adapted`, `.vector`, `.tuned` and `.prefixed` made. The base
            model comes first, and is not among them.
        out: folder to write. One with answers to the same questions by the same settings is continued, also by further
            methods.
        controls: those to run for methods that have them, as for `dspa.compare`.
        seeds: of sampling. Questions that are answered greedily have the same answer for all, unless the method itself
            draws.
        max_new_tokens: largest number of tokens per turn.
        temperature: of all questions; None for that of a question's category in FastChat, and 0.7 for AlpacaEval. Below
            1e-4, decoding is greedy.
        top_p: as in a `GenerationConfig`; None for the model's own.
        batch_size: number of answers that are generated together. They depend on it by rounding alone.
        chat_template_kwargs: values of the chat template's variables by name.
        progress: show a bar.
        layers: dotted path of the decoder layers, for an unknown architecture.
        model_name: name of the model, if its own name or path does not give it.
        other_weights: accept maps and adapters that were made with other weights than the model's.

    Returns:
        Records of the methods, the base model's first.

    Raises:
        ModelError: a method that does not fit the model, a model in training mode, or one with something attached.
        ValueError: a tokenizer without a chat template, questions that leave no room for answers, methods of one name,
            an invalid setting, or `out` with other settings.
    """
    inner = base_model(model)
    check_eval(inner)
    check_methods(inner, methods)
    check_runs(controls, seeds, batch_size)
    sampling_arguments(temperature or 0.0, top_p)
    if not tokenizer.chat_template:
        advice = (
            "Use the instruction-tuned model, or save the template that the model was tuned with as "
            "chat_template.jinja in its folder."
        )
        raise refusal(ValueError, "The model", "without a chat template", "one with a chat template", advice)
    folder = AnswerFolder(Path(out))
    date = folder.settings["template_date"] if folder.settings else date_of_today(tokenizer)
    runner = _Runner(
        model=inner,
        tokenizer=at_date(tokenizer, date),
        benchmark=benchmark,
        folder=folder,
        temperatures={
            question.id: temperature_of(benchmark, question) if temperature is None else temperature
            for question in benchmark.questions.values()
        },
        sampling=sampling_settings(inner.generation_config, top_p),
        seeds=list(seeds),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        chat_template_kwargs=chat_template_kwargs,
        names={"layers": layers, "model_name": model_name, "other_weights": other_weights},
    )
    with folder.held(), tqdm(unit="turn", desc="check", disable=not progress) as bar:
        settings = runner.settings(date)
        everything, densities = [Method.base()], runner.densities()
        origin = digest_of([FORMAT, settings])
        for method in methods:
            everything += [method, *controls_of(method, controls, inner, layers, densities, origin)]
        runner.check(everything)
        n_turns = len(seeds) * sum(len(question.turns) for question in runner.questions)
        folder.begin(loaded_name(inner), settings, everything, n_turns)
        bar.reset(sum(runner.n_pending(method, rows) for method in everything for rows in runner.passes(method)))
        for method in everything:
            bar.set_description(method.name)
            runner.answer(method, bar)
    return [folder.methods[method.name] for method in everything]


class _Row(NamedTuple):
    """A question that is answered by a seed."""

    question: BenchmarkQuestion
    seed: int


_Key: TypeAlias = tuple[int | str, int, int]


@dataclass
class _Runner:
    """Answers questions by methods on one model."""

    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    benchmark: Benchmark
    folder: AnswerFolder
    temperatures: Mapping[int | str, float]
    sampling: dict[str, Any]
    seeds: list[int]
    max_new_tokens: int
    batch_size: int
    chat_template_kwargs: Mapping[str, Any] | None
    names: dict[str, Any]
    _kept: dict[str, dict[_Key, Turn]] = field(default_factory=dict)

    @cached_property
    def questions(self) -> list[BenchmarkQuestion]:
        """The questions, in their order."""
        return list(self.benchmark.questions.values())

    @cached_property
    def ends(self) -> set[int]:
        """Tokens that end an answer."""
        return end_tokens(self.model, self.tokenizer)

    def settings(self, date: str | None) -> dict[str, Any]:
        """Return what answers depend on besides their method: the same settings, the same answers."""
        config = self.model.generation_config.to_diff_dict()
        return {
            "layout": self.benchmark.layout,
            "questions": digest_of([[q.id, q.category, q.turns] for q in self.questions]),
            "n_questions": len(self.questions),
            "model": {
                "digest": model_digest(self.model),
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "generation_config": {name: config[name] for name in config if name != "transformers_version"},
            },
            "chat_template": digest_of(self.tokenizer.chat_template),
            "chat_template_kwargs": dict(self.chat_template_kwargs or {}),
            "template_date": date,
            "first_turns": digest_of([self.prompt(Method.base(), _Row(q, self.seeds[0]), 0) for q in self.questions]),
            "seeds": self.seeds,
            "max_new_tokens": self.max_new_tokens,
            "temperatures": {q.category: self.temperatures[q.id] for q in self.questions},
            "sampling": self.sampling,
        }

    def check(self, methods: Sequence[Method]) -> None:
        """Raise for a method that does not fit the model, or a question that leaves no room, before the work."""
        if (context := context_length(self.model)) is not None:
            for prefix in dict.fromkeys(method.prefix for method in methods):
                self._check_room(prefix, context)
        check_attaching(self.model, methods, **self.names)

    def _check_room(self, prefix: str, context: int) -> None:
        for question in self.questions:
            prompts = (self.encoded([{"role": "user", "content": turn}], prefix) for turn in question.turns)
            needed = sum(map(len, prompts)) + len(question.turns) * self.max_new_tokens
            if needed > context:
                what = f"Question {question.id} with `max_new_tokens` for each turn"
                accepted = f"up to {context}, the model's positions"
                raise refusal(ValueError, what, f"{needed} tokens", accepted, "Lower `max_new_tokens`.")

    def prompt(self, method: Method, row: _Row, turn: int) -> list[int]:
        """Return the tokens of a question's turn, after the method's own answers to the turns before it."""
        messages = list[dict[str, str]]()
        for n, text in enumerate(row.question.turns[:turn]):
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": self.text(method, row, n)})
        messages.append({"role": "user", "content": row.question.turns[turn]})
        return self.encoded(messages, method.prefix)

    def encoded(self, messages: list[dict[str, str]], prefix: str) -> list[int]:
        """Return the tokens of a conversation, up to where the assistant answers."""
        kwargs = self.chat_template_kwargs
        return encode(self.tokenizer, messages, prefix, chat=False, chat_template_kwargs=kwargs)

    def text(self, method: Method, row: _Row, turn: int) -> str:
        """Return the text of an answer. As FastChat's, it neither begins nor ends with spaces."""
        return decode(self.tokenizer, self.kept(method)[self.key(method, row, turn)].ids).strip()

    def key(self, method: Method, row: _Row, turn: int) -> _Key:
        """Return the key of an answer. Greedy ones are those of the first seed, unless the method itself draws."""
        greedy = self.temperatures[row.question.id] < GREEDY_BELOW
        return row.question.id, self.seeds[0] if greedy and not method.drawn else row.seed, turn

    def kept(self, method: Method) -> dict[_Key, Turn]:
        """Return the answers that there are."""
        if method.name not in self._kept:
            turns = (turn for batch in self.folder.read_batches(method.name) for turn in batch.turns)
            self._kept[method.name] = {(turn.question, turn.seed, turn.turn): turn for turn in turns}
        return self._kept[method.name]

    def passes(self, method: Method) -> list[list[_Row]]:
        """Return the rows that are answered while a method is attached once: all, or by seed if it draws."""
        rows = [_Row(question, seed) for seed in self.seeds for question in self.questions]
        rows = [row for row in rows if row.seed == self.key(method, row, 0)[1]]
        return [[row for row in rows if row.seed == seed] for seed in self.seeds] if method.drawn else [rows]

    def n_pending(self, method: Method, rows: Sequence[_Row]) -> int:
        """Return the number of turns of some rows that are still to be answered."""
        keys = {self.key(method, row, turn) for row in rows for turn in range(len(row.question.turns))}
        return len(keys - self.kept(method).keys())

    def answer(self, method: Method, bar: Any) -> None:
        """Answer all questions by a method, and write its files."""
        for rows in self.passes(method):
            if not self.n_pending(method, rows):
                continue
            self.folder.note_versions(method.name, versions())
            with attached(self.model, method, rows[0].seed, **self.names):
                for turn in range(max(len(row.question.turns) for row in rows)):
                    for temperature, batch in self.batches(method, rows, turn):
                        self.generate(method, turn, temperature, batch)
                        bar.update(len(batch))
        self.folder.finish(method.name, self.files(method))

    def files(self, method: Method) -> dict[str, bytes]:
        """Return the files of a method that has answered all questions, by their names."""
        answers: dict[int | str, list[list[str]]] = {}
        ended: dict[int | str, float] = {}
        for question in self.questions:
            rows, turns = [_Row(question, seed) for seed in self.seeds], range(len(question.turns))
            answers[question.id] = [[self.text(method, row, turn) for turn in turns] for row in rows]
            times = (self.kept(method)[self.key(method, row, turn)].ended for row in rows for turn in turns)
            ended[question.id] = max(times)
        return answer_files(self.benchmark, self.folder.methods[method.name], self.seeds, answers, ended)

    def batches(
        self, method: Method, rows: Sequence[_Row], turn: int
    ) -> Iterator[tuple[float, list[tuple[_Row, list[int]]]]]:
        """Yield temperatures, and rows with prompts that are answered together, the longest first.

        What is kept is left out of its batch, so that the others are those of a run that was not stopped.
        """
        prompts = {row: self.prompt(method, row, turn) for row in rows if turn < len(row.question.turns)}
        for temperature in sorted({self.temperatures[row.question.id] for row in prompts}):
            group = [row for row in prompts if self.temperatures[row.question.id] == temperature]
            group.sort(key=lambda row: len(prompts[row]), reverse=True)
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                pending = [row for row in batch if self.key(method, row, turn) not in self.kept(method)]
                if pending:
                    yield temperature, [(row, prompts[row]) for row in pending]

    def generate(
        self,
        method: Method,
        turn: int,
        temperature: float,
        batch: Sequence[tuple[_Row, list[int]]],
    ) -> None:
        """Answer one turn of some questions together, and keep the answers."""
        rows, prompts = zip(*batch, strict=True)
        context = context_length(self.model)
        room = self.max_new_tokens if context is None else max(1, context - max(map(len, prompts)))
        names = [f"{row.seed}/{row.question.id}/{turn}" for row in rows]
        arguments = decoding(temperature, self.sampling, names, min(self.max_new_tokens, room))
        began = time.perf_counter()
        responses = continue_prompts(self.model, self.tokenizer, prompts, self.ends, **arguments)
        seconds, ended = time.perf_counter() - began, time.time()
        unsteered: list[bool | None] = [*unsteered_prompts(attached_steerings(self.model))] or [None] * len(rows)
        turns = [
            Turn(row.question.id, row.seed, turn, response.ids, response.ids[-1] not in self.ends, empty, ended)
            for row, response, empty in zip(rows, responses, unsteered, strict=True)
        ]
        self.folder.add(method.name, TurnBatch(turns, seconds))
        self.kept(method).update({(kept.question, kept.seed, kept.turn): kept for kept in turns})

    def densities(self) -> Callable[[FrozenSAE], Tensor]:
        """Return a function of an SAE: the share of tokens of the base model's answers on which its latents are active.

        The answers are those of the first seed, which are there when the function is called.
        """

        @cache
        def measure(sae: FrozenSAE) -> Tensor:
            base, rows = Method.base(), [_Row(question, self.seeds[0]) for question in self.questions]
            responses = [
                Response(self.prompt(base, row, turn), self.kept(base)[self.key(base, row, turn)].ids)
                for row in rows
                for turn in range(len(row.question.turns))
            ]
            return response_densities(self.model, sae, responses, layers=self.names["layers"])

        return measure
