"""Effects of directions on latents: what a model writes with a direction added, compared with what it writes without.

`y(d) = mean of f over texts written with scale * d added - mean of f over texts written without`, where the model
reads the texts without d again, and f are the latents of an SAE at the layer of d.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspa.errors import VectorError, refusal
from dspa.files import SEAL, checksum, read_sealed, write_tensors
from dspa.models.layers import base_model, check_eval, context_length, decoder_layers, loaded_name
from dspa.models.sources import Source, model_digest, model_source
from dspa.outputs import held
from dspa.sae_ts.rollouts import Rollouts, RowVectors, check_openers, unit_rows
from dspa.sae_ts.settings import RolloutSettings
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import check_sae, required_layer
from dspa.schemas import Count, OneOf, Positive, PositiveInt, Text, check, schema
from dspa.version import __version__

FORMAT = "dspa.direction-effects.1"
WHAT = "file of effects, which dspa vector effects writes"
TENSORS = ("directions", "latents")
# The file of the texts without a direction, and those of directions. Each of these holds PER_FILE of them.
BASE, FILES, PER_FILE = "base.safetensors", "directions-{:06d}.safetensors", 16
# Texts without a direction per text with one, as published.
BASE_ROLLOUTS = 10
# Neutral beginnings, as many as the published ones.
OPENERS = (
    "I believe",
    "It was",
    "The next day",
    "In my opinion",
    "There are",
    "People often",
    "Last week",
    "She said",
    "The best way",
    "We found",
    "Today",
    "My friend",
    "Once upon",
    "The report",
)


@schema
class EffectsRecord:
    """The header of a file of effects: all that its numbers depend on, but for the model's arithmetic.

    Attributes:
        sae: fingerprint of the SAE.
        layer: its layer.
        d_in: width of the residual stream.
        d_sae: number of latents.
        scale: how many times a direction is added.
        directions: checksum of all directions.
        n_directions: their number.
        openers: token ids of the openers.
        sampling: settings of the texts.
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
    d_in: PositiveInt
    d_sae: PositiveInt
    scale: Positive
    directions: Text
    n_directions: PositiveInt
    openers: list[list[Count]]
    sampling: RolloutSettings
    model_name: Text = ""
    model_digest: Text = ""
    sources: dict[Text, Source] = field(default_factory=dict)
    package: Text = __version__
    format: Annotated[str, OneOf((FORMAT,))] = FORMAT
    sha256: Text = ""
    seal: Text = ""


# Entries that may differ between the files of a folder.
OWN = ("sources", "package", "sha256", SEAL)


