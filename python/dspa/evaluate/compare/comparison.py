"""The result of a comparison: figures of every method, answers, and a recommendation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dspa.evaluate.compare.figures import Figures
from dspa.evaluate.compare.measures import Figure
from dspa.evaluate.compare.methods import BASE, Method
from dspa.evaluate.compare.recommendation import Recommendation, recommend
from dspa.evaluate.compare.runs import FORMAT
from dspa.evaluate.compare.table import TextTable, tables
from dspa.evaluate.generation import Answer, edited_characters
from dspa.outputs import write_atomically


@dataclass(frozen=True, eq=False)
class Comparison(Figures):
    """Everything that `compare` found: `figure` and `gain` of every measure, `recommendation`, `tables()`, `save`."""

    def answer(self, method: str, prompt: int, seed: int = 0) -> Answer:
        """Return an answer with the base model's, and where its tokens were predicted from an edited residual.

        Args:
            method: name of the method.
            prompt: number of the prompt, from 0.
            seed: which of the seeds, from 0.
        """
        run = self.answers[method][seed]
        edited = () if run.edited is None else edited_characters(self.tokenizer, run.ids[prompt], run.edited[prompt])
        text, base = (self.texts[name][seed][prompt] for name in (method, BASE))
        return Answer(self.prompts[prompt], text, base, edited)

    @cached_property
    def recommendation(self) -> Recommendation:
        """The DSPA method that the evidence is for, or why there is none."""
        return recommend(self)

    def tables(self) -> list[TextTable]:
        """Return the tables of held-out triples, of counters and of answers, those that there are."""
        return tables(self)

    def markdown(self) -> str:
        """Return the tables in Markdown."""
        return "\n\n".join(table.markdown() for table in self.tables())

    def record(self, *, progress: bool = False) -> dict[str, Any]:
        """Return everything as JSON can hold it, but the token ids.

        Args:
            progress: show a bar while intervals are computed.
        """
        methods = tqdm(self.methods, desc="intervals", unit="method", leave=False, disable=not progress)
        return {
            "format": FORMAT,
            "settings": {
                **self.settings,
                "seeds": self.seeds,
                "prefer": self.prefer,
                "max_perplexity": self.max_perplexity,
                "counters": {
                    name: getattr(counter, "pattern", getattr(counter, "__qualname__", repr(counter)))
                    for name, counter in self.counters.items()
                },
            },
            "recommendation": self.recommendation.record(),
            "methods": [self._method_record(method) for method in methods],
            "prompts": self.prompts,
        }

    def _method_record(self, method: Method) -> dict[str, Any]:
        name, measures = method.name, {}
        for measure, sums in self.sums[name].items():
            controls = self.controls(name) if measure in self.preferable else []
            over = {control: self.gain(measure, name, control) for control in controls}
            measures[measure] = {
                "figure": _record(self.figure(measure, name)),
                "gain": None if name == BASE else _record(self.gain(measure, name)),
                "over_controls": {control: _record(figure) for control, figure in over.items()},
                "values": sums.values(),
            }
        return {
            "name": name,
            "kind": method.kind,
            "control_of": method.control_of or None,
            "settings": method.settings,
            "digest": method.digest,
            "measures": measures,
            "unsteered_prompts": self.unsteered(name),
            "unsteered": [run.unsteered for run in self.answers[name]],
            "unsteered_triples": [run.unsteered for run in self.scores.get(name, [])],
            "tokens_per_second": self.speed(name),
            "operations_per_token": self.operations.get(name),
            "answers": self.texts[name],
            "edited": [
                [self.answer(name, prompt, seed).edited for prompt in range(len(self.prompts))]
                for seed in range(len(self.answers[name]))
            ],
        }

    def save(self, path: str | Path, runs: Mapping[str, Any] | None = None, *, progress: bool = False) -> None:
        """Write everything as JSON.

        Args:
            path: the file.
            runs: finished runs by their keys, for later comparisons.
            progress: show a bar while intervals are computed.

        Raises:
            OSError: the file cannot be written.
        """
        text = json.dumps({**self.record(progress=progress), "runs": dict(runs or {})}, indent=1)
        write_atomically(Path(path), text.encode())


def _record(figure: Figure | None) -> dict[str, float | None] | None:
    return None if figure is None else figure.record()
