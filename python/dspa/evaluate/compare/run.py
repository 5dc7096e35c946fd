"""The comparison: every method answers the same prompts by every seed, and scores the same triples."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.baselines.junction.processor import JunctionProcessor
from dspa.baselines.random_set import response_densities
from dspa.data.messages import Text
from dspa.data.prompts import check_prompt
from dspa.data.triples import Triple, load_triples
from dspa.errors import ModelError, refusal
from dspa.evaluate.compare.comparison import Comparison
from dspa.evaluate.compare.measures import MARGIN, Counter, check_counters, count
from dspa.evaluate.compare.methods import BASE, CONTROLS, OF_GATES, Method, controls_of
from dspa.evaluate.compare.operations import operations_per_token
from dspa.evaluate.compare.prompts import encode, spoken, triple_with_prefix
from dspa.evaluate.compare.runs import FORMAT, Answers, RunStore, TripleScores
from dspa.evaluate.generation import (
    check_prompts,
    continue_prompts,
    decode,
    end_tokens,
    padding_token,
    sampling_arguments,
    unsteered_prompts,
)
from dspa.evaluate.responses import (
    Response,
    batches,
    generate_given,
    log_probabilities,
    padded,
    responses_of,
    teacher_forced,
)
from dspa.evaluate.scores import score_responses
from dspa.files import digest_of
from dspa.models.attachment import Attachment
from dspa.models.layers import CausalLM, base_model, check_eval, loaded_name
from dspa.models.sources import model_digest
from dspa.saes.frozen import FrozenSAE
from dspa.steering.dspa import Steering, attached_steerings
from dspa.steering.gated import Gated
from dspa.version import __version__


def compare(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Text],
    methods: Iterable[Method],
    *,
    held_out: Iterable[Triple | Mapping[str, Any]] | str | Path | None = None,
    counters: Mapping[str, Counter] | None = None,
    controls: Sequence[str] = CONTROLS,
    prefer: str | None = None,
    max_perplexity: float = 1.15,
    seeds: Sequence[int] = (0, 1, 2),
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_p: float | None = None,
    batch_size: int = 16,
    batch_tokens: int = 8192,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    results: str | Path | None = None,
    progress: bool = True,
    layers: str | None = None,
    model_name: str | None = None,
    other_weights: bool = False,
) -> Comparison:
    """Compare methods on the same prompts, seeds and held-out triples, with the base model and with controls.

    The base model comes first, and each method is followed by its controls. Answers are drawn with the same random
    numbers for every method. A run of a method and seed is kept as it ends.

    Args:
        model: a transformers causal language model in evaluation mode, to which nothing is attached.
        tokenizer: the model's tokenizer.
        prompts: texts, or lists of messages.
        methods: what `Method.dspa`, `.joint`, `.static`, `.adapted`, `.vector`, `.tuned`, `.prefixed`, `.gated` and
            `.junction` made.
        held_out: preference triples that no method was made with, to measure log-probabilities on.
        counters: by name, a compiled regular expression, whose matches in an answer are counted, or a function of
            prompt (of messages, the text of the last one) and answer.
        controls: those to run for methods that have them: of DSPA "random set", "shuffled map" and "wrong layer", of
            adapters "random latents", of vectors "random vector", of tuned models "random change", and of methods with
            a gate "random gate", which lets the same share of tokens through, and "complement gate".
        prefer: measure whose gain decides the recommendation: "margin" (default where `held_out` is given), or a
            counter, of which more is better.
        max_perplexity: largest perplexity of a recommended method's answers, as a multiple of that of the base model's.
        seeds: of sampling; the first alone for greedy decoding.
        max_new_tokens: largest number of tokens per answer.
        temperature: 0 for greedy decoding.
        top_p: as in a `GenerationConfig`; None for the model's own.
        batch_size: number of answers that are generated together. The draws depend on it.
        batch_tokens: tokens per batch, padding included, in passes over given texts.
        chat: put prompts that are text into the chat template, as a user's turn.
        chat_template_kwargs: values of the chat template's variables by name, for conversations.
        results: file to write everything to, as JSON. Runs with the same inputs that are in it, or that a stopped
            comparison left next to it, are not run again.
        progress: show a bar.
        layers: dotted path of the decoder layers, for an unknown architecture.
        model_name: name of the model, if its own name or path does not give it.
        other_weights: accept maps and adapters that were made with other weights than the model's.

    Raises:
        ModelError: a method that does not fit the model, a model in training mode, or one with something attached.
        PreferenceError: a bad triple, or a prompt that is neither text nor messages.
        ValueError: no prompts or methods, methods of one name, an unknown control or `prefer`, an invalid setting, or
            `results` of something else.
    """
    if isinstance(prompts, str):
        accepted = "a list of texts, or of lists of messages"
        raise refusal(
            ValueError, "`prompts`", f"the text {prompts[:60]!r}", accepted, "Put a single prompt into a list."
        )
    if isinstance(methods, Method):
        raise refusal(ValueError, "`methods`", "a single method", "a list of methods")
    inner, prompts, methods, counters = base_model(model), list(prompts), list(methods), dict(counters or {})
    check_eval(inner)
    triples = None if held_out is None else list(load_triples(held_out))
    _check(inner, prompts, methods, counters, controls, prefer, max_perplexity, seeds, triples, batch_size)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "batch_size": batch_size,
        "chat": chat,
        "chat_template_kwargs": None if chat_template_kwargs is None else dict(chat_template_kwargs),
        "model": {
            "name": loaded_name(inner),
            "digest": model_digest(inner),
            "dtype": str(inner.dtype).removeprefix("torch."),
            "generation_config": inner.generation_config.to_diff_dict(),
        },
    }
    runner = _Runner(
        inner,
        tokenizer,
        prompts,
        triples or [],
        settings,
        layers,
        model_name,
        other_weights,
        batch_tokens,
        RunStore.open(None if results is None else Path(results)),
    )
    with runner.store.held():
        seeds = list(seeds) if temperature > 0 else list(seeds)[:1]
        everything, densities = [Method.base()], runner.densities(seeds[0])
        origin = runner.answers_key(everything[0], seeds[0])
        for method in methods:
            origin_of = digest_of([runner.answers_key(method, seed) for seed in seeds]) if method.gate else origin
            share = partial(runner.share, seeds=seeds)
            everything += [method, *controls_of(method, controls, inner, layers, densities, origin_of, share)]
        answers: dict[str, list[Answers]] = {}
        scores: dict[str, list[TripleScores]] = {}
        for method, seed in runner.work(everything, seeds, progress):
            drawn = runner.answers(method, seed)
            if not answers:
                # A function that counts nothing is told of now, and not after all runs.
                for name, counter in counters.items():
                    count(name, counter, spoken(prompts[0]), decode(tokenizer, drawn.ids[0]))
            answers.setdefault(method.name, []).append(drawn)
            if triples and method.processor is None and (method.drawn or seed == seeds[0]):
                scores.setdefault(method.name, []).append(runner.scores(method, seed))
        comparison = Comparison(
            methods=everything,
            prompts=[spoken(prompt) for prompt in prompts],
            seeds=seeds,
            settings={**settings, "versions": versions(), "n_triples": len(triples or [])},
            answers=answers,
            scores=scores,
            texts={
                name: [[decode(tokenizer, ids) for ids in run.ids] for run in runs] for name, runs in answers.items()
            },
            ends=runner.ends,
            counters=counters,
            prefer=prefer or (MARGIN if triples else None),
            max_perplexity=max_perplexity,
            tokenizer=tokenizer,
            operations={
                method.name: operations_per_token(
                    inner, method, answers[method.name], runner.encoded(method.prefix), layers
                )
                for method in everything
                if not method.control_of or method.settings["control"] in OF_GATES
            },
        )
        if results is not None:
            comparison.save(results, runner.store.runs, progress=progress)
            runner.store.finish()
        return comparison


def versions() -> dict[str, str]:
    """Return the versions of what an answer depends on."""
    return {
        "dspa-kernels": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _check(
    model: CausalLM,
    prompts: Sequence[Text],
    methods: Sequence[Method],
    counters: Mapping[str, Counter],
    controls: Sequence[str],
    prefer: str | None,
    max_perplexity: float,
    seeds: Sequence[int],
    triples: Sequence[Triple] | None,
    batch_size: int,
) -> None:
    """Raise for what cannot be compared, before the model runs."""
    if not prompts:
        raise refusal(ValueError, "`prompts`", "empty", "one prompt or more")
    for number, prompt in enumerate(prompts, start=1):
        check_prompt(f"prompt {number}", prompt)
    if not methods:
        raise refusal(ValueError, "`methods`", "empty", "one method or more besides the base model")
    check_methods(model, methods, processors=True)
    check_runs(controls, seeds, batch_size)
    if not max_perplexity > 0:
        raise refusal(ValueError, "`max_perplexity`", max_perplexity, "a number > 0, such as 1.15")
    check_counters(counters)
    accepted = [*counters, *([MARGIN] if triples else [])]
    if prefer is not None and prefer not in accepted:
        advice = "Give held-out triples." if prefer == MARGIN else ""
        raise refusal(ValueError, "`prefer`", repr(prefer), ", ".join(accepted) or "nothing without counters", advice)


def check_runs(controls: Sequence[str], seeds: Sequence[int], batch_size: int) -> None:
    """Raise `ValueError` for unknown controls, seeds that cannot be used, or a batch of nothing."""
    if unknown := sorted(set(controls) - set(CONTROLS)):
        raise refusal(ValueError, "`controls`", repr(unknown[0]), ", ".join(CONTROLS))
    if not isinstance(seeds, Sequence):
        raise refusal(ValueError, "`seeds`", repr(seeds), "a list of whole numbers", "For 3 seeds write range(3).")
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**31 for seed in seeds):
        raise refusal(ValueError, "`seeds`", list(seeds), "one or more different whole numbers from 0 to 2^31 - 1")
    if batch_size < 1:
        raise refusal(ValueError, "`batch_size`", batch_size, "a whole number >= 1")


def check_methods(model: CausalLM, methods: Sequence[Method], *, processors: bool = False) -> None:
    """Check the methods of a comparison with the base model.

    Args:
        model: the model.
        methods: the methods.
        processors: True where methods may change logits, as junction steering does.

    Raises:
        ModelError: a model to which something is attached.
        ValueError: something else than methods, or two of one name.
    """
    if Attachment.of(model).attached:
        got = f"steered already ({', '.join(type(other).__name__ for other in Attachment.of(model).attached)})"
        raise refusal(ModelError, "`model`", got, "one to which nothing is attached", "Call dspa.detach(model) first.")
    if strays := [method for method in methods if not isinstance(method, Method)]:
        made = "what Method.dspa, .joint, .static, .adapted, .vector, .tuned, .prefixed, .gated and .junction make"
        raise refusal(ValueError, "`methods`", f"with a {type(strays[0]).__name__}", made)
    if not processors and (changing := [method.name for method in methods if method.processor is not None]):
        accepted = "methods that change residuals, weights or prompts"
        raise refusal(ValueError, "`methods`", f"with {changing[0]!r}, which changes logits", accepted)
    names = [BASE, *(method.name for method in methods)]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise refusal(ValueError, "`methods`", f"with the name {doubled[0]!r} twice", "methods of different names")


@dataclass
class _Runner:
    """Runs methods on one model."""

    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Text]
    triples: list[Triple]
    settings: dict[str, Any]
    layers: str | None
    model_name: str | None
    other_weights: bool
    batch_tokens: int
    store: RunStore
    bar: Any = None
    _encoded: dict[str, list[list[int]]] = field(default_factory=dict)
    _responses: dict[str, list[Response]] = field(default_factory=dict)

    @cached_property
    def ends(self) -> set[int]:
        """Tokens that end an answer."""
        return end_tokens(self.model, self.tokenizer)

    @property
    def pad(self) -> int:
        """Token with which prompts are padded."""
        return padding_token(self.tokenizer, self.ends)

    @cached_property
    def order(self) -> list[int]:
        """Numbers of the prompts in the order in which they are answered, the longest first."""
        plain = self.encoded("")
        return sorted(range(len(plain)), key=lambda n: len(plain[n]), reverse=True)

    def encoded(self, prefix: str) -> list[list[int]]:
        """Return the token ids of all prompts, after a prefix."""
        if prefix not in self._encoded:
            options = {name: self.settings[name] for name in ("chat", "chat_template_kwargs")}
            self._encoded[prefix] = [encode(self.tokenizer, prompt, prefix, **options) for prompt in self.prompts]
        return self._encoded[prefix]

    def responses(self, prefix: str) -> list[Response]:
        """Return both responses of all triples, after a prefix, in turn."""
        if prefix not in self._responses:
            triples = [triple_with_prefix(triple, prefix) for triple in self.triples]
            kwargs = self.settings["chat_template_kwargs"]
            conversations = not all(isinstance(triple.prompt, str) for triple in triples)
            self._responses[prefix] = responses_of(
                self.model, self.tokenizer, triples, chat_template_kwargs=kwargs if conversations else None
            )
        return self._responses[prefix]

    def check(self, methods: Sequence[Method]) -> None:
        """Raise for a method that does not fit the model, or prompts and triples that do not, before the work."""
        special = set(self.tokenizer.all_special_ids)
        for prefix in dict.fromkeys(method.prefix for method in methods):
            check_prompts(self.model, self.encoded(prefix), self.settings["max_new_tokens"], special=special)
            if self.triples:
                self.responses(prefix)
        check_attaching(self.model, methods, **self.names)
        for method in methods:
            if method.processor is not None:
                method.processor(self.model, self.pad)

    @property
    def names(self) -> dict[str, Any]:
        """Arguments of attaching."""
        return {"layers": self.layers, "model_name": self.model_name, "other_weights": self.other_weights}

    def attached(self, method: Method, seed: int) -> AbstractContextManager[None]:
        """Return the context in which a method acts on the model."""
        return attached(self.model, method, seed, **self.names)

    def work(self, methods: Sequence[Method], seeds: Sequence[int], progress: bool) -> Iterator[tuple[Method, int]]:
        """Yield every method and seed, with a bar that names the method.

        It counts the answers still to be written, which take most of the time. Scores are in its pace only.
        """
        total = len(methods) * len(seeds) * len(self.prompts)
        with tqdm(total=total, unit="answer", desc="check", disable=not progress) as self.bar:
            self.check(methods)
            for method in methods:
                for seed in seeds:
                    self.bar.set_description(f"{method.name}, seed {seed}")
                    yield method, seed

    def answers_key(self, method: Method, seed: int) -> str:
        """Return the digest of all that the answers of a method by one seed depend on."""
        inputs = [self.settings, self.encoded(method.prefix), method.digest, seed]
        return digest_of([FORMAT, __version__, "answers", *inputs])

    def answers(self, method: Method, seed: int) -> Answers:
        """Return the answers of a method by one seed, from the store where they are there."""
        prompts, key = self.encoded(method.prefix), self.answers_key(method, seed)
        if (run := self.store.get(key, Answers)) is not None:
            # As a step that takes no time it would spoil the estimate.
            self.bar.total -= len(prompts)
            return run
        settings = self.settings
        arguments = {
            "max_new_tokens": settings["max_new_tokens"],
            **sampling_arguments(settings["temperature"], settings["top_p"]),
        }
        texts: dict[int, Response] = {}
        touched: dict[int, int] = {}
        seconds = 0.0
        with self.attached(method, seed):
            for start in range(0, len(prompts), settings["batch_size"]):
                numbers = self.order[start : start + settings["batch_size"]]
                # Different for every seed and batch, and the same for every method. torch's generator on a CPU uses 32
                # bits of a seed.
                torch.manual_seed(random.Random(f"{seed}/{start}").getrandbits(32))
                began = time.perf_counter()
                batch = [prompts[n] for n in numbers]
                processor = None if method.processor is None else method.processor(self.model, self.pad)
                processors = {} if processor is None else {"logits_processor": [processor]}
                responses = continue_prompts(self.model, self.tokenizer, batch, self.ends, **arguments, **processors)
                seconds += time.perf_counter() - began
                texts |= zip(numbers, responses, strict=True)
                if (opened := _opened(self.model, processor)) is not None:
                    for n, row, response in zip(numbers, opened, responses, strict=True):
                        touched[n] = int(row[: len(response.ids)].sum())
                self.bar.update(len(numbers))
            written = [texts[n] for n in range(len(prompts))]
            edited, unsteered = None, None
            if steerings := attached_steerings(self.model):
                edited, unsteered = self._edits(steerings, written)
        plain = [Response(prompt, text.ids) for prompt, text in zip(self.encoded(""), written, strict=True)]
        shares = [touched[n] for n in range(len(prompts))] if touched else None
        run = Answers([text.ids for text in written], self._nll(plain), edited, unsteered, seconds, shares)
        self.store.add(key, run)
        return run

    def share(self, method: Method, seeds: Sequence[int]) -> float:
        """Return the share of the tokens of a method's answers that its gate let through. They are in the store."""
        runs = [self.store.get(self.answers_key(method, seed), Answers) for seed in seeds]
        touched = sum(sum(run.touched or []) for run in runs if run is not None)
        return touched / sum(len(ids) for run in runs if run is not None for ids in run.ids)

    def scores(self, method: Method, seed: int) -> TripleScores:
        """Return the scores of the triples under a method, from the store where they are there."""
        responses = self.responses(method.prefix)
        ids = [[response.prompt, response.ids] for response in responses]
        draw = seed if method.drawn else None
        key = digest_of([FORMAT, __version__, "scores", self.settings["model"], ids, method.digest, draw])
        if (run := self.store.get(key, TripleScores)) is None:
            unsteered = [False] * len(responses)
            with self.attached(method, seed):
                steerings = attached_steerings(self.model)

                def note(numbers: list[int]) -> None:
                    if steerings:
                        for n, empty in zip(numbers, unsteered_prompts(steerings), strict=True):
                            unsteered[n] = empty

                scored = score_responses(
                    self.model, responses, batch_tokens=self.batch_tokens, progress=False, on_batch=note
                )
            empty = unsteered[0::2] if steerings else None
            run = TripleScores(scored.chosen.tolist(), scored.rejected.tolist(), empty)
            self.store.add(key, run)
        return run

    @torch.no_grad()
    def _edits(self, steerings: Sequence[Steering], texts: Sequence[Response]) -> tuple[list[list[int]], list[bool]]:
        """Return the numbers of each text's tokens that were predicted from an edited residual, and its `unsteered`.

        The texts are read once more for it, so that generation is not slowed down.
        """
        edited, unsteered = [list[int]() for _ in texts], [False] * len(texts)
        for numbers in batches(texts, self.batch_tokens):
            batch = [texts[n] for n in numbers]
            with ExitStack() as blocks:
                traces = [blocks.enter_context(steering.recording()) for steering in steerings]
                if any(steering.stepwise for steering in steerings):
                    generate_given(self.model, batch)
                else:
                    blocks.enter_context(teacher_forced(self.model, batch))
                    self.model(**padded(self.model, batch), use_cache=False, logits_to_keep=1)
            for row, position in sorted({(edit.row, edit.position) for trace in traces for edit in trace}):
                token = position - len(batch[row].prompt) + 1
                # The last token predicts what was not generated any more.
                if 0 <= token < len(batch[row].ids):
                    edited[numbers[row]].append(token)
            for n, empty in zip(numbers, unsteered_prompts(steerings), strict=True):
                unsteered[n] = empty
        return edited, unsteered

    def _nll(self, responses: Sequence[Response]) -> list[float]:
        """Return minus the log-probability of each response under the model as it is, the sum over its tokens."""
        nll = [0.0] * len(responses)
        for numbers in batches(responses, self.batch_tokens):
            means = log_probabilities(self.model, [responses[n] for n in numbers])
            for n, mean in zip(numbers, means.tolist(), strict=True):
                nll[n] = -mean * len(responses[n].ids)
        return nll

    def densities(self, seed: int) -> Callable[[FrozenSAE], Tensor]:
        """Return a function of an SAE: the share of tokens of the base model's answers on which its latents are active.

        Args:
            seed: of the answers, which are in the store when the function is called.
        """

        @cache
        def measure(sae: FrozenSAE) -> Tensor:
            answers = self.store.get(self.answers_key(Method.base(), seed), Answers)
            assert answers is not None
            responses = [Response(*pair) for pair in zip(self.encoded(""), answers.ids, strict=True)]
            return response_densities(self.model, sae, responses, layers=self.layers, batch_tokens=self.batch_tokens)

        return measure


