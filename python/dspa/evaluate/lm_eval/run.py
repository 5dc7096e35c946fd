"""Tasks of lm-evaluation-harness under the base model and methods. Importing this needs the package lm-eval."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dspa.errors import refusal
from dspa.evaluate.compare.methods import BASE, Method, controls_of
from dspa.evaluate.compare.run import attached, check_methods, versions
from dspa.evaluate.compare.runs import RunStore
from dspa.evaluate.compare.table import TextTable
from dspa.evaluate.lm_eval.model import SteeredLM, check_tasks
from dspa.files import digest_of
from dspa.models.layers import base_model, check_eval, loaded_name
from dspa.models.sources import model_digest
from dspa.outputs import write_atomically
from dspa.saes.frozen import FrozenSAE
from dspa.schemas import Count, Text, schema
from dspa.version import __version__

FORMAT = "dspa.lm_eval.1"
# A random set and random latents need answers of the model, by which their latents are chosen.
CONTROLS = ("shuffled map", "wrong layer", "random vector", "random change")
UNSTEERED, CUT = "unsteered", "cut"


@dataclass(frozen=True)
class Tasks:
    """Tasks of the harness with their data. Make it with `load`.

    Attributes:
        names: names of tasks, groups and tags.
        tasks: the harness' tasks by name.
        groups: its groups by name.
    """

    names: list[str]
    tasks: dict[str, Task]
    groups: dict[str, Group]

    @classmethod
    def load(cls, names: Sequence[str], include_path: str | Path | None = None) -> Tasks:
        """Load tasks and their data.

        Args:
            names: names of the harness' tasks, groups or tags.
            include_path: folder with further tasks, as YAML files.

        Raises:
            ValueError: no names, an unknown one, or a task that cannot be loaded, or that runs what the model writes.
        """
        if not names:
            raise refusal(ValueError, "`tasks`", "empty", "one name or more")
        if include_path is not None and not Path(include_path).is_dir():
            raise refusal(ValueError, "`include_path`", str(include_path), "a folder")
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
        for name in names:
            if name not in manager.all_tasks:
                close = difflib.get_close_matches(name, manager.all_tasks) or ["those that `lm-eval ls tasks` lists"]
                accepted = f"names of tasks, groups or tags, such as {', '.join(close)}"
                raise refusal(ValueError, "`tasks`", repr(name), accepted)
        try:
            loaded = manager.load(list(names))
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            got = f"{', '.join(names)}, which cannot be loaded ({error})"
            advice = "Data sets of the Hub need a network, or have to be in its cache."
            raise refusal(ValueError, "`tasks`", got, "tasks whose data are there", advice) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise refusal(ValueError, "`tasks`", f"{name}, which runs code that the model writes", "other tasks")
        return cls(list(names), loaded["tasks"], loaded["groups"])

    @property
    def members(self) -> dict[str, list[str]]:
        """Names of the tasks and groups in each group."""
        return {name: list(group.child_names) for name, group in self.groups.items()}

    @property
    def outermost(self) -> list[Task | Group]:
        """Groups and tasks that are in no other group."""
        inner = {child for children in self.members.values() for child in children}
        return [entry for part in (self.groups, self.tasks) for name, entry in part.items() if name not in inner]

    def digests(self, num_fewshot: int | None) -> list[str]:
        """Return the digest of each task: of its settings, its documents, and those that it has examples from.

        Args:
            num_fewshot: number of examples; None: as each task has it.
        """
        return [_digest(task, num_fewshot) for task in self.tasks.values()]


@schema
class TaskScores:
    """Results of one method in all tasks.

    Attributes:
        results: the harness' own figures, by task or group, and by metric and filter.
        n_shot: number of examples in each context, by task.
        n_samples: number of documents, by task.
        contexts: by task, the number of different contexts, of those that selected no latent to edit ("unsteered", not
            for methods that select none), and of those whose beginning was left out for want of room ("cut").
        samples: by task, and by metric and filter: the values of the documents, in their order, where they are numbers.
    """

    results: dict[Text, dict[Text, Any]]
    n_shot: dict[Text, Any]
    n_samples: dict[Text, Any]
    contexts: dict[Text, dict[Text, Count]]
    samples: dict[Text, dict[Text, list[Any]]]


@dataclass(frozen=True)
class TaskResults:
    """Scores of methods in tasks.

    Attributes:
        methods: the base model first.
        scores: what each method reaches, by its name.
        groups: names of the tasks of each group.
        settings: all that the scores depend on besides the methods, with versions.
    """

    methods: list[Method]
    scores: dict[str, TaskScores]
    groups: dict[str, list[str]]
    settings: dict[str, Any]

    def table(self) -> TextTable:
        """Return a row for each task, metric and method, with the harness' standard error.

        The tasks of a group that has figures of its own are left out.
        """
        figures = {method.name: self.scores[method.name].results for method in self.methods}
        first, rows = figures[BASE], list[list[str]]()
        inner = {name for group, names in self.groups.items() if _metrics(first.get(group, {})) for name in names}
        for task in (name for name in first if name not in inner):
            for metric in _metrics(first[task]):
                name, _, chosen = metric.partition(",")
                for method in self.methods:
                    shown = f"  {method.name.partition(': ')[2]}" if method.control_of else method.name
                    values = (figures[method.name][task].get(key) for key in (metric, f"{name}_stderr,{chosen}"))
                    where = (task, name if chosen == "none" else f"{name} ({chosen})")
                    rows.append(
                        [shown, *where, *(f"{value:.4f}" if isinstance(value, float) else "" for value in values)]
                    )
        return TextTable("Tasks of lm-evaluation-harness", ["method", "task", "metric", "value", "std. error"], rows)

    def notes(self) -> list[str]:
        """Return what the figures do not show, as sentences."""
        notes = []
        for method in self.methods:
            contexts = self.scores[method.name].contexts.values()
            empty, cut, total = (sum(of.get(name, 0) for of in contexts) for name in (UNSTEERED, CUT, "contexts"))
            if empty:
                notes.append(
                    f"{method.name}: {empty} of {total} contexts select no latent, and count as the base model."
                )
            if cut:
                notes.append(
                    f"{method.name}: the beginning of {cut} of {total} contexts was left out for want of room."
                )
        return notes

    def record(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        methods = [
            {
                "name": method.name,
                "kind": method.kind,
                "control_of": method.control_of or None,
                "settings": method.settings,
                **asdict(self.scores[method.name]),
            }
            for method in self.methods
        ]
        return {"format": FORMAT, "settings": self.settings, "groups": self.groups, "methods": methods}


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    methods: Iterable[Method],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    controls: Sequence[str] = (),
    seed: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    results: str | Path | None = None,
    layers: str | None = None,
    model_name: str | None = None,
    other_weights: bool = False,
) -> TaskResults:
    """Run tasks of lm-evaluation-harness with the base model and with methods.

    Args:
        model: a transformers causal language model in evaluation mode, to which nothing is attached.
        tokenizer: the model's tokenizer.
        tasks: what `Tasks.load` returned.
        methods: what `Method.dspa` and the others made.
        num_fewshot: number of examples in each context; None: as each task has it.
        limit: number of documents per task, the first ones; None for all.
        controls: those to run for methods that have them, of "shuffled map", "wrong layer", "random vector" and "random
            change".
        seed: of the harness' draws, of examples and of sampling; None for the harness' own seeds.
        batch_size: number of sequences per pass.
        chat: apply the chat template to contexts.
        chat_template_kwargs: values of its variables by name.
        results: file to write everything to, as JSON. Methods with the same inputs that are in it, or that a stopped
            call left next to it, are not run again.
        layers: dotted path of the decoder layers, for an unknown architecture.
        model_name: name of the model, if its own name or path does not give it.
        other_weights: accept maps and adapters that were made with other weights than the model's.

    Raises:
        ModelError: a method that does not fit the model or a task, a model in training mode, or one with something
            attached.
        ValueError: an invalid setting, or `results` of something else.
    """
    inner, methods = base_model(model), list(methods)
    check_eval(inner)
    check_methods(inner, methods)
    for name, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1), ("seed", seed, 0)):
        if value is not None and not (isinstance(value, int) and value >= least):
            raise refusal(ValueError, f"`{name}`", repr(value), f"a whole number >= {least}")
    if unknown := sorted(set(controls) - set(CONTROLS)):
        raise refusal(ValueError, "`controls`", repr(unknown[0]), ", ".join(CONTROLS))
    attaching: dict[str, Any] = {"layers": layers, "model_name": model_name, "other_weights": other_weights}
    everything = [Method.base()]
    for method in methods:
        everything += [method, *controls_of(method, controls, inner, layers, _no_densities, "")]
    settings: dict[str, Any] = {
        "tasks": tasks.names,
        "num_fewshot": num_fewshot,
        "limit": limit,
        "seed": seed,
        "batch_size": batch_size,
        "chat": chat,
        "chat_template_kwargs": None if chat_template_kwargs is None else dict(chat_template_kwargs),
        "model": {
            "name": loaded_name(inner),
            "digest": model_digest(inner),
            "dtype": str(inner.dtype).removeprefix("torch."),
        },
        "versions": versions() | {"lm-eval": lm_eval.__version__},
    }
    store = RunStore.open(None if results is None else Path(results), FORMAT)
    with store.held():
        for method in everything:
            with attached(inner, method, seed or 0, **attaching):
                check_tasks(tasks.tasks.values(), inner, method.prefix)
        digests = tasks.digests(num_fewshot)
        scores = dict[str, TaskScores]()
        for method in everything:
            key = digest_of([FORMAT, __version__, settings, digests, method.digest])
            run = store.get(key, TaskScores)
            if run is None:
                with attached(inner, method, seed or 0, **attaching):
                    lm = SteeredLM(
                        inner,
                        tokenizer,
                        prefix=method.prefix,
                        chat=chat,
                        batch_size=batch_size,
                        chat_template_args=settings["chat_template_kwargs"],
                    )
                    run = _run(lm, tasks, settings)
                store.add(key, run)
            scores[method.name] = run
        outcome = TaskResults(everything, scores, tasks.members, settings)
        if results is not None:
            text = json.dumps({**outcome.record(), "runs": store.runs}, indent=1)
            write_atomically(Path(results), text.encode())
            store.finish()
    return outcome


def _no_densities(_sae: FrozenSAE) -> Tensor:
    raise AssertionError("of the random set, which is no control here")


def _digest(task: Task, num_fewshot: int | None) -> str:
    """Return the digest of a task: its settings and data."""
    shots = task.get_config("num_fewshot")
    examples = shots != 0 and (shots if num_fewshot is None else num_fewshot)
    data = [list(task.eval_docs), list(task.fewshot_docs()) if examples else []]
    return digest_of([task.VERSION, json.dumps([task.dump_config(), data], sort_keys=True, default=str)])


def _run(lm: SteeredLM, tasks: Tasks, settings: Mapping[str, Any]) -> TaskScores:
    """Run the tasks with what is attached to the model now."""
    seed, seeds = settings["seed"], ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    results = lm_eval.simple_evaluate(
        lm,
        tasks=tasks.outermost,
        task_manager=TaskManager(include_defaults=False),
        num_fewshot=settings["num_fewshot"],
        limit=settings["limit"],
        apply_chat_template=settings["chat"],
        **({} if seed is None else dict.fromkeys(seeds, seed)),
    )
    samples = {name: _values(documents) for name, documents in results["samples"].items()}
    steered = bool(lm.steerings)
    contexts = {
        name: {"contexts": len(of.seen), CUT: len(of.cut)} | ({UNSTEERED: len(of.unsteered)} if steered else {})
        for name, of in lm.contexts.items()
    }
    figures = {
        name: {key: _plain(value) for key, value in of_task.items()} for name, of_task in results["results"].items()
    }
    return TaskScores(figures, dict(results["n-shot"]), dict(results["n-samples"]), contexts, samples)


def _values(documents: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of documents by metric and filter, of metrics whose values are numbers."""
    values: dict[str, list[Any]] = {}
    for document in documents:
        for metric in document["metrics"]:
            values.setdefault(f"{metric},{document['filter']}", []).append(_plain(document[metric]))
    return {name: row for name, row in values.items() if not any(isinstance(value, str) for value in row)}


def _plain(value: Any) -> Any:
    """Return a number as JSON can hold it, None for one that is not finite, and the text of anything else."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _metrics(figures: Mapping[str, Any]) -> list[str]:
    """Return the names of the metrics among a task's figures, with their filter."""
    return [name for name, value in figures.items() if "," in name and "_stderr," not in name and value != "N/A"]
