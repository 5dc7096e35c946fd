"""Attaching to a model, and the keyword tensors that carry each prompt's plan through `generate()`.

Nothing here guesses what a call of the model is. A row's plan is made from its whole prompt before generation starts.
It reaches the layers as keyword tensors with one row per sequence, which `generate()` itself repeats for beams and
return sequences. A token is then gated by its position alone. So the same row is changed in the same way alone, padded,
in chunks, with or without a cache, and in a compiled model.

Threads and asyncio tasks may call one model at the same time. What belongs to a call travels with it, among the
keywords or in a scope of its thread or task, and not in the object that acts.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dspa.errors import ModelError, refusal
from dspa.models.layers import NOT_FINITE, CausalLM, base_model, check_eval, decoder_layers, hidden_size
from dspa.models.prompts import Prompts, generate_prompts
from dspa.models.reading import READING, check_residual, forget_graphs, hidden, read_layers
from dspa.models.scopes import S, Scope, innermost, opened
from dspa.models.sources import check_weights

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList

ATTRIBUTE = "_dspa_attachment"
# The method whose signature says which keywords a model takes, and which of ours it takes by how many blocks.
PREPARE, ACCEPTED = "prepare_inputs_for_generation", "_dspa_accepted"
# The method that returns what `generate()` changes logits by, with the settings of the call filled in.
PROCESSORS = "_get_logits_processor"
# The method with which `generate_batch()` and a paged cache begin.
CONTINUOUS = "init_continuous_batching"
# What is refused with several tokens per pass, what is accepted, and advice.
STEPWISE = (
    "given, with a gate that reads the logits before each token",
    "generation of one token at a time",
    "Leave it out, or use a RandomGate or FirstTokens.",
)
# Held while threads change what they share. Not an attribute of an `Attachable`, since a lock cannot be copied.
LOCK = threading.Lock()
# A child of fork() has no other thread that could release it.
os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


@dataclass(eq=False)
class Disabled(Scope):
    """A block in which the owner leaves residuals as they are."""


@dataclass(eq=False)
class Call(Scope):
    """A call of `generate()`, or a block of forward passes, in which the owner has to act.

    Attributes:
        acted: its hook has run.
    """

    acted: bool = False

    def __deepcopy__(self, _memo: object) -> Call:
        # `generate()` copies the keywords of a call for an assistant.
        return self

    @property
    def observes(self) -> bool:
        """True if it has to `observe` logits."""
        return False

    def begin(self, ends: Sequence[int], n_new: int) -> None:
        """Begin to generate: `ends` are the tokens that end a row, and `n_new` is the largest number of new ones."""

    def observe(self, ids: Tensor, logits: Tensor) -> None:
        """Read the logits [R, V] from which the token after `ids` [R, T] is chosen, before anything changes them."""

    def step_keywords(self, ids: Tensor, n_columns: int, n_total: int) -> dict[str, Tensor]:
        """Return keywords of the next pass of `generate()` alone, made outside of what is compiled.

        Args:
            ids: all tokens so far, with those of the pass [R, T]; while a prompt is read in chunks, those of the chunk.
            n_columns: number of columns of the pass.
            n_total: number of all columns up to the end of the pass.
        """
        return {}


@dataclass(eq=False)
class Generation(Scope):
    """A call of `generate()` of the owner's model.

    Attributes:
        logits: those of the latest pass that was not compiled.
        calls: those of all that acts in it.
    """

    logits: Tensor | None = None
    calls: list[Call] = field(default_factory=list)

    def begin(self, config: GenerationConfig, n_ids: int) -> None:
        """Tell the calls how their rows end.

        Args:
            config: the settings of the call, with all defaults filled in.
            n_ids: number of columns of its `input_ids`.

        Raises:
            ModelError: tokens that are looked up, where they have to be read one at a time.
        """
        ends = config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        if config.prompt_lookup_num_tokens and any(call.observes for call in self.calls):
            raise refusal(ModelError, "`prompt_lookup_num_tokens`", *STEPWISE)
        for call in self.calls:
            call.begin(ends, config.max_length - n_ids)

    def observe(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Let the calls read logits, as a processor of logits that changes none."""
        for call in self.calls:
            if call.observes:
                call.observe(ids, logits)
        return logits

    def check(self) -> None:
        """Raise `ModelError` if the logits are NaN, as they stay for all tokens after one that is NaN in some layer."""
        if self.logits is not None and bool(self.logits.isnan().any()):
            raise ModelError(
                "The model's logits are NaN, so that the text means nothing: what is attached moved a residual so far "
                f"that a later layer overflowed, or the model does so by itself. {NOT_FINITE} Or lower the strength."
            )


