"""Figures of every method of a comparison, with intervals, and their paired differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from dspa.errors import refusal
from dspa.evaluate.compare.measures import (
    MARGIN,
    OF_ANSWERS,
    OF_TRIPLES,
    Counter,
    Figure,
    Sums,
    answer_measures,
    triple_measures,
)
from dspa.evaluate.compare.methods import BASE, Method
from dspa.evaluate.compare.runs import Answers, TripleScores


@dataclass(frozen=True, eq=False)
class Figures:
    """Answers and scores of methods on the same prompts and triples, and measures of them.

    Measures are "margin", "chosen", "rejected" and "accuracy" of held-out triples, and of answers the counters,
    "perplexity", "answer_perplexity", "distinct_1" to "distinct_3", "length", "ended",
    "edited" and "touched".

    Attributes:
        methods: the base model, then every method, each followed by its controls.
        prompts: texts of the N prompts.
        seeds: of sampling.
        settings: of generation; the model; versions of packages.
        answers: by method, one run per seed.
        scores: by method, one run, or one per seed for methods that draw; empty without held-out triples.
        texts: texts of the answers, by method, seed and prompt.
        ends: end tokens.
        counters: of text, by name.
        prefer: measure whose gain decides the recommendation; None for none.
        max_perplexity: largest perplexity of a recommended method, as a multiple of the base model's.
        tokenizer: the model's tokenizer.
        operations: largest number of floating-point operations per token of an answer, by method.
    """

    methods: list[Method]
    prompts: list[str]
    seeds: list[int]
    settings: dict[str, Any]
    answers: dict[str, list[Answers]]
    scores: dict[str, list[TripleScores]]
    texts: dict[str, list[list[str]]]
    ends: set[int]
    counters: Mapping[str, Counter]
    prefer: str | None
    max_perplexity: float
    tokenizer: PreTrainedTokenizerBase
    operations: dict[str, float] = field(default_factory=dict)
    _computed: dict[tuple[Any, ...], Figure | None] = field(default_factory=dict, repr=False)

    @cached_property
    def sums(self) -> dict[str, dict[str, Sums]]:
        """Measures by method and name, as sums over prompts or triples."""
        sums = {
            name: answer_measures(runs, self.texts[name], self.prompts, self.ends, self.counters)
            for name, runs in self.answers.items()
        }
        for name, runs in self.scores.items():
            sums[name] |= triple_measures(runs)
        return sums

    @property
    def measures(self) -> list[str]:
        """Names of the measures, those of triples first, then the counters."""
        return [*(OF_TRIPLES if self.scores else ()), *self.counters, *OF_ANSWERS]

    @property
    def preferable(self) -> list[str]:
        """Names of the measures that can decide a recommendation."""
        return [*([MARGIN] if self.scores else ()), *self.counters]

    def figure(self, measure: str, method: str, units: Sequence[int] | None = None) -> Figure | None:
        """Return a measure of a method with its interval, None where the method does not have it.

        Args:
            measure: name of the measure.
            method: name of the method.
            units: numbers of prompts, or of triples for a measure of them; None for all.
        """
        sums = self._sums(measure, method)
        return self._once(lambda: sums.of(units).figure() if sums else None, measure, method, None, units)

    def gain(self, measure: str, method: str, over: str = BASE, units: Sequence[int] | None = None) -> Figure | None:
        """Return the paired difference of a measure over another method, None where one does not have it.

        For "perplexity" it is relative: 0.1 for ten percent more.

        Args:
            measure: as for `figure`.
            method: as for `figure`.
            over: name of the other method.
            units: as for `figure`.
        """
        mine, theirs = self._sums(measure, method), self._sums(measure, over)
        return self._once(
            lambda: mine.of(units).difference(theirs.of(units)) if mine and theirs else None,
            *(measure, method, over, units),
        )

    def _once(
        self,
        compute: Callable[[], Figure | None],
        measure: str,
        method: str,
        over: str | None,
        units: Sequence[int] | None,
    ) -> Figure | None:
        """Return a figure, computed on first use."""
        key = (measure, method, over, None if units is None else tuple(units))
        if key not in self._computed:
            self._computed[key] = compute()
        return self._computed[key]

    def _sums(self, measure: str, method: str) -> Sums | None:
        for what, name, known in (("measure", measure, self.measures), ("method", method, list(self.sums))):
            if name not in known:
                raise refusal(ValueError, f"`{what}`", repr(name), ", ".join(known))
        return self.sums[method].get(measure)

    def apart(self, measure: str, method: str) -> bool:
        """Return True if the interval of a gain over the base model is above 0, and above those of all controls."""
        gain = self.gain(measure, method)
        others = [self.gain(measure, control) for control in self.controls(method)]
        bounds = [0.0, *(other.high for other in others if other is not None)]
        return gain is not None and gain.low > max(bounds)

    def controls(self, method: str) -> list[str]:
        """Return the names of the controls of a method."""
        return [other.name for other in self.methods if other.control_of == method]

    def unsteered(self, method: str) -> int | None:
        """Return the number of prompts that selected nothing to edit; of controls that draw, the largest of a seed."""
        counts = [sum(run.unsteered) for run in self.answers[method] if run.unsteered is not None]
        return max(counts, default=None)

    def speed(self, method: str) -> float:
        """Return the tokens per second of generation alone, prompts included in the time."""
        runs = self.answers[method]
        return sum(len(ids) for run in runs for ids in run.ids) / sum(run.seconds for run in runs)
