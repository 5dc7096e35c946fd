"""The conditional-difference map: reduce densities to it, sparsify, score, select, save, load."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dspa.config import SteeringConfig
from dspa.densities import Densities, collect
from dspa.errors import MapError
from dspa.preferences import Triple
from dspa.saes import FrozenSAE
from dspa.version import __version__
from dspa_kernels import SteeringPlan, map_lookup

FORMAT = "dspa.map.2"
GATE_RULES = ("published", "active")
# Differences of densities become multiples of this, so that sums of up to 2^20 of them are exact in fp64 in any
# order. An entry of the map is then known to half of it, and two equal ones are within one of it.
QUANTUM = 2.0**-32
ROWS_A_BLOCK = 128
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


class ConditionalDifferenceMap:
    """`A` [d_sae_in, d_sae_out] as its non-empty columns, with what the optional scorings need, and a calibration,
    which changes no result: with it, steering reads less of the encoder.

    columns [C] int32, increasing latents of the output SAE; values [d_sae_in, C] fp32, `A[:, columns]`; n_open
    [d_sae_in] int32, prompts on which each gate is open; variance [C] fp32, of `rho~` over all responses; gates
    [d_sae_in, ceil(N / 8)] uint8, bit n % 8 of byte n // 8 for the n-th prompt, in an order of their own.

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
        gates: Tensor,
        meta: MapMeta,
        hot: Tensor | None = None,
        hot_counts: Tensor | None = None,
        mean: Tensor | None = None,
    ) -> None:
        self.columns, self.values, self.meta = columns, values, meta
        self.n_open, self.variance, self.gates = n_open, variance, gates
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
            "gates": (torch.uint8, (meta.d_sae_in, -(-meta.n_triples // 8))),
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
        """`sqrt(2 log(2 d_sae / delta) / N_i)` [d_sae_in]: every entry of a row, as a conditional mean, is within
        it of the truth with probability 1 - delta. Infinite for a gate that never opened."""
        return (2 * math.log(2 * self.meta.d_sae_out / delta) / self.n_open.float()).sqrt()

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
        bits = torch.arange(8, device=self.gates.device, dtype=torch.uint8)
        unpacked = (self.gates[latents][:, :, None] >> bits) & 1
        return unpacked.flatten(1)[:, : self.meta.n_triples].double()

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
        tensors = {name: getattr(self, name).cpu().contiguous() for name in TENSORS}
        header = json.dumps({"format": FORMAT, "sha256": _digest(tensors), "meta": asdict(self.meta)})
        # Of several entries, safetensors writes any first; with one, the same map is the same file.
        save_file(tensors, path, metadata={"dspa": header})

    @classmethod
    def load(cls, path: str | Path) -> ConditionalDifferenceMap:
        """Read what `save` wrote. Raises `MapError` for a damaged file or one of another kind."""
        if not Path(path).is_file():
            raise MapError(
                f"There is no map file at {path}. Make one: dspa map build, or dspa.build_map(...).save(path)."
            )
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("dspa", "{}"))
                names = FORMATS.get(header.get("format"))
                if names is None:
                    raise MapError(f"{path} is not a map of format {FORMAT} (it says {header.get('format')!r}).")
                meta = MapMeta(**header["meta"])
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
            found = cls(**tensors, meta=meta)
            if header["sha256"] != _digest(tensors):
                raise MapError(f"{path} is damaged (its tensors are not those that were written). Copy it again.")
            return found
        except (SafetensorError, AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise MapError(f"{path} is damaged ({error}). Copy it again from where it was made.") from error


TENSORS = ("columns", "values", "n_open", "variance", "gates", "hot", "hot_counts", "mean")
# What a file of each format holds: maps without a calibration are read as well.
FORMATS = {"dspa.map.1": TENSORS[:5], FORMAT: TENSORS}


def _digest(tensors: dict[str, Tensor]) -> str:
    """Of all tensors, in the order of TENSORS."""
    sha = hashlib.sha256()
    for tensor in tensors.values():
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def build_map(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triples: Iterable[Triple] | str | Path,
    sae_in: FrozenSAE,
    sae_out: FrozenSAE,
    *,
    percentile: float = 90.0,
    gate_rule: str = "published",
    count_tokens: str = "all",
    k_diff: int = 16,
    sparsify: bool = True,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    work_dir: str | Path | None = None,
    progress: bool = True,
    layers: str | None = None,
    model_name: str | None = None,
) -> ConditionalDifferenceMap:
    """Make the conditional-difference map of a model from preference triples (DSPA, offline).

    Args:
        model, tokenizer, triples, sae_in, sae_out, count_tokens, max_length, batch_tokens, work_dir, progress,
        layers, model_name: as for `densities.collect`.
        percentile: of each prompt latent's density, from which its gate opens (published: 90).
        gate_rule: "published", or "active": a gate opens only where its latent is active at all.
        k_diff: entries at each end of a row that set the cut of the sparsification (published: 16).
        sparsify: set entries below the cut to 0, as published.
    """
    _check_settings(percentile, gate_rule, k_diff, sae_out.d_sae)
    densities = collect(
        model,
        tokenizer,
        triples,
        sae_in,
        sae_out,
        count_tokens=count_tokens,
        max_length=max_length,
        batch_tokens=batch_tokens,
        work_dir=work_dir,
        progress=progress,
        layers=layers,
        model_name=model_name,
    )
    return reduce(densities, percentile=percentile, gate_rule=gate_rule, k_diff=k_diff, sparsify=sparsify)


def _check_settings(percentile: float, gate_rule: str, k_diff: int, d_sae_out: int) -> None:
    if not 0 <= percentile <= 100:
        raise ValueError(f"`percentile` is {percentile!r}; accepted: 0 to 100 (published: 90).")
    if gate_rule not in GATE_RULES:
        raise ValueError(f"`gate_rule` is {gate_rule!r}; accepted: {', '.join(GATE_RULES)}.")
    if not 1 <= k_diff <= d_sae_out:
        raise ValueError(f"`k_diff` is {k_diff!r}; accepted: 1 to the output SAE's width, {d_sae_out}.")


def reduce(
    densities: Densities,
    *,
    percentile: float = 90.0,
    gate_rule: str = "published",
    k_diff: int = 16,
    sparsify: bool = True,
) -> ConditionalDifferenceMap:
    """The map of collected densities. Needs no model; the same counts in any order give the same bits."""
    s = densities.settings
    _check_settings(percentile, gate_rule, k_diff, s.d_sae_out)
    gates = _gates(densities.prompt.densities(s.d_sae_in), percentile, gate_rule)
    chosen, rejected = (each.densities(s.d_sae_out) for each in (densities.chosen, densities.rejected))
    difference = ((chosen - rejected) / QUANTUM).round() * QUANTUM
    cut, largest = _survey(gates, difference, k_diff)
    # What rounding may have made of a zero is a zero, and of a tie with the cut, a tie.
    above = max(cut - QUANTUM if sparsify else 0.0, QUANTUM / 2)
    latents = (largest > above).nonzero().flatten()
    if not len(latents):
        raise MapError(
            "The map is empty: no output latent differs between chosen and rejected responses where a gate is open. "
            "Check that the triples prefer something, and that the SAEs are active on this model."
        )
    hot, hot_counts = densities.hot()
    values = torch.zeros(s.d_sae_in, len(latents))
    for start, block in _blocks(gates, difference[:, latents]):
        values[start : start + len(block)] = torch.where(block.abs() > above, block, 0)
    meta = MapMeta(
        **{name: getattr(s, name) for name in MapMeta.__annotations__ if hasattr(s, name)},
        percentile=percentile,
        gate_rule=gate_rule,
        k_diff=k_diff,
        sparsify=sparsify,
        package=__version__,
    )
    return ConditionalDifferenceMap(
        columns=latents.to(torch.int32),
        values=values,
        n_open=gates.sum(dim=0, dtype=torch.int32),
        # Sorted, so that sums run in one order.
        variance=torch.cat((chosen[:, latents], rejected[:, latents]))
        .sort(dim=0)
        .values.var(dim=0, unbiased=False)
        .float(),
        gates=_packed(gates),
        meta=meta,
        hot=hot,
        hot_counts=hot_counts,
        mean=densities.mean(),
    )


def _gates(rho: Tensor, percentile: float, gate_rule: str) -> Tensor:
    """`g_i(x) = 1[rho_i(x) >= tau_i]` [N, d_sae_in] bool, tau_i the percentile over the prompts."""
    ordered = rho.sort(dim=0).values
    place = percentile * (len(rho) - 1) / 100
    below = math.floor(place)
    low, high = ordered[below], ordered[math.ceil(place)]
    gates = rho >= low + (high - low) * (place - below)
    return gates & (rho > 0) if gate_rule == "active" else gates


def _blocks(gates: Tensor, difference: Tensor) -> Iterator[tuple[int, Tensor]]:
    """`A = g^T difference / N` in blocks of rows: (first row, [rows, d_sae_out] fp64)."""
    for start in range(0, gates.shape[1], ROWS_A_BLOCK):
        block = gates[:, start : start + ROWS_A_BLOCK].double().T
        yield start, block @ difference / len(gates)


def _survey(gates: Tensor, difference: Tensor, k_diff: int) -> tuple[float, Tensor]:
    """The smallest size, 0 aside, among the k_diff largest and smallest entries of each row (rows of gates never
    open are 0), and the largest size in each column [d_sae_out]."""
    cut, largest = math.inf, difference.new_zeros(difference.shape[1])
    for _, block in _blocks(gates, difference):
        ends = torch.cat([block.topk(k_diff, dim=1, largest=each).values for each in (True, False)]).abs()
        ends = ends[ends > QUANTUM / 2]
        cut = min(cut, float(ends.min())) if ends.numel() else cut
        largest = torch.maximum(largest, block.abs().amax(dim=0))
    return cut, largest


def _packed(gates: Tensor) -> Tensor:
    """Gates [N, d_sae_in] as bits, [d_sae_in, ceil(N / 8)] uint8, the prompts in the order of their gates: the order
    of the triples does not show."""
    gates = gates[sorted(range(len(gates)), key=lambda n: gates[n].numpy().tobytes())]
    rows = torch.nn.functional.pad(gates.T.to(torch.uint8), (0, -len(gates) % 8))
    bits = rows.view(len(rows), -1, 8) << torch.arange(8, dtype=torch.uint8)
    return bits.sum(dim=2, dtype=torch.uint8)
