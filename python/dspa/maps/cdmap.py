"""The conditional-difference map: score, select, save, load."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dspa.config import SteeringConfig
from dspa.errors import MapError
from dspa.files import read_header, read_tensors, write_tensors
from dspa.saes.frozen import FrozenSAE
from dspa_kernels import SteeringPlan, map_lookup

FORMAT = "dspa.map.3"
GATE_RULES = ("published", "active")
# Hot latents that steering evaluates before it reads the encoder.
N_LARGE = 64


@dataclass(frozen=True)
class MapMeta:
    """What a map was made from: SAE fingerprints, model, layers, widths, number of triples (and of responses cut
    to fit), and every setting."""

    sae_in: str
    sae_out: str
    model_name: str
    layer_in: int
    layer_out: int
    d_sae_in: int
    d_sae_out: int
    n_triples: int
    n_cut: int
    count_tokens: str
    max_length: int | None
    percentile: float
    gate_rule: str
    k_diff: int
    sparsify: bool
    package: str


def confidence_radius(n_open: Tensor, d_sae_out: int, delta: float) -> Tensor:
    """`sqrt(2 log(2 d_sae / delta) / N_i)` of numbers of prompts N_i: every entry of a row, as a conditional mean, is
    within it of the truth with probability 1 - delta."""
    return (2 * math.log(2 * d_sae_out / delta) / n_open.float()).sqrt()


class ConditionalDifferenceMap:
    """`A` [d_sae_in, d_sae_out] as its non-empty columns, with what the optional scorings need, and a calibration,
    which changes no result: with it, steering reads less of the encoder.

    columns [C] int32, increasing latents of the output SAE; values [d_sae_in, C] fp32, `A[:, columns]`; n_open
    [d_sae_in] int32, prompts on which each gate is open; variance [C] fp32, of `rho~` over all responses; gate_latents
    [R] int32, increasing, the input latents whose gate is open on some prompts and not on all; gates [R, ceil(N / 8)]
    uint8, on which: bit n % 8 of byte n // 8 for the n-th prompt, in an order of their own.

    Calibration, of a sample of response tokens: hot [H] int32, the output latents that ever held a token's maximum,
    most often first and of equals the smaller; hot_counts [H] int64, how often; mean [d_in] fp32, of the residuals as
    the output SAE normalises them. All three are empty where a map has none, as those of older versions.
    """

    def __init__(
        self,
        columns: Tensor,
        values: Tensor,
        *,
        n_open: Tensor,
        variance: Tensor,
        gate_latents: Tensor,
        gates: Tensor,
        meta: MapMeta,
        hot: Tensor | None = None,
        hot_counts: Tensor | None = None,
        mean: Tensor | None = None,
    ) -> None:
        self.columns, self.values, self.meta = columns, values, meta
        self.n_open, self.variance = n_open, variance
        self.gate_latents, self.gates = gate_latents, gates
        self.hot = columns.new_empty(0, dtype=torch.int32) if hot is None else hot
        self.hot_counts = columns.new_empty(0, dtype=torch.int64) if hot_counts is None else hot_counts
        self.mean = columns.new_empty(0, dtype=torch.float32) if mean is None else mean
        self._check()

    def _check(self) -> None:
        meta, n_columns = self.meta, len(self.columns)
        wanted = {
            "columns": (torch.int32, (n_columns,)),
            "values": (torch.float32, (meta.d_sae_in, n_columns)),
            "n_open": (torch.int32, (meta.d_sae_in,)),
            "variance": (torch.float32, (n_columns,)),
            "gate_latents": (torch.int32, (len(self.gate_latents),)),
            "gates": (torch.uint8, (len(self.gate_latents), -(-meta.n_triples // 8))),
            "hot": (torch.int32, (len(self.hot),)),
            "hot_counts": (torch.int64, (len(self.hot),)),
            "mean": (torch.float32, (len(self.mean),)),
        }
        for name, (dtype, shape) in wanted.items():
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise MapError(
                    f"The map is damaged: `{name}` is {tensor.dtype} {list(tensor.shape)}; accepted: {dtype} "
                    f"{list(shape)}."
                )
        within = (self.columns >= 0) & (self.columns < meta.d_sae_out)
        if not n_columns or not bool(within.all()) or bool((self.columns.diff() <= 0).any()):
            raise MapError("`columns` are not increasing latents of the output SAE. The map is damaged.")
        within = (self.hot >= 0) & (self.hot < meta.d_sae_out)
        if not bool(within.all()) or len(self.hot.unique()) != len(self.hot):
            raise MapError("`hot` are not distinct latents of the output SAE. The map is damaged.")
        if not torch.equal(self.gate_latents, _partial(self.n_open, meta.n_triples)):
            raise MapError("`gate_latents` are not the latents whose gates are partly open. The map is damaged.")
        for name in ("values", "variance", "mean"):
            if not bool(getattr(self, name).isfinite().all()):
                raise MapError(f"`{name}` hold NaN or infinity. The map is damaged.")

    def __repr__(self) -> str:
        m = self.meta
        return (
            f"ConditionalDifferenceMap({m.model_name or 'model'}, layer {m.layer_in} [{m.d_sae_in}] -> layer "
            f"{m.layer_out} [{m.d_sae_out}], {len(self.columns)} columns from {m.n_triples} triples)"
        )

    def to(self, device: torch.device | str) -> ConditionalDifferenceMap:
        """The map on `device`; itself where it is there already."""
        if torch.device(device) == self.values.device:
            return self
        tensors = {name: getattr(self, name).to(device) for name in TENSORS}
        return ConditionalDifferenceMap(**tensors, meta=self.meta)

    def hot_share(self) -> float:
        """Of the maxima that the calibration saw, the fraction that the first N_LARGE latents of `hot` held."""
        return float(self.hot_counts[:N_LARGE].sum() / self.hot_counts.sum().clamp(min=1))

    def check_saes(self, sae_in: FrozenSAE, sae_out: FrozenSAE) -> None:
        """Raise `MapError` unless these are the SAEs that the map was made with, in the right order of layers."""
        for name, sae, fingerprint, layer in (
            ("sae_in", sae_in, self.meta.sae_in, self.meta.layer_in),
            ("sae_out", sae_out, self.meta.sae_out, self.meta.layer_out),
        ):
            if sae.fingerprint != fingerprint:
                swapped = sae.fingerprint in (self.meta.sae_in, self.meta.sae_out)
                hint = "Are the two SAEs swapped? " if swapped else ""
                raise MapError(
                    f"`{name}` has fingerprint {sae.fingerprint} and the map was made with {fingerprint} (layer "
                    f"{layer}). {hint}Load the SAE that the map was made with, or make a map with this one."
                )
            if sae.layer != layer:
                raise MapError(f"`{name}` sits at layer {sae.layer} and the map was made at layer {layer}.")

    # Scores and plans

    def score(self, gates: Tensor) -> Tensor:
        """`g A`, [.., d_sae_out] fp32, of gates [.., d_sae_in] (0 or 1, or any weights)."""
        score = torch.zeros(*gates.shape[:-1], self.meta.d_sae_out, device=self.values.device)
        score[..., self.columns.long()] = gates.to(self.values) @ self.values
        return score

    def select(self, counts: Tensor, config: SteeringConfig, *, backend: str = "auto") -> SteeringPlan:
        """What prompts with these activation counts [B, d_sae_in] int32 steer (DSPA online, steps 1 to 3)."""
        counts = counts.to(self.values.device)
        if config.scoring != "demixed":
            values, k_prompt = self.scored(config), config.k_prompt
        else:
            # Each prompt looks up the one row that holds its own score.
            values, k_prompt = self._demixed(counts, config), 1
            counts = torch.eye(len(counts), dtype=torch.int32, device=counts.device)
        sizes = {"k_prompt": k_prompt, "k_diff": config.k_diff}
        return map_lookup(counts, values, **sizes, mode=config.mode, backend=backend)

    def scored(self, config: SteeringConfig) -> Tensor:
        """The values [d_sae_in, C] that `config.scoring` sums, for a scoring that is a sum of rows."""
        if config.scoring == "whitened":
            return torch.where(self.variance > 0, self.values / self.variance, 0)
        if config.scoring == "confident":
            n_open = self.n_open.clamp(min=1)[:, None]
            mean = self.values * (self.meta.n_triples / n_open)
            return torch.where(mean.abs() > self.radius(config.delta)[:, None], self.values, 0)
        return self.values

    def radius(self, delta: float) -> Tensor:
        """`confidence_radius` of each row [d_sae_in]; infinite for a gate that never opened."""
        return confidence_radius(self.n_open, self.meta.d_sae_out, delta)

    def _demixed(self, counts: Tensor, config: SteeringConfig) -> Tensor:
        """`A_S^T (M_S + ridge I)^-1 g_S` [B, C], S the prompt's k_prompt latents and M = E[g g^T]."""
        order = counts.long() * counts.shape[1] + torch.arange(counts.shape[1] - 1, -1, -1, device=counts.device)
        scores = []
        for row, count in zip(order.topk(config.k_prompt, dim=1).indices, counts, strict=True):
            latents = row[count[row] > 0]
            gates = self._open(latents)
            gram = gates @ gates.T / self.meta.n_triples
            gram += config.ridge * torch.eye(len(latents), dtype=gram.dtype, device=gram.device)
            weights = torch.linalg.solve(gram, gram.new_ones(len(latents)))
            scores.append(weights @ self.values[latents].double())
        return torch.stack(scores).float() if scores else self.values[:0]

    def _open(self, latents: Tensor) -> Tensor:
        """Gates of some latents on all N prompts, [len(latents), N] fp64."""
        opened = (self.n_open[latents] == self.meta.n_triples).double()[:, None].repeat(1, self.meta.n_triples)
        place = torch.searchsorted(self.gate_latents, latents.to(torch.int32)).clamp(max=len(self.gate_latents) - 1)
        partly = self.gate_latents[place] == latents if len(self.gate_latents) else torch.zeros_like(latents).bool()
        bits = torch.arange(8, device=self.gates.device, dtype=torch.uint8)
        unpacked = (self.gates[place[partly]][:, :, None] >> bits) & 1
        opened[partly] = unpacked.flatten(1)[:, : self.meta.n_triples].double()
        return opened

    def dense(self) -> Tensor:
        """`A` [d_sae_in, d_sae_out] fp32, with its empty columns."""
        full = torch.zeros(self.meta.d_sae_in, self.meta.d_sae_out, device=self.values.device)
        full[:, self.columns.long()] = self.values
        return full

    # Files

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, with the metadata in its header."""
        if not Path(path).parent.is_dir() or Path(path).is_dir():
            raise MapError(f"The map cannot be written to {path}; accepted: a file in a folder that exists.")
        tensors = {name: getattr(self, name).cpu() for name in TENSORS}
        write_tensors(Path(path), tensors, {"format": FORMAT, "meta": asdict(self.meta)})

    @classmethod
    def load(cls, path: str | Path) -> ConditionalDifferenceMap:
        """Read what `save` wrote. Raises `MapError` for a damaged file or one of another kind."""
        path = Path(path)
        if path.is_dir():
            raise MapError(f"{path} is a folder. If it holds counts, make a map of them: dspa map reduce {path}.")
        if not path.is_file():
            raise MapError(
                f"There is no map file at {path}. Make one: dspa map build, or dspa.build_map(...).save(path)."
            )
        header = read_header(path)
        names = FORMATS.get(header.get("format", ""))
        if names is None:
            raise MapError(f"{path} is not a map of format {FORMAT} (it says {header.get('format')!r}).")
        tensors = read_tensors(path, names)
        try:
            meta = MapMeta(**header["meta"])
            if header["format"] in EARLIER:
                tensors["gate_latents"] = _partial(tensors["n_open"], meta.n_triples)
                tensors["gates"] = tensors["gates"][tensors["gate_latents"].long()]
            return cls(**tensors, meta=meta)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise MapError(f"{path} is damaged ({error}). Copy it again from where it was made.") from error


TENSORS = ("columns", "values", "n_open", "variance", "gate_latents", "gates", "hot", "hot_counts", "mean")
# What files of earlier formats hold: the first ones no calibration, both ones all gates instead of some.
EARLIER = {
    "dspa.map.1": ("columns", "values", "n_open", "variance", "gates"),
    "dspa.map.2": ("columns", "values", "n_open", "variance", "gates", "hot", "hot_counts", "mean"),
}
FORMATS = EARLIER | {FORMAT: TENSORS}


def _partial(n_open: Tensor, n_triples: int) -> Tensor:
    """Latents whose gate is open on some triples and not on all."""
    return ((n_open > 0) & (n_open < n_triples)).nonzero().flatten().to(torch.int32)
