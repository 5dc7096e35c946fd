"""The record that the training of an SAE writes to its folder and reads again: `training.json`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pydantic import with_config
from typing_extensions import TypedDict

from dspa.saes.quality import Quality
from dspa.schemas import Count, Positive, PositiveInt, Text, check_at_most, schema
from dspa.training_folder import History, TrainingFolder


# The settings that are read again. The others are compared.
@with_config(extra="ignore")
class _Settings(TypedDict, total=False):
    sae: Text | None
    d_sae: PositiveInt
    n_tokens: PositiveInt


@schema
class Beginning:
    """Numbers that the first batches decide, kept in `training.json`: a resumed training need not read them again.

    Attributes:
        k: active latents per token.
        scale: factor to a mean norm of sqrt(d_in), at which a learning rate means the same for any model.
        before: quality of the SAE before its first step.
    """

    k: Positive
    scale: Positive
    before: Quality


@schema
class TrainingRecord:
    """The content of `training.json`, None where the training did not come to it, or an earlier version trained.

    Attributes:
        settings: settings of the training.
        k, scale, before: as for `Beginning`.
        after: quality of the SAE after its last step.
        n_left_out: rows of outlying norm left out of the training.
        dead_training: latents that were silent in the last `dead_window_tokens` tokens.
        dead_window_tokens: number of these tokens.
        history: what was reported on the way.
    """

    settings: _Settings
    k: Positive | None = None
    scale: Positive | None = None
    before: Quality | None = None
    after: Quality | None = None
    n_left_out: Count | None = None
    dead_training: Count | None = None
    dead_window_tokens: Count | None = None
    history: History | None = None

    def __post_init__(self) -> None:
        if (self.after is None) != (self.history is None):
            raise ValueError("`after` and `history` belong together, and one of them is missing.")
        d_sae = self.settings.get("d_sae")
        counts = {"k": self.k, "dead_training": self.dead_training}
        for name in ("before", "after"):
            if quality := getattr(self, name):
                counts |= {f"{name}.dead": quality.dead, f"{name}.l0": quality.l0}
        for name, value in counts.items():
            if value is not None and d_sae is not None:
                check_at_most(name, value, "latents", d_sae)

    @property
    def begun(self) -> Beginning | None:
        """How the training began."""
        if self.k is None or self.scale is None or self.before is None:
            return None
        return Beginning(self.k, self.scale, self.before)


def read_record(folder: TrainingFolder) -> TrainingRecord:
    """Return the content of `training.json`.

    Raises:
        TrainingError: a file of something else, or a damaged one.
        FileNotFoundError: no training was begun here.
    """
    return folder.check_record(TrainingRecord, folder.read())


def read_figures(path: Path) -> dict[str, float]:
    """Return the figures that a finished training recorded in its folder; none where no training did.

    They are the fields of `Quality` after the training and, where they are recorded:

    - `explained_variance_before`, before the training,
    - `k` and `d_sae` of the training,
    - `n_uses` of a new SAE, the tokens of its training on which a latent was active on average,
    - `n_left_out_training`, the rows of outlying norm left out of it,
    - `dead_training`, the latents silent in its last `dead_window_tokens` tokens.

    Raises:
        TrainingError: the record is damaged.
    """
    folder = TrainingFolder(path)
    record = read_record(folder) if folder.begun else None
    if record is None or record.after is None:
        return {}
    settings, before, k = record.settings, record.before, record.k
    n_uses = None
    if k is not None and settings.get("sae") is None and {"n_tokens", "d_sae"} <= settings.keys():
        n_uses = settings["n_tokens"] * k / settings["d_sae"]
    figures = asdict(record.after) | {
        "explained_variance_before": before and before.explained_variance,
        "k": k,
        "d_sae": settings.get("d_sae"),
        "n_uses": n_uses,
        "n_left_out_training": record.n_left_out,
        "dead_training": record.dead_training,
        "dead_window_tokens": record.dead_window_tokens,
    }
    return {name: value for name, value in figures.items() if value is not None}