def _opened(model: CausalLM, processor: JunctionProcessor | None) -> Tensor | None:
    """Return the tokens [R, N] of the latest answers that a gate let through or that were junctions, if there are."""
    if processor is not None:
        return torch.stack(processor.junctions, dim=1)
    # Those of several maps of one method have one gate.
    gated = (other.decisions for other in Attachment.of(model).attached if isinstance(other, Gated))
    return next((decisions.opened for decisions in gated if decisions is not None), None)


def check_attaching(model: CausalLM, methods: Sequence[Method], **names: Any) -> None:
    """Raise for a method that does not fit the model.

    Args:
        model: a model to which nothing is attached.
        methods: the methods.
        names: as for `attached`.
    """
    for method in methods:
        # What a control draws from is not known yet. It fits where its method does.
        if method.control_of == "" or not method.drawn:
            with attached(model, method, 0, **names):
                pass


@contextmanager
def attached(
    model: CausalLM,
    method: Method,
    seed: int,
    *,
    layers: str | None = None,
    model_name: str | None = None,
    other_weights: bool = False,
) -> Iterator[None]:
    """Attach what a method steers by, and give the model its weights, within a `with` block.

    Args:
        model: a model to which nothing is attached.
        method: the method.
        seed: of the draw, for a method that is another one for each seed.
        layers: as for `Attachable.attach`, like those after it.
        model_name: name of the model, if its own name or path does not give it.
        other_weights: accept a map or adapter that was made with other weights.
    """
    with weights_replaced(model, method, seed):
        if method.attachable is None:
            yield
            return
        names: dict[str, Any] = {"layers": layers, "model_name": model_name}
        with method.attachable(seed).attach(model, **names, other_weights=other_weights):
            yield