class Attachable(ABC):
    """Something that changes the residual at the output of one layer of one model, while it is attached.

    A subclass has `layer`, `_prepare()` and `_edit()`. One that needs a plan per prompt adds `keywords` and
    `call_keywords()`; its `_edit()` finds the plan among the keywords of the layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._attachment: Attachment | None = None
        self._layers: str | None = None
        self._width = 0
        self._undo: list[Callable[[], None]] = []
        # Numbers of open scopes by kind, in all threads.
        self._n_open: dict[str, int] = {}
        # A compiled graph has run the hook. It cannot note that in the call.
        self._graph_acted = False

    def attach(
        self: A,
        model: nn.Module,
        *,
        layers: str | None = None,
        model_name: str | None = None,
        other_weights: bool = False,
    ) -> A:
        """Act on `model` until `detach()`, or until the end of a `with` block.

        Args:
            model: a transformers causal language model, or one in a PEFT wrapper.
            layers: dotted path of its list of decoder layers, for an unknown architecture.
            model_name: name of the model, if its own name or path does not give it.
            other_weights: accept a model whose weights are not those that this was made with: tuned, merged, quantized
                or in float16. What `dspa.models.sources.model_digest` sees is compared, where it is recorded.

        Raises:
            ModelError: this is attached already, or another of its kind is attached to the same layer.
            ModelError: a model of other weights.
            ModelError: a model of an unknown architecture, or one that this does not fit.
        """
        inner, kind = base_model(model), type(self).__name__
        if self._attachment is not None:
            holder = type(self._attachment.model).__name__
            raise ModelError(f"This {kind} is attached to a {holder} already: detach() it first.")
        stack, attachment = decoder_layers(inner, layers), Attachment.of(inner)
        if any(isinstance(other, type(self)) and other.layer == self.layer for other in attachment.attached):
            raise ModelError(f"Layer {self.layer} of this model has another {kind}: dspa.detach(model) first.")
        check_weights(f"The {kind} was made with", self.model_digest, inner, other_weights=other_weights)
        self._prepare(inner, stack, model_name)
        check_residual(inner, self.layer, layers, keywords=bool(self.keywords))
        self._width = hidden_size(inner)
        self._undo = [attachment.add(self)]
        self._undo += [handle.remove for handle in self._register_hooks(inner, stack[self.layer])]
        self._attachment, self._layers = attachment, layers
        self._forget_graphs()
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """Refuse to be copied or pickled while attached: the copy would hold the model, and detach the original."""
        if self._attachment is not None:
            raise ModelError(f"An attached {type(self).__name__} cannot be copied or pickled: detach() it first.")
        return super().__reduce_ex__(protocol)

    def detach(self) -> None:
        """Leave the model as it was. Does nothing when not attached."""
        if self._attachment is not None:
            self._forget_graphs()
        while self._undo:
            self._undo.pop()()
        self._attachment = None

    def __enter__(self: A) -> A:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def enabled(self) -> bool:
        """False within `disabled()`."""
        return self._innermost(Disabled) is None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Leave residuals as they are within a `with` block: the base model runs.

        This is so for the calls of the same thread or asyncio task. Those of others are changed as before.
        """
        with self._opened(Disabled(self)):
            yield

    @contextmanager
    def _opened(self, scope: S) -> Iterator[S]:
        """Open a scope of this object within a `with` block."""
        kind = type(scope).__name__
        with LOCK:
            self._n_open[kind] = self._n_open.get(kind, 0) + 1
        try:
            with opened(scope):
                yield scope
        finally:
            with LOCK:
                self._n_open[kind] -= 1

    def _innermost(self, kind: type[S]) -> S | None:
        """Return the innermost open scope of a kind in this thread or task. No graph breaks if no thread has one."""
        if torch.compiler.is_compiling() and not self._n_open.get(kind.__name__):
            return None
        return innermost(self, kind)

    def responses(self, starts: Sequence[int] | Tensor) -> AbstractContextManager[None]:
        """Act on plain forward passes over prompts with given responses, within a `with` block.

        Args:
            starts: column of each row's first response token [B].
        """
        del starts
        return nullcontext()

    def acts_in(self, model: nn.Module) -> bool:
        """Return True if this is attached to `model`."""
        return self._attachment is not None and self._attachment.model is base_model(model)

    def check_attached(self, model: nn.Module) -> None:
        """Raise `ModelError` unless this is attached to `model`."""
        if not self.acts_in(model):
            name = type(self).__name__
            raise ModelError(f"The {name} is not attached to this model, so it would change nothing: attach it first.")

    @contextmanager
    def checked_call(self) -> Iterator[None]:
        """Raise `ModelError` at the end of a call of the model in which the hook did not run."""
        if self._attachment is not None:
            # The attention implementation and the mode may have been changed since attach().
            decoder_layers(self._attachment.model, self._layers)
            check_eval(self._attachment.model)
        with self._opened(self._new_call()) as call:
            with LOCK:
                if self._n_open[type(call).__name__] == 1:
                    self._graph_acted = False
            yield
            if not (call.acted or self._graph_acted):
                raise ModelError(
                    f"The hook at layer {self.layer} did not run, so the {type(self).__name__} changed nothing. A "
                    "model compiled before attach() does not see the hook: attach first, or call "
                    "torch.compiler.reset() and compile again. Nor does a generate() that skips the model's layers."
                )

    def _new_call(self) -> Call:
        """Return the scope of a new call."""
        return Call(self)

    # What a subclass defines

    @property
    @abstractmethod
    def layer(self) -> int:
        """Index of the decoder layer whose output is changed."""

    @abstractmethod
    def _prepare(self, model: CausalLM, stack: nn.ModuleList, model_name: str | None) -> None:
        """Raise `ModelError` unless this fits `model`, then move to where the layers of `stack` compute."""

    @abstractmethod
    def _edit(self, h: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Return the changed residual [B, T, d_in], or None to leave it as it is.

        Args:
            h: residual at the output of the layer [B, T, d_in].
            kwargs: keywords that the layer was called with.
        """

    @property
    def stepwise(self) -> bool:
        """True if the tokens of an answer have to be read one at a time, so that `responses()` is refused."""
        return False

    @property
    def model_digest(self) -> str:
        """Digest of the weights that this was made with (`sources.model_digest`), empty if unknown."""
        return ""

    @property
    def keywords(self) -> tuple[str, ...]:
        """Names of the keywords that a call carries, new at each `attach()`."""
        return ()

    @property
    def reads(self) -> tuple[int, ...]:
        """Layers whose residuals of the unsteered prompt its plans are made from."""
        return ()

    def call_keywords(self, prompts: Prompts | None) -> dict[str, Any]:
        """Return the keywords of a call: the plans of its prompts as tensors, one row per prompt.

        Args:
            prompts: the prompts, or None for a call within `disabled()`.
        """
        return {}

    def pass_keywords(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], read: dict[tuple[int, ...], dict[int, Tensor]]
    ) -> dict[str, Any]:
        """Return the keywords that a forward pass lacks: all of its plan in one outside of `generate()`.

        Args:
            args: positional arguments of the model.
            kwargs: its keywords.
            read: `Prompts.residuals` of the pass, by where the responses start. It is extended.
        """
        return {}

    def _acts_on(self, kwargs: dict[str, Any]) -> bool:
        """Return True for a pass that is to be changed, by the keywords that the layer was called with."""
        return self.enabled

    @property
    def unsaved(self) -> str:
        """Warning of what `save_pretrained` would lose, and what to do about it; empty if nothing."""
        return ""

    def _register_hooks(self, model: CausalLM, layer: nn.Module) -> list[RemovableHandle]:
        return [layer.register_forward_hook(self._change_output, prepend=True, with_kwargs=True)]

    def _change_output(self, _layer: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        edited = self._edit(hidden(output, self._width), kwargs) if self._acts_on(kwargs) else None
        if edited is None:
            return None
        if torch.compiler.is_compiling():
            self._graph_acted = True
        elif call := innermost(self, Call):
            call.acted = True
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def _forget_graphs(self) -> None:
        """Have compiled graphs compiled anew, unless they are told apart by the keywords."""
        if not self.keywords:
            forget_graphs()


A = TypeVar("A", bound=Attachable)


class Attachment:
    """Everything attached to one model, and the `generate()` that carries its plans."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.attached: list[Attachable] = []
        self._undo = ExitStack()

    @classmethod
    def of(cls, model: CausalLM) -> Attachment:
        """Return the attachment of `model`, a new one if it has none."""
        attachment = model.__dict__.get(ATTRIBUTE)
        return attachment if isinstance(attachment, Attachment) else cls(model)

    def add(self, attachable: Attachable) -> Callable[[], None]:
        """Carry the plans of `attachable` from now on; returns the function that ends it."""
        self._set([*self.attached, attachable])
        return lambda: self._set([other for other in self.attached if other is not attachable])

    def __reduce_ex__(self, _protocol: object) -> str:
        raise ModelError("A steered model cannot be copied: its generate() would be the original's. detach() first.")

    def _set(self, attached: list[Attachable]) -> None:
        """Override the methods of the model for `attached`, or restore them if it is empty."""
        self._undo.close()
        self.attached = attached
        if not attached:
            return
        names = [name for attachable in attached for name in attachable.keywords]
        self._undo.enter_context(accepting(self.model, names))
        self._undo.callback(self.model.register_forward_hook(self._keep_logits).remove)
        if names:
            before = self.model.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)
            self._undo.callback(before.remove)
            self._undo.enter_context(overridden(self.model, PROCESSORS, self._processors(self.model)))
        self._undo.enter_context(overridden(self.model, "generate", self._generate(self.model.generate)))
        if kinds := ", ".join(type(attachable).__name__ for attachable in attached if attachable.keywords):
            problem = (
                "Continuous batching (generate_batch(), or generate() with cache_implementation='paged') cannot carry "
                f"the plan of each prompt that the {kinds} attached to this model needs. Call generate() with a batch "
                "of prompts and another cache, serve the model with vLLM (dspa serve), or dspa.detach(model) first."
            )
            self._undo.enter_context(overridden(self.model, CONTINUOUS, functools.partial(_refuse, problem)))
        unsaved = " ".join(attachable.unsaved for attachable in attached if attachable.unsaved)
        if unsaved:
            self._undo.enter_context(overridden(self.model, "save_pretrained", functools.partial(_refuse, unsaved)))
        setattr(self.model, ATTRIBUTE, self)
        self._undo.callback(delattr, self.model, ATTRIBUTE)

    def _keep_logits(self, _model: Any, _args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and (generation := innermost(self, Generation)):
            generation.logits = getattr(output, "logits", None)

    def _processors(self, model: CausalLM) -> Callable[..., LogitsProcessorList]:
        """Return the method PROCESSORS that lets calls observe the logits before all else."""
        original = getattr(model, PROCESSORS)

        @functools.wraps(original)
        def processors(generation_config: GenerationConfig, **kwargs: Any) -> LogitsProcessorList:
            made: LogitsProcessorList = original(generation_config=generation_config, **kwargs)
            if generation := innermost(self, Generation):
                generation.begin(generation_config, kwargs["input_ids_seq_length"])
                if any(call.observes for call in generation.calls):
                    made.insert(0, generation.observe)
            return made

        return processors

    def _generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def generate(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            names = [name for attachable in self.attached for name in attachable.keywords]
            if any(name in kwargs for name in names):  # a call that `generate()` makes of itself
                return original(inputs, *args, **kwargs)
            acting = [attachable for attachable in self.attached if attachable.enabled]
            with ExitStack() as calls:
                for attachable in acting:
                    calls.enter_context(attachable.checked_call())
                running = [call for attachable in acting if (call := innermost(attachable, Call))]
                plans = self._plans(acting, inputs, args, kwargs)
                calls.enter_context(self._assistant_accepting(kwargs.get("assistant_model"), names))
                with opened(Generation(self, calls=running)) as generation:
                    result = original(inputs, *args, **kwargs | plans)
                for attachable in acting:
                    if attachable not in self.attached or not attachable.enabled:
                        raise ModelError(
                            f"The {type(attachable).__name__} was detached or disabled while generate() ran: the end "
                            "of its text is unsteered."
                        )
            if acting:
                generation.check()
            return result

        return generate

    def _plans(
        self, acting: Sequence[Attachable], inputs: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the keywords of a call of `generate()`, and with given positions those of its prompts."""
        plans: dict[str, Any] = {}
        prompts = None
        if any(attachable.keywords for attachable in acting):
            prompts = generate_prompts(self.model, inputs, args, kwargs)
            if kwargs.get("position_ids") is not None:
                plans["position_ids"] = prompts.positions
        for attachable in self.attached:
            plans |= attachable.call_keywords(prompts if attachable in acting else None)
        return plans

    def _before_forward(
        self, _model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # An architecture without a decoder of its own, as Llama-4's text model, is read by passes of the model itself.
        if READING in kwargs:
            return None
        read: dict[tuple[int, ...], dict[int, Tensor]] = {}
        added: dict[str, Any] = {}
        for attachable in self.attached:
            added |= attachable.pass_keywords(args, kwargs, read)
        return (args, kwargs | added) if added else None

    def residual(self, prompts: Prompts, layer: int, layers: str | None = None) -> Tensor:
        """Return the unsteered residual of prompts at the output of a layer [B, T, d_in].

        The first time, one pass reads all layers that the plans of what acts are made from.

        Args:
            prompts: the prompts. `prompts.residuals` is extended.
            layer: the layer.
            layers: dotted path of the decoder layers, for an unknown architecture.

        Raises:
            ModelError: a model in training mode.
        """
        if layer not in prompts.residuals:
            check_eval(self.model)
            wanted = {layer}.union(*(attachable.reads for attachable in self.attached if attachable.enabled))
            read = read_layers(
                self.model,
                wanted,
                layers,
                **prompts.inputs,
                attention_mask=prompts.mask.long(),
                position_ids=prompts.positions,
            )
            prompts.residuals.update(read)
        return prompts.residuals[layer]

    def _assistant_accepting(self, assistant: CausalLM | None, names: Iterable[str]) -> AbstractContextManager[None]:
        """Let the assistant of a call of `generate()` pass on the plans that it gets with each call of its own.

        Raises:
            ModelError: the assistant is steered by plans of its own, or tokens have to be read one at a time.
        """
        if assistant is None:
            return nullcontext()
        if any(other.enabled and other.stepwise for other in self.attached):
            raise refusal(ModelError, "`assistant_model`", *STEPWISE)
        if base_model(assistant) is self.model:
            return nullcontext()
        own = [other for other in Attachment.of(base_model(assistant)).attached if other.enabled and other.keywords]
        if own:
            raise refusal(
                ModelError,
                "`assistant_model`",
                f"a model with a {type(own[0]).__name__} of its own, which cannot see where the prompt ends",
                "an assistant that is not steered, or the steered model itself",
                "Call dspa.detach(assistant_model): what is generated follows the steered model either way.",
            )
        return accepting(assistant, names)


def raw_logits(model: CausalLM) -> Tensor:
    """Return the logits [B, T, V] of the latest pass in the running call of `generate()` of a model.

    Raises:
        ModelError: nothing is attached to the model, or the pass was compiled.
    """
    generation = innermost(Attachment.of(model), Generation)
    if generation is None or generation.logits is None:
        raise ModelError("The logits of the running generate() are not known: it is compiled, or nothing is attached.")
    return generation.logits


def _refuse(problem: str, *_args: Any, **_kwargs: Any) -> None:
    raise ModelError(problem)


@contextmanager
def overridden(model: CausalLM, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Override a method of the instance `model` within a `with` block."""
    before = model.__dict__.get(name)
    setattr(model, name, method)
    try:
        yield
    finally:
        if before is None:
            delattr(model, name)
        else:
            setattr(model, name, before)


@contextmanager
def accepting(model: CausalLM, names: Iterable[str]) -> Iterator[None]:
    """Let `generate()` pass the keywords `names` on to every layer, within a `with` block.

    `generate()` reads in the signature of `prepare_inputs_for_generation` which keywords a model knows, and refuses
    the rest. Blocks of several threads may be open for one model.
    """
    names = list(names)
    with LOCK:
        _accept(model, names, 1)
    try:
        yield
    finally:
        with LOCK:
            _accept(model, names, -1)


def _accept(model: CausalLM, names: Iterable[str], change: int) -> None:
    """Change by how many blocks keywords are accepted, and override the method unless none is."""
    record: tuple[Any, dict[str, int]] = model.__dict__.get(ACCEPTED) or (model.__dict__.get(PREPARE), {})
    before, counts = record
    counts = counts | {name: counts.get(name, 0) + change for name in names}
    counts = {name: count for name, count in counts.items() if count}
    original = before or getattr(type(model), PREPARE).__get__(model)
    if not counts:
        model.__dict__.pop(ACCEPTED, None)
        model.__dict__.pop(PREPARE, None) if before is None else setattr(model, PREPARE, before)
        return

    @functools.wraps(original)
    def prepare(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs = original(input_ids, *args, **kwargs)
        for call in [value for value in inputs.values() if isinstance(value, Call)]:
            # An assistant only passes on what is of the model that it assists.
            if isinstance(call.owner, Attachable) and call.owner.acts_in(model):
                inputs |= _step_keywords(call, input_ids, kwargs, inputs)
        return inputs

    signature = inspect.signature(original)
    extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in counts]
    # A keyword-only parameter stands before **kwargs, which is last.
    *known, rest = signature.parameters.values()
    prepare.__signature__ = signature.replace(parameters=[*known, *extra, rest])  # type: ignore[attr-defined]
    setattr(model, PREPARE, prepare)
    setattr(model, ACCEPTED, (before, counts))


def _step_keywords(call: Call, ids: Tensor, kwargs: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the keywords of a call for the pass that `prepare_inputs_for_generation` made `inputs` for."""
    tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    mask = kwargs.get("attention_mask")
    n_total = ids.shape[1] if mask is None else mask.shape[1]
    made = call.step_keywords(ids, tokens.shape[1], n_total)
    return {name: tensor.to(tokens.device) for name, tensor in made.items()}
