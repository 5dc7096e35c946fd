"""The recommended setting: chosen on one half of the prompts, and judged on the other half."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from dspa.evaluate.compare.figures import Figures
from dspa.evaluate.compare.measures import OF_TRIPLES, PERPLEXITY, Figure
from dspa.evaluate.compare.methods import BASE

SEED = 0
# Units per half that an interval needs.
FEWEST = 2


@dataclass(frozen=True)
class Recommendation:
    """A setting of DSPA and the evidence for it, or why none is recommended.

    Attributes:
        method: name of the recommended method; None for none.
        reason: the evidence, or the condition that failed, in a sentence.
        measure: the preferred measure.
        candidate: name of the method that was best where it was chosen.
        gain: its gain over the base model on the other half.
        perplexity: change of its perplexity relative to the base model's on the other half.
        controls: gain of each of its controls over the base model on the other half.
        over_controls: its paired difference over each of its controls on the other half.
        chosen_on, judged_on: numbers of the triples or prompts of the two halves.
    """

    method: str | None
    reason: str
    measure: str | None = None
    candidate: str | None = None
    gain: Figure | None = None
    perplexity: Figure | None = None
    controls: dict[str, Figure] = field(default_factory=dict)
    over_controls: dict[str, Figure] = field(default_factory=dict)
    chosen_on: list[int] = field(default_factory=list)
    judged_on: list[int] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        figures = {name: getattr(self, name) for name in ("gain", "perplexity")}
        of_controls = {name: getattr(self, name) for name in ("controls", "over_controls")}
        return {
            **{setting.name: getattr(self, setting.name) for setting in fields(self)},
            **{name: figure and figure.record() for name, figure in figures.items()},
            **{name: {key: one.record() for key, one in group.items()} for name, group in of_controls.items()},
        }


def halves(n: int) -> tuple[list[int], list[int]]:
    """Return the numbers below n in two halves, drawn by a fixed seed."""
    order = np.random.default_rng(SEED).permutation(n).tolist()
    return sorted(order[: n // 2]), sorted(order[n // 2 :])


def recommend(comparison: Figures) -> Recommendation:
    """Return the recommended DSPA method, if there is one.

    On one half, it has the largest lower bound of the gain over the base model in the preferred measure, of the methods
    whose perplexity is within the bound. On the other half, its perplexity is within the bound, the interval of its
    gain is above 0, and it is above the interval of the gain of every one of its controls.
    """
    measure, names = comparison.prefer, [method.name for method in comparison.methods if method.kind == "DSPA"]
    if not names:
        return Recommendation(None, "No setting is recommended: no DSPA method was compared.")
    if measure is None:
        return Recommendation(
            None, "No setting is recommended: there are no held-out triples, and no counter was preferred."
        )
    n_prompts = len(comparison.prompts)
    n_units = len(comparison.scores[names[0]][0].chosen) if measure in OF_TRIPLES else n_prompts
    unit = "triples" if measure in OF_TRIPLES else "prompts"
    # Answers to prompts give the perplexity, whatever is preferred.
    needed = " and ".join(dict.fromkeys(("prompts", unit)))
    if min(n_units, n_prompts) < 2 * FEWEST:
        return Recommendation(None, f"No setting is recommended: {2 * FEWEST} {needed} or more are needed.", measure)
    (first, second), (prompts_1, prompts_2) = halves(n_units), halves(n_prompts)
    bound = comparison.max_perplexity - 1
    gains = {
        name: _required(comparison, measure, name, first)
        for name in names
        if _required(comparison, PERPLEXITY, name, prompts_1).value <= bound
    }
    if not gains:
        reason = f"every DSPA method's perplexity is above {comparison.max_perplexity:g} times the base model's"
        return Recommendation(None, f"No setting is recommended: {reason}.", measure, chosen_on=first, judged_on=second)
    best = max(gains, key=lambda name: gains[name].low)
    gain = _required(comparison, measure, best, second)
    perplexity = _required(comparison, PERPLEXITY, best, prompts_2)
    controls = {name: _required(comparison, measure, name, second) for name in comparison.controls(best)}
    over = {name: _required(comparison, measure, best, second, name) for name in controls}
    failed = []
    if perplexity.value > bound:
        failed.append(f"its perplexity is {perplexity.value:.1%} above the base model's, and {bound:.1%} is the most")
    if gain.low <= 0:
        failed.append(f"its gain is not above 0 ({shown(gain)})")
    for name, control in controls.items():
        if gain.low <= control.high:
            short = name.removeprefix(f"{best}: ")
            failed.append(
                f"its gain ({shown(gain)}) is not above that of its control {short} ({shown(control)}; paired "
                f"difference {shown(over[name])})"
            )
    where = f"on the {len(second)} {unit} on which it was not chosen"
    if failed:
        reason = f"No setting is recommended. {best} was the best of {len(names)}, and {where}, {'; '.join(failed)}."
    else:
        others = ", ".join(f"{name.removeprefix(f'{best}: ')} {shown(control)}" for name, control in controls.items())
        against = f"above those of its controls ({others})" if others else "and no controls were run to compare it with"
        reason = (
            f"Recommended: {best}. Its gain in {measure} over the base model is {shown(gain)} {where}, {against}, at "
            f"{perplexity.value:+.1%} in perplexity."
        )
    return Recommendation(
        None if failed else best, reason, measure, best, gain, perplexity, controls, over, first, second
    )


def _required(comparison: Figures, measure: str, method: str, units: list[int], over: str = BASE) -> Figure:
    gain = comparison.gain(measure, method, over, units)
    assert gain is not None
    return gain


def shown(figure: Figure) -> str:
    """Return a difference with its interval, as text."""
    return f"{figure.value:+.3f} [{figure.low:+.3f}, {figure.high:+.3f}]"