@contextmanager
def weights_replaced(model: CausalLM, method: Method, seed: int) -> Iterator[None]:
    """Give the model the weights of a method within a `with` block, if it has some.

    Args:
        model: the model.
        method: the method.
        seed: of the draw, for a method that is another one for each seed.

    Raises:
        ModelError: weights of a model of another architecture.
    """
    own = dict(model.named_parameters())
    others = method.weights
    if others is None:
        yield
        return
    shapes, mine = ({name: tuple(p.shape) for name, p in tensors.items()} for tensors in (others, own))
    if different := sorted(name for name in {*shapes, *mine} if shapes.get(name) != mine.get(name)):
        name = different[0]
        got = f"with {name} of shape {shapes.get(name)}, where the compared model's is {mine.get(name)}"
        advice = "Merge the weights of a PEFT model before."
        raise refusal(ModelError, f"The model of the method {method.name!r}", got, "the same architecture", advice)
    before = {name: parameter.data for name, parameter in own.items()}
    generator = torch.Generator().manual_seed(seed)
    try:
        for name, parameter in own.items():
            other = others[name].to(parameter.device)
            if method.redraw is not None:
                other = before[name].float() + method.redraw(other.float() - before[name].float(), generator)
            parameter.data = other.to(parameter.dtype)
        yield
    finally:
        for name, parameter in own.items():
            parameter.data = before[name]
