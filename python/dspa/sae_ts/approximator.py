"""The effect approximator: a linear model of the effects of directions on latents, `y = x M + b`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dspa.errors import VectorError, refusal
from dspa.files import SEAL, read_sealed, write_tensors
from dspa.models.sources import Source
from dspa.outputs import output_file
from dspa.sae_ts.effects import Effects
from dspa.sae_ts.settings import FitSettings
from dspa.schemas import Count, Explained, NonNegative, OneOf, Positive, PositiveInt, Text, schema
from dspa.version import __version__

FORMAT = "dspa.effect-approximator.1"
WHAT = "linear model of effects, which dspa vector fit writes"
TENSORS = ("M", "b")
Linear: TypeAlias = tuple[Tensor, Tensor]  # M and b
# Directions that are held out, as published, or a tenth where there are fewer than ten times as many.
HELD_OUT = 100
# Penalties that cross-validation compares, relative to the mean variance of a coordinate of the directions.
PENALTIES = tuple(10.0**exponent for exponent in range(-6, 5))


@schema
class ApproximatorRecord:
    """The header of an approximator's file, and all of it but its numbers.

    Attributes:
        sae: fingerprint of the SAE whose latents it predicts.
        layer: layer at which directions were added.
        scale: how many times they were added.
        rollouts: texts per direction.
        n_directions: directions of the fit, without those held out.
        n_held_out: directions held out.
        settings: settings of the fit.
        ridge: relative penalty of M that was used, 0 for Adam.
        r2: `1 - sum (y - x M - b)^2 / sum (y - mean y)^2` over the held-out effects and all latents, with the mean
            effect of the fitted directions: what is explained beyond it.
        r2_shuffled: the same for a ridge fit of effects whose directions were shuffled, with the penalty that the true
            ones have: a control.
        mean_alone: `1 - sum (y - mean y)^2 / sum y^2`: what the mean effect alone explains of the held-out effects.
        model_name: name of the model, empty if that is not known.
        model_digest: its weights, as `dspa.models.sources.model_digest` gives them, or empty.
        sources: where the model and the SAE were loaded from.
        package: version of the package that wrote the file.
        format: FORMAT.
        sha256: checksum of the numbers.
        seal: digest of all else.
    """

    sae: Text
    layer: Count
    scale: Positive
    rollouts: PositiveInt
    n_directions: PositiveInt
    n_held_out: PositiveInt
    settings: FitSettings
    ridge: NonNegative
    r2: Explained
    r2_shuffled: Explained
    mean_alone: Explained
    model_name: Text = ""
    model_digest: Text = ""
    sources: dict[Text, Source] = field(default_factory=dict)
    package: Text = __version__
    format: Annotated[str, OneOf((FORMAT,))] = FORMAT
    sha256: Text = ""
    seal: Text = ""


class EffectApproximator:
    """Predicted effects of directions on latents, `y = x M + b` with x of length 1.

    b is the mean side effect of any direction, at the scale at which they were measured.

    Attributes:
        record: everything but the numbers.
        M: [d_in, d_sae] fp32.
        b: [d_sae] fp32.

    Raises:
        VectorError: numbers of other shapes, or that are not finite.
    """

    def __init__(self, record: ApproximatorRecord, M: Tensor, b: Tensor) -> None:
        if M.dim() != 2 or b.shape != M.shape[1:]:
            shapes = f"of shapes {list(M.shape)} and {list(b.shape)}"
            raise refusal(VectorError, "The numbers of an approximator", shapes, "[d_in, d_sae] and [d_sae]")
        if not bool(M.isfinite().all() and b.isfinite().all()):
            raise refusal(VectorError, "The numbers of an approximator", "partly NaN or infinite", "finite numbers")
        self.record, self.M, self.b = record, M, b

    @property
    def d_in(self) -> int:
        """Width of the residual stream."""
        return self.M.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.M.shape[1]

    def predict(self, directions: Tensor) -> Tensor:
        """Return the predicted effects [n, d_sae] fp64 of directions [n, d_in], of any length."""
        return nn.functional.normalize(directions.double(), dim=1) @ self.M.double() + self.b.double()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file.

        Raises:
            VectorError: a path that cannot be a file.
            OSError: the file cannot be written.
        """
        output_file(Path(path), "The path of the approximator", VectorError)
        header = {name: value for name, value in asdict(self.record).items() if name not in ("sha256", SEAL)}
        write_tensors(Path(path), {"M": self.M, "b": self.b}, header)

    @classmethod
    def load(cls, path: str | Path) -> EffectApproximator:
        """Read a file that `save` wrote.

        Raises:
            VectorError: there is no such file, or it is damaged or of something else.
        """
        record, tensors = read_sealed(Path(path), ApproximatorRecord, TENSORS, VectorError, WHAT, FORMAT)
        return cls(record, **tensors)

    def __repr__(self) -> str:
        size = f"d_in={self.d_in}, d_sae={self.d_sae}, layer={self.record.layer}"
        return f"EffectApproximator({size}, R^2 {self.record.r2:.3f} on {self.record.n_held_out} held-out directions)"