@dataclass(frozen=True)
class Effects:
    """A folder of effects, of all or of the first directions of a measurement.

    Attributes:
        folder: the folder.
        record: what they depend on.
        base: mean latents without a direction, [d_sae] fp32.
        n: number of directions that are measured.
    """

    folder: Path
    record: EffectsRecord
    base: Tensor
    n: int

    @classmethod
    def open(cls, folder: str | Path) -> Effects:
        """Open a folder that `measure_effects` wrote, also if it was stopped.

        Raises:
            VectorError: there are no effects, or files are damaged or of another measurement.
        """
        folder = Path(folder)
        record, tensors = _read(folder / BASE)
        n = 0
        while n < record.n_directions and (folder / FILES.format(n // PER_FILE)).is_file():
            n = min(n + PER_FILE, record.n_directions)
        return cls(folder, record, tensors["latents"][0], n)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield directions [P, d_in] and their effects [P, d_sae], fp32, file by file.

        Raises:
            VectorError: a file is damaged or of another measurement.
        """
        for start in range(0, self.n, PER_FILE):
            path = self.folder / FILES.format(start // PER_FILE)
            record, tensors = _read(path)
            _check_alike(path, record, self.record)
            yield tensors["directions"], tensors["latents"] - self.base


def measure_effects(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sae: FrozenSAE,
    directions: Tensor,
    scale: float,
    folder: str | Path,
    *,
    openers: Sequence[str] = OPENERS,
    sampling: RolloutSettings | None = None,
    batch_size: int = 64,
    progress: bool = True,
    layers: str | None = None,
    model_name: str | None = None,
) -> Effects:
    """Measure what each direction does to the latents of an SAE, when it is added at the SAE's layer.

    The rows of a batch have different directions. Texts are drawn by numbers of their direction and not of their
    batch, so that a measurement that was stopped ends in the same numbers, as far as rounding goes.

    Args:
        model: a transformers causal language model in evaluation mode, to which nothing is attached.
        tokenizer: the model's tokenizer.
        sae: the SAE.
        directions: rows [n, d_in] of any length, such as `sae.W_dec`; they are added with length 1.
        scale: how many times a direction is added; `dspa.evaluate.scale.find_scale` finds a good one.
        folder: folder to write. What is in it is not measured again.
        openers: texts that the model continues.
        sampling: settings of the texts.
        batch_size: number of texts that are written together.
        progress: show a bar.
        layers: dotted path of the decoder layers, for an unknown architecture.
        model_name: name of the model, if its own name or path does not give it.

    Raises:
        VectorError: a folder of other effects, or one that cannot be written.
        ModelError: an SAE that does not fit the model, or a model in training mode.
        ValueError: invalid directions, openers or settings.
    """
    inner, folder, sampling = base_model(model), Path(folder), sampling or RolloutSettings()
    check_eval(inner)
    check(PositiveInt, batch_size, ValueError, "`batch_size`")
    check_sae("sae", sae, inner, len(decoder_layers(inner, layers)), model_name)
    rows, ids = unit_rows(directions, sae.d_in), [list(tokenizer(opener)["input_ids"]) for opener in openers]
    check_openers(ids, sampling.length, context_length(inner))
    sources = {"model": model_source(inner), "sae": sae.source}
    record = EffectsRecord(
        sae=sae.fingerprint,
        layer=required_layer(sae),
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        scale=float(scale),
        directions=checksum({"directions": rows})[:16],
        n_directions=len(rows),
        openers=ids,
        sampling=sampling,
        model_name=model_name or loaded_name(inner) or "",
        model_digest=model_digest(inner) or "",
        sources={name: source for name, source in sources.items() if source},
    )
    with held(folder, "The folder of effects", VectorError):
        _continue(folder, record)
        header = {name: value for name, value in asdict(record).items() if name not in ("sha256", SEAL)}
        n_base, n_own = BASE_ROLLOUTS * sampling.rollouts, sampling.rollouts
        with (
            RowVectors(record.layer).attach(inner, layers=layers, model_name=model_name) as added,
            tqdm(total=n_base + n_own * len(rows), unit="text", desc="effects", disable=not progress) as bar,
        ):
            texts = Rollouts(inner, sae, added, ids, sampling, batch_size, layers)

            def measure(path: Path, vectors: Tensor, first: int, rollouts: int) -> None:
                if path.exists():
                    bar.update(len(vectors) * rollouts)
                    return
                for done in texts.mean_latents(record.scale * vectors, first, rollouts):
                    if isinstance(done, int):
                        bar.update(done)
                    else:
                        write_tensors(path, dict(zip(TENSORS, (vectors, done), strict=True)), header)

            measure(folder / BASE, torch.zeros(1, sae.d_in), 0, n_base)
            for start in range(0, len(rows), PER_FILE):
                path = folder / FILES.format(start // PER_FILE)
                measure(path, rows[start : start + PER_FILE], 1 + start, n_own)
    return Effects.open(folder)


def draw_directions(rows: Tensor, n: int, seed: int) -> Tensor:
    """Return n of the rows of a decoder [d_sae, d_in], in a random order.

    Raises:
        ValueError: more than there are.
    """
    if not 1 <= n <= len(rows):
        raise refusal(ValueError, "`n_directions`", n, f"1 to {len(rows)}, the rows of the decoder")
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n]
    return rows[chosen.to(rows.device)]


def _continue(folder: Path, record: EffectsRecord) -> None:
    """Raise `VectorError` unless a folder is empty or holds effects of the same measurement."""
    present = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    for path in present[:1]:
        _check_alike(path, _read(path)[0], record)


def _read(path: Path) -> tuple[EffectsRecord, dict[str, Tensor]]:
    return read_sealed(path, EffectsRecord, TENSORS, VectorError, WHAT, FORMAT)


def _check_alike(path: Path, then: EffectsRecord, record: EffectsRecord) -> None:
    names = [f.name for f in fields(then) if f.name not in OWN]
    differing = [f"`{name}`" for name in names if getattr(then, name) != getattr(record, name)]
    if differing:
        got = f"{path.parent}, which holds effects with other {', '.join(differing)}"
        accepted = "a new folder, or one of the same model, SAE, directions and settings, which is continued"
        raise refusal(VectorError, "The folder of effects", got, accepted, "Name another.")
