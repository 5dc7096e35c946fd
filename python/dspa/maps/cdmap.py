"""The conditional-difference map: scores, plans and files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from dspa.config import SteeringConfig
from dspa.costs import Costs
from dspa.errors import MapError, refusal
from dspa.files import checksum, digest_of, read_header, read_tensors, warn_unsealed, write_tensors
from dspa.models.sources import Source
from dspa.outputs import output_file
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import check_residual
from dspa.schemas import Accepts, Count, Day, Flag, OneOf, Percentile, PositiveInt, Text, check, check_at_most, schema
from dspa.snapshot import Frozen
from dspa_kernels import EncoderStream, SteeringPlan, map_lookup, product

FORMAT = "dspa.map.3"
GATE_RULES = ("published", "active")
COUNT_TOKENS = ("all", "text")
# Number of hot latents that steering evaluates before it reads the encoder.
N_LARGE = 64


# Tokens by SAE and latent, which is text in JSON.
Latent: TypeAlias = Annotated[int, Field(ge=0), Accepts("the number of a latent")]
Promoted: TypeAlias = dict[Annotated[str, OneOf(("sae_in", "sae_out"))], dict[Latent, list[Text]]]
COPY = "Copy it again from where it was made."


@schema
class MapMeta:
    """Origin of a map: SAEs, model, data and every setting.

    Attributes:
        sae_in, sae_out: fingerprints of the SAEs.
        model_name: name of the model.
        layer_in, layer_out: layers of the SAEs.
        d_sae_in, d_sae_out: widths of the SAEs.
        n_triples: number of triples.
        n_cut: number of responses that were cut to fit.
        count_tokens, percentile, gate_rule, k_diff, sparsify: as for `reduce`.
        max_length: as for `collect`.
        package: version of the package.
        n_inactive: number of input latents that are active on no prompt, None in maps that do not record it.
        n_zero_percentile: number of input latents whose percentile is 0, None in maps that do not record it.
        neuronpedia_out: as in `CollectSettings`.
        boundary, chat_template_kwargs, template_date: as for `CollectSettings`. The defaults are those of earlier
            versions, which did not record a date.
        attention: as for `CollectSettings`.
        model_digest: as for `CollectSettings`.
    """

    sae_in: Text
    sae_out: Text
    model_name: Text
    layer_in: Count
    layer_out: Count
    d_sae_in: PositiveInt
    d_sae_out: PositiveInt
    n_triples: PositiveInt
    n_cut: Count
    count_tokens: Annotated[str, OneOf(COUNT_TOKENS)]
    max_length: PositiveInt | None
    percentile: Percentile
    gate_rule: Annotated[str, OneOf(GATE_RULES)]
    k_diff: PositiveInt
    sparsify: Flag
    package: Text
    n_inactive: Count | None = None
    n_zero_percentile: Count | None = None
    neuronpedia_out: Text = ""
    boundary: Text = "apart"
    chat_template_kwargs: dict[Text, Any] | None = None
    template_date: Day | None = None
    attention: Text = ""
    model_digest: Text = ""

    def __post_init__(self) -> None:
        check_at_most("n_cut", self.n_cut, "responses", 2 * self.n_triples)
        for name in ("n_inactive", "n_zero_percentile"):
            check_at_most(name, getattr(self, name) or 0, "input latents", self.d_sae_in)
        check_at_most("k_diff", self.k_diff, "output latents", self.d_sae_out)


@schema
class _Header:
    """The header of a map's file."""

    format: Text
    sha256: Text
    meta: MapMeta
    sources: dict[Text, Source] = field(default_factory=dict)
    promoted: Promoted = field(default_factory=dict)
    seal: Text = ""


def confidence_radius(n_open: Tensor, d_sae_out: int, delta: float) -> Tensor:
    """Return `sqrt(2 log(2 d_sae_out / delta) / N_i)`, the confidence radius of rows.

    With probability 1 - delta, every entry of a row, as a conditional mean, is within the radius of its true value.

    Args:
        n_open: numbers N_i of prompts on which gates are open.
        d_sae_out: width of the output SAE.
        delta: level.
    """
    return (2 * math.log(2 * d_sae_out / delta) / n_open.float()).sqrt()