def fit_effects(
    effects: Effects | str | Path, settings: FitSettings | None = None, *, progress: bool = True
) -> EffectApproximator:
    """Fit an approximator to measured effects, and say how well it predicts those of directions that it did not see.

    The closed form is `M = (Xc^T Xc + penalty I)^-1 Xc^T Yc` and `b = mean y - mean x M` in fp64, with Xc and Yc less
    their means. So b is not penalised: it is the mean effect of the directions, which is not small and no noise.

    Args:
        effects: effects, or their folder.
        settings: settings of the fit.
        progress: show a bar.

    Raises:
        VectorError: too few directions, a folder of something else, or damaged files.
    """
    effects = effects if isinstance(effects, Effects) else Effects.open(effects)
    settings = settings or FitSettings()
    held_out = settings.held_out or max(1, min(HELD_OUT, effects.n // 10))
    n = effects.n - held_out
    if n < 2:
        got = f"{effects.n}, of which {held_out} are held out"
        advice = "Let dspa vector effects go on, or lower `held_out`."
        raise refusal(VectorError, "The number of measured directions", got, "two more than are held out", advice)
    with tqdm(total=effects.n + n, unit="direction", desc="fit", disable=not progress) as bar:

        def measured(start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
            for x, y in _rows(effects, start, stop):
                bar.update(len(x))
                yield x, y

        x = torch.cat([x for x, _ in measured(0, n)])
        shuffled = x[torch.randperm(n, generator=torch.Generator().manual_seed(settings.seed))]
        moments, control = _moments(x, shuffled, (y for _, y in _rows(effects, 0, n)), effects.record.d_sae)
        penalty, fitted = moments.fit(settings.ridge)
        _, of_control = control.fit(penalty)
        if settings.method == "adam":
            penalty, fitted = 0.0, _adam(x, torch.cat([y for _, y in _rows(effects, 0, n)]), settings, progress)
        r2, r2_shuffled, mean_alone = _scores(measured(n, effects.n), moments.mean_y, fitted, of_control)
    record = effects.record
    made = ApproximatorRecord(
        sae=record.sae,
        layer=record.layer,
        scale=record.scale,
        rollouts=record.sampling.rollouts,
        n_directions=n,
        n_held_out=held_out,
        settings=settings,
        ridge=penalty,
        r2=r2,
        r2_shuffled=r2_shuffled,
        mean_alone=mean_alone,
        model_name=record.model_name,
        model_digest=record.model_digest,
        sources=record.sources,
    )
    return EffectApproximator(made, *(tensor.float() for tensor in fitted))


@dataclass(frozen=True)
class _Moments:
    """Sums over n directions x and effects y that the closed form needs, in fp64.

    Attributes:
        n: their number.
        mean_x: mean direction [d_in].
        mean_y: mean effect [d_sae].
        cross: `Xc^T Yc` [d_in, d_sae].
        total: `sum Yc^2`.
        eigen: eigenvalues [d_in] and eigenvectors [d_in, d_in] of `Xc^T Xc`.
    """

    n: int
    mean_x: Tensor
    mean_y: Tensor
    cross: Tensor
    total: float
    eigen: tuple[Tensor, Tensor]

    def fit(self, ridge: float | None) -> tuple[float, Linear]:
        """Return the penalty, the best one if `ridge` is None, with M and b."""
        values, vectors = self.eigen
        ridge = self._best_penalty() if ridge is None else ridge
        shrunk = values + ridge * values.mean()
        # Where nothing varies and nothing is penalised, M is 0.
        inverse = torch.where(shrunk > 1e-12 * values.max(), 1 / shrunk, 0)
        M = vectors @ (inverse[:, None] * (vectors.T @ self.cross))
        return ridge, (M, self.mean_y - self.mean_x @ M)

    def _best_penalty(self) -> float:
        """Return the penalty of the least generalised cross-validation error."""
        values, vectors = self.eigen
        power = (vectors.T @ self.cross).square().sum(dim=1)

        def error(penalty: float) -> float:
            shrunk = values + penalty * values.mean()
            residual = self.total - float((power * (2 / shrunk - values / shrunk.square())).sum())
            freedom = 1 - (1 + float((values / shrunk).sum())) / self.n
            return residual / freedom**2 if freedom > 0 else float("inf")

        return min(PENALTIES, key=error)


def _moments(x: Tensor, shuffled: Tensor, effects: Iterable[Tensor], d_sae: int) -> tuple[_Moments, _Moments]:
    """Return the moments of directions [n, d_in] and of shuffled ones with the same effects, which come in parts."""
    rows, squares, start = (x.double(), shuffled.double()), 0.0, 0
    sum_y = torch.zeros(d_sae, dtype=torch.float64)
    crosses = [torch.zeros(x.shape[1], d_sae, dtype=torch.float64)] * 2
    for part in effects:
        y = part.double()
        sum_y += y.sum(dim=0)
        squares += float(y.square().sum())
        crosses = [cross + own[start : start + len(y)].T @ y for cross, own in zip(crosses, rows, strict=True)]
        start += len(y)
    mean_x, mean_y = rows[0].mean(dim=0), sum_y / len(x)
    centred = rows[0] - mean_x
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    eigen = values.clamp(min=0), vectors
    total = squares - len(x) * float(mean_y.square().sum())
    removed = len(x) * mean_x[:, None] * mean_y
    made = [_Moments(len(x), mean_x, mean_y, cross - removed, total, eigen) for cross in crosses]
    return made[0], made[1]


def _rows(effects: Effects, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the directions from `start` to `stop` with their effects, file by file."""
    first = 0
    for x, y in effects:
        own = slice(max(0, start - first), max(0, stop - first))
        if len(x[own]):
            yield x[own], y[own]
        first += len(x)


def _scores(held_out: Iterable[tuple[Tensor, Tensor]], mean: Tensor, fitted: Linear, control: Linear) -> list[float]:
    """Return `r2`, `r2_shuffled` and `mean_alone` of `ApproximatorRecord` on held-out directions with their effects."""
    errors, squares = torch.zeros(3, dtype=torch.float64), 0.0
    for x, part in held_out:
        y = part.double()
        predictions = (mean, *(x.double() @ M.double() + b.double() for M, b in (fitted, control)))
        errors += torch.stack([(y - predicted).square().sum() for predicted in predictions])
        squares += float(y.square().sum())
    of_mean, of_fit, of_control = errors.tolist()
    if not of_mean:
        raise refusal(VectorError, "Every held-out effect", "the same", "effects that differ between directions")
    return [1 - of_fit / of_mean, 1 - of_control / of_mean, 1 - of_mean / squares]


def _adam(x: Tensor, y: Tensor, settings: FitSettings, progress: bool) -> Linear:
    """Return M and b by Adam on the mean squared error, as published."""
    g = torch.Generator().manual_seed(settings.seed)
    bound = (1 / x.shape[1]) ** 0.5  # Kaiming-uniform, as in nn.Linear
    M = (bound * (2 * torch.rand(x.shape[1], y.shape[1], generator=g) - 1)).requires_grad_()
    b = torch.zeros(y.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([M, b], lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    for _ in tqdm(range(settings.epochs), unit="epoch", desc="adam", disable=not progress):
        for rows in torch.randperm(len(x), generator=g).split(settings.batch_size):
            optimizer.zero_grad()
            nn.functional.mse_loss(x[rows] @ M + b, y[rows]).backward()
            optimizer.step()
        schedule.step()
    return M.detach(), b.detach()