def prompt_latents(counts: Tensor, k_prompt: int) -> list[Tensor]:
    """Return the latents that each prompt looks up: those of its largest counts, ties to the smaller latent.

    Args:
        counts: activation counts of the prompts, [B, d_sae_in].
        k_prompt: number of latents, fewer where fewer are active.
    """
    order = counts.long() * counts.shape[1] + torch.arange(counts.shape[1] - 1, -1, -1, device=counts.device)
    largest = order.topk(k_prompt, dim=1).indices
    return [latents[count[latents] > 0] for latents, count in zip(largest, counts, strict=True)]


class ConditionalDifferenceMap(Frozen):
    """`A` [d_sae_in, d_sae_out] as its non-empty columns, data for the optional scorings, and a calibration.

    The calibration comes from a sample of response tokens. It changes no result: with it, steering reads less of the
    encoder. Its three tensors are empty in maps without one, such as those of older versions.

    A map whose tensors were changed is refused where it is used, and where a generation begins.

    Attributes:
        columns: latents of the output SAE, increasing, [C] int32.
        values: `A[:, columns]`, [d_sae_in, C] fp32.
        n_open: number of prompts on which each gate is open, [d_sae_in] int32.
        variance: of `rho~` over all responses, [C] fp32.
        gate_latents: input latents whose gate is open on some prompts and not on all, increasing, [R] int32.
        gates: the prompts on which those gates are open, [R, ceil(N / 8)] uint8: bit n % 8 of byte n // 8 for the n-th
            prompt, in an order that does not follow the data.
        hot: output latents that were ever a sampled token's largest, most often first (ties: smaller index), [H] int32.
        hot_counts: number of tokens for each of `hot`, [H] int64.
        mean: mean residual as the output SAE normalises it, [d_in] fp32.
        meta: origin and settings.
        sources: where "model", "sae_in" and "sae_out" were loaded from, as far as that is known. They are written with
            the map, so that it can be used without naming them again, and are no part of its identity. Before
            publishing a map that was made with local files, remove their paths: `cdmap.sources.clear()`.
        promoted: the tokens that `latents()` promote most (`dspa.top_tokens`), for people. Empty in maps of earlier
            versions, and no part of the map's identity.

    Attributes:
        costs: costs of making the map, right after it was made. They are not in its file, which is the same whenever
            it is made: `dspa map build` writes them beside it.
    """

    _kind, _error = "map", MapError

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
        sources: Mapping[str, Source] | None = None,
        promoted: Mapping[str, Mapping[int, list[str]]] | None = None,
    ) -> None:
        self.columns, self.values, self.meta = columns, values, meta
        self.sources = dict(sources or {})
        self.promoted = dict(promoted or {})
        self.costs: Costs | None = None
        self.n_open, self.variance = n_open, variance
        self.gate_latents, self.gates = gate_latents, gates
        self.hot = columns.new_empty(0, dtype=torch.int32) if hot is None else hot
        self.hot_counts = columns.new_empty(0, dtype=torch.int64) if hot_counts is None else hot_counts
        self.mean = columns.new_empty(0, dtype=torch.float32) if mean is None else mean
        self._check()
        self._freeze()

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TENSORS}

    def _check(self) -> None:
        meta, n_columns = self.meta, len(self.columns)
        expected = {
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
        for name, (dtype, shape) in expected.items():
            tensor: Tensor = getattr(self, name)
            if not isinstance(tensor, Tensor):
                raise refusal(MapError, f"`{name}`", f"a {type(tensor).__name__}", f"a tensor of {dtype} {list(shape)}")
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                got, accepted = f"{tensor.dtype} {list(tensor.shape)}", f"{dtype} {list(shape)}"
                raise refusal(MapError, f"The map is damaged: `{name}`", got, accepted)
        within = (self.columns >= 0) & (self.columns < meta.d_sae_out)
        if not n_columns:
            raise MapError("The map has no columns: it would steer nothing. Make it again: dspa map reduce.")
        if not bool(within.all()) or bool((self.columns.diff() <= 0).any()):
            raise MapError("`columns` are not increasing latents of the output SAE. The map is damaged.")
        within = (self.hot >= 0) & (self.hot < meta.d_sae_out)
        if not bool(within.all()) or len(self.hot.unique()) != len(self.hot):
            raise MapError("`hot` are not distinct latents of the output SAE. The map is damaged.")
        if not torch.equal(self.gate_latents, _partly_open(self.n_open, meta.n_triples)):
            raise MapError("`gate_latents` are not the latents whose gates are partly open. The map is damaged.")
        for name in ("values", "variance", "mean"):
            if not bool(getattr(self, name).isfinite().all()):
                raise MapError(f"`{name}` hold NaN or infinity. The map is damaged.")
        for name, least, most in (
            ("n_open", 0, meta.n_triples),
            ("variance", 0, math.inf),
            ("hot_counts", 1, math.inf),
        ):
            tensor = getattr(self, name)
            if bool(((tensor < least) | (tensor > most)).any()):
                raise MapError(f"`{name}` are not all from {least} to {most}. The map is damaged.")
        if bool((self.hot_counts.diff() > 0).any()):
            raise MapError("`hot_counts` are not in decreasing order. The map is damaged.")
        if not torch.equal(_set_bits(self.gates, meta.n_triples), self.n_open[self.gate_latents.long()].long()):
            raise MapError("`gates` are not open on as many prompts as `n_open` says. The map is damaged.")

    def __repr__(self) -> str:
        m = self.meta
        return (
            f"ConditionalDifferenceMap({m.model_name or 'model'}, layer {m.layer_in} [{m.d_sae_in}] -> layer "
            f"{m.layer_out} [{m.d_sae_out}], {len(self.columns)} columns from {m.n_triples} triples)"
        )

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the map by its values and settings, wherever it is stored or computed."""
        values = checksum({name: tensor.cpu() for name, tensor in self._tensors().items()})
        return digest_of({"values": values, "meta": asdict(self.meta)})

    @property
    def model_digest(self) -> str:
        """Digest of the model's weights (`dspa.models.sources.model_digest`), empty if the map does not record it."""
        source = self.sources.get("model")
        return self.meta.model_digest or (source.digest if source else "")

    def to(self, device: torch.device | str) -> ConditionalDifferenceMap:
        """Return the map on `device`, or the map itself where it is there already."""
        if torch.device(device) == self.values.device:
            return self
        return self.replaced(**{name: getattr(self, name).to(device) for name in TENSORS})

    def replaced(self, *, meta: MapMeta | None = None, **tensors: Tensor) -> ConditionalDifferenceMap:
        """Return the map with other metadata, or with some of its tensors replaced."""
        kept = {name: getattr(self, name) for name in TENSORS}
        return ConditionalDifferenceMap(
            **kept | tensors, meta=meta or self.meta, sources=self.sources, promoted=self.promoted
        )

    def latents(self) -> dict[str, list[int]]:
        """Return the latents of "sae_in" whose rows are not 0, and those of "sae_out" that have a column."""
        return {"sae_in": self.values.any(dim=1).nonzero().flatten().tolist(), "sae_out": self.columns.tolist()}

    def hot_share(self) -> float:
        """Return the fraction of the sampled maxima that the first N_LARGE latents of `hot` hold."""
        return float(self.hot_counts[:N_LARGE].sum() / self.hot_counts.sum().clamp(min=1))

    def check_saes(self, sae_in: FrozenSAE, sae_out: FrozenSAE) -> None:
        """Raise `MapError` unless these are the SAEs that the map was made with.

        Raise `SAEError` for one that is not of the residual stream after a decoder layer.

        Args:
            sae_in: the SAE that gates.
            sae_out: the SAE whose latents are steered.
        """
        self.check_unchanged()
        for name, sae, fingerprint, layer in (
            ("sae_in", sae_in, self.meta.sae_in, self.meta.layer_in),
            ("sae_out", sae_out, self.meta.sae_out, self.meta.layer_out),
        ):
            if sae.fingerprint != fingerprint:
                swapped = sae.fingerprint in (self.meta.sae_in, self.meta.sae_out)
                hint = "Are the two SAEs swapped? " if swapped else ""
                advice = f"{hint}Load the SAE that the map was made with, or make a map with this one."
                raise MapError(
                    f"`{name}` has fingerprint {sae.fingerprint}, and the map was made with {fingerprint} (layer "
                    f"{layer}). {sae.fingerprint_advice(fingerprint) or advice}"
                )
            check_residual(sae)
            if sae.layer != layer:
                raise MapError(f"`{name}` sits at layer {sae.layer}, and the map was made at layer {layer}.")

    def check_sizes(self, config: SteeringConfig) -> None:
        """Raise `ValueError` for a k larger than the width of its SAE."""
        for name, k, end, width in (
            ("k_prompt", config.k_prompt, "input", self.meta.d_sae_in),
            ("k_diff", config.k_diff, "output", self.meta.d_sae_out),
        ):
            if k > width:
                raise refusal(ValueError, f"`{name}`", k, f"1 to the {end} SAE's width, {width}")

    def encoder_stream(self, sae_out: FrozenSAE, screen: str = "none") -> EncoderStream:
        """Return the output SAE's encoder as `dspa_kernels.steer` reads it for a largest latent.

        With a calibration it is a copy, its rows in the order of the hot latents. Make it anew on each device, so that
        it shares the other tensors of the SAE there.

        Args:
            sae_out: the SAE whose latents are steered.
            screen: as for `EncoderStream.of`.
        """
        mean = self.mean if len(self.mean) else None
        return EncoderStream.of(sae_out.weights, hot=self.hot, n_large=N_LARGE, screen=screen, mean=mean)

    # Scores and plans

    def score(self, gates: Tensor) -> Tensor:
        """Return `g A`.

        Args:
            gates: `g` [.., d_sae_in], 0 and 1 or any weights.

        Returns:
            [.., d_sae_out] fp32.
        """
        self.check_unchanged()
        score = self.values.new_zeros(*gates.shape[:-1], self.meta.d_sae_out)
        score[..., self.columns.long()] = product(gates.to(self.values), self.values)
        return score

    def select(self, counts: Tensor, config: SteeringConfig, *, backend: str = "auto") -> SteeringPlan:
        """Return the plan of each prompt (DSPA online, steps 1 to 3).

        Args:
            counts: activation counts of the prompts, [B, d_sae_in] int32.
            config: scoring, mode and sizes.
            backend: as for `dspa_kernels.map_lookup`.

        Raises:
            ValueError: counts of another shape or dtype, or a k larger than the width of its SAE.
        """
        self.check_unchanged()
        self.check_sizes(config)
        accepted = f"torch.int32 [B, {self.meta.d_sae_in}]"
        if not isinstance(counts, Tensor):
            raise refusal(ValueError, "`counts`", f"a {type(counts).__name__}", accepted)
        if counts.dtype != torch.int32 or counts.dim() != 2 or counts.shape[1] != self.meta.d_sae_in:
            raise refusal(ValueError, "`counts`", f"{counts.dtype} {list(counts.shape)}", accepted)
        counts = counts.to(self.values.device)
        if config.scoring != "demixed":
            values, k_prompt = self.scored(config), config.k_prompt
        else:
            # Each prompt looks up one row, which holds its own score.
            values, k_prompt = self._demixed_values(counts, config), 1
            counts = torch.eye(len(counts), dtype=torch.int32, device=counts.device)
        k_diff, mode = config.k_diff, config.mode
        return map_lookup(counts, values, k_prompt=k_prompt, k_diff=k_diff, mode=mode, backend=backend)

    def scored(self, config: SteeringConfig) -> Tensor:
        """Return the values [d_sae_in, C] whose rows `config.scoring` sums.

        Args:
            config: any scoring but "demixed", which is not a sum of rows.
        """
        if config.scoring == "whitened":
            return torch.where(self.variance > 0, self.values / self.variance, 0)
        if config.scoring == "confident":
            n_open = self.n_open.clamp(min=1)[:, None]
            mean = self.values * (self.meta.n_triples / n_open)
            return torch.where(mean.abs() > self.radius(config.delta)[:, None], self.values, 0)
        return self.values

    def radius(self, delta: float) -> Tensor:
        """Return the `confidence_radius` of each row [d_sae_in], infinite for a gate that never opened."""
        return confidence_radius(self.n_open, self.meta.d_sae_out, delta)

    def _demixed_values(self, counts: Tensor, config: SteeringConfig) -> Tensor:
        """Return `A_S^T (M_S + ridge I)^-1 g_S` [B, C], with S the prompt's k_prompt latents and M = E[g g^T]."""
        scores = []
        for latents in prompt_latents(counts, config.k_prompt):
            gates = self._gates_of(latents)
            gram = gates @ gates.T / self.meta.n_triples
            gram += config.ridge * torch.eye(len(latents), dtype=gram.dtype, device=gram.device)
            weights = torch.linalg.solve(gram, gram.new_ones(len(latents)))
            scores.append(weights @ self.values[latents].double())
        return torch.stack(scores).float() if scores else self.values[:0]

    def _gates_of(self, latents: Tensor) -> Tensor:
        """Return the gates of some latents on all N prompts, [len(latents), N] fp64."""
        gates = (self.n_open[latents] == self.meta.n_triples).double()[:, None].repeat(1, self.meta.n_triples)
        position = torch.searchsorted(self.gate_latents, latents.to(torch.int32)).clamp(max=len(self.gate_latents) - 1)
        partly = self.gate_latents[position] == latents if len(self.gate_latents) else torch.zeros_like(latents).bool()
        bits = torch.arange(8, device=self.gates.device, dtype=torch.uint8)
        unpacked = (self.gates[position[partly]][:, :, None] >> bits) & 1
        gates[partly] = unpacked.flatten(1)[:, : self.meta.n_triples].double()
        return gates

    def dense(self) -> Tensor:
        """Return `A` [d_sae_in, d_sae_out] fp32, with its empty columns."""
        full = self.values.new_zeros(self.meta.d_sae_in, self.meta.d_sae_out)
        full[:, self.columns.long()] = self.values
        return full

    # Files

    def save(self, path: str | Path) -> None:
        """Write the map to one safetensors file, with the metadata in its header.

        Args:
            path: a file in a folder that exists, or what `replacing` writes through.

        Raises:
            MapError: a path that cannot be a file.
            OSError: the file cannot be written.
        """
        output_file(Path(path), "The path of the map", MapError)
        self.check_unchanged()
        tensors = {name: getattr(self, name).cpu() for name in TENSORS}
        header: dict[str, Any] = {"format": FORMAT, "meta": asdict(self.meta)}
        if self.sources:
            header["sources"] = {name: asdict(source) for name, source in self.sources.items()}
        if self.promoted:
            header["promoted"] = self.promoted
        write_tensors(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> ConditionalDifferenceMap:
        """Read a map that `save` wrote.

        Args:
            path: the file.

        Raises:
            MapError: there is no such file, or it is damaged or not a map.
        """
        path = Path(path)
        if path.is_dir():
            raise MapError(f"{path} is a folder. If it holds counts, make a map from them: dspa map reduce {path}.")
        if not path.is_file():
            raise MapError(
                f"There is no map file at {path}. Make one: dspa map build, or dspa.build_map(...).save(path)."
            )
        header = read_header(path)
        names = FORMATS.get(str(header.get("format")))
        if names is None:
            raise MapError(f"{path} is not a map of format {FORMAT} (it says {header.get('format')!r}).")
        record = check(_Header, header, MapError, f"{path} is damaged", COPY)
        meta = record.meta
        tensors = read_tensors(path, names, header)
        try:
            if header["format"] in EARLIER:
                tensors["gate_latents"] = _partly_open(tensors["n_open"], meta.n_triples)
                tensors["gates"] = tensors["gates"][tensors["gate_latents"].long()]
            cdmap = cls(**tensors, meta=meta, sources=record.sources, promoted=record.promoted)
        # Tensors of the wrong shape.
        except (IndexError, RuntimeError, TypeError) as error:
            raise MapError(f"{path} is damaged ({error}). {COPY}") from error
        warn_unsealed(header, path, "ConditionalDifferenceMap.load and save it again")
        if "model_digest" not in header["meta"] and not cdmap.model_digest:
            warnings.warn(
                f"{path} is of an earlier version and does not record the weights of its model. Whether a model has "
                f"them is not checked, but for its name, {meta.model_name or 'where there is one'}.",
                stacklevel=2,
            )
        return cdmap


TENSORS = ("columns", "values", "n_open", "variance", "gate_latents", "gates", "hot", "hot_counts", "mean")
# Tensors of earlier formats. The first has no calibration, and both hold all gates instead of some.
EARLIER = {
    "dspa.map.1": ("columns", "values", "n_open", "variance", "gates"),
    "dspa.map.2": ("columns", "values", "n_open", "variance", "gates", "hot", "hot_counts", "mean"),
}
FORMATS = EARLIER | {FORMAT: TENSORS}


def _set_bits(gates: Tensor, n_triples: int) -> Tensor:
    """Return the number of prompts on which each gate is open, [R] int64, or -1 for one with bits of no prompt."""
    bits = (gates[:, :, None] >> torch.arange(8, device=gates.device, dtype=torch.uint8)) & 1
    bits = bits.flatten(1)
    return bits.sum(dim=1).where(bits[:, n_triples:].sum(dim=1) == 0, -1)


def _partly_open(n_open: Tensor, n_triples: int) -> Tensor:
    """Return the latents whose gate is open on some triples and not on all."""
    return ((n_open > 0) & (n_open < n_triples)).nonzero().flatten().to(torch.int32)
