"""DSPA of the requests of an engine: the latents of their prompts, their plans, and their edits."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dspa.config import SteeringConfig
from dspa.errors import MapError
from dspa.maps.cdmap import ConditionalDifferenceMap
from dspa.saes.frozen import FrozenSAE
from dspa.saes.placement import required_layer
from dspa.serving.batch import Batch
from dspa.serving.prefix_cache import CacheSlots
from dspa.serving.requests import SteeringRequest
from dspa.serving.settings import Place, ServingSettings
from dspa_kernels import MapWeights, SteeringPlan, activation_bits, bit_counts, map_lookup, n_words, steer_

# Below the logger that vLLM sets up: Python shows nothing of others but warnings.
logger = logging.getLogger(f"vllm.{__name__}")

# A position that no token has.
NEVER = torch.iinfo(torch.int64).max


class PromptLatents:
    """The active latents of prompt tokens in one input SAE, a bit each, in the slots of their keys and values.

    After the layer of the SAE comes `keep`. The latents of a prompt's tokens can be of an earlier step, of the prefix
    cache, or of another request in the same step.

    Args:
        sae: the SAE.
        batch: the tokens of the engine's steps.

    Attributes:
        reads: `keep`, by the layer after which it is called.
        writes: empty.
        cache: the slots, None while vLLM measures the memory of a step, before there is a cache.
        bits: the latents, where there is a cache [n_slots, n_words(d_sae)].
    """

    def __init__(self, sae: FrozenSAE, batch: Batch) -> None:
        self.sae, self.batch = sae, batch
        self.reads: dict[int, Callable[[Tensor], None]] = {required_layer(sae): self.keep}
        self.writes: dict[int, Callable[[Tensor, Tensor | None], None]] = {}
        self.cache: CacheSlots | None = None

    def begin(self, row: int, request: SteeringRequest | None) -> None:
        """Do nothing: latents are kept for every request with a map."""

    def keep_beside(self, cache: CacheSlots) -> None:
        """Keep latents in the slots of a cache."""
        self.cache = cache
        self.bits = torch.zeros(cache.n_slots, n_words(self.sae.d_sae), dtype=torch.int32, device=self.batch.device)
        size = self.bits.nbytes / 2**20
        logger.info("Active latents of prompts, beside the key/value cache: %.1f MiB, a bit each.", size)

    def keep(self, h: Tensor) -> None:
        """Keep the active latents of a step's prompt tokens, of residuals [n_tokens, d_in]."""
        if self.cache is not None:
            activation_bits(h, self.sae.weights, self.batch.placed.slot[: len(h)], self.bits)


class MapSteering:
    """The maps of one pair of SAEs, and one row for each of the R requests of an engine.

    After the layer of the input SAE comes `plan`, after that of the output SAE `edit`. Neither reads a number on the
    host.

    Args:
        maps: the maps by name.
        config: settings of steering.
        first: group of the batch whose requests the first map plans. The others' follow.
        latents: active latents of prompts in the input SAE.
        sae_out: the output SAE.

    Attributes:
        reads: `plan`, by the layer after which it is called.
        writes: `edit`, likewise.

    Raises:
        MapError: a map that belongs to other SAEs.
    """

    def __init__(
        self,
        maps: Mapping[str, ConditionalDifferenceMap],
        config: SteeringConfig,
        first: int,
        latents: PromptLatents,
        sae_out: FrozenSAE,
    ) -> None:
        self.names, self.config, self.batch = list(maps), config, latents.batch
        self.groups = slice(first, first + len(maps))
        self.latents, self.sae_out = latents, sae_out
        device, n_requests = self.batch.device, self.batch.n_requests
        self._load([cdmap.to(device) for cdmap in maps.values()])
        self.reads: dict[int, Callable[[Tensor], None]] = {required_layer(latents.sae): self.plan}
        self.writes: dict[int, Callable[[Tensor, Tensor | None], None]] = {required_layer(sae_out): self.edit}
        n_slots = 2 * self.config.k_diff
        self.first_edited = torch.full((n_requests,), NEVER, dtype=torch.int64, device=device)
        self.alpha = torch.zeros(n_requests, dtype=torch.float32, device=device)
        # The slots of the sign that its mode does not use.
        self.drops = torch.zeros(n_requests, n_slots, dtype=torch.bool, device=device)
        self.counts = torch.zeros(n_requests, latents.sae.d_sae, dtype=torch.int32, device=device)
        self.slots = torch.full((n_requests, n_slots), -1, dtype=torch.int32, device=device)
        self.signs = torch.zeros(n_requests, n_slots, dtype=torch.int8, device=device)
        # Counters of `steer`, and where they are copied to without a wait.
        self.paths = torch.zeros(6, dtype=torch.int64, device=device)
        self.paths_seen = torch.zeros(6, dtype=torch.int64, pin_memory=device.type == "cuda")

    def _load(self, maps: list[ConditionalDifferenceMap]) -> None:
        """Keep the columns that any of the maps has [C], and the values [d_sae_in, C] of each map at them."""
        for cdmap in maps:
            cdmap.check_saes(self.latents.sae, self.sae_out)
            cdmap.check_sizes(self.config)
        columns = torch.cat([cdmap.columns for cdmap in maps]).unique()
        self.values = []
        for cdmap in maps:
            wide = cdmap.values.new_zeros(cdmap.meta.d_sae_in, len(columns))
            wide[:, torch.searchsorted(columns, cdmap.columns)] = cdmap.scored(self.config)
            self.values.append(wide)
        self.weights = MapWeights.gather(columns, self.values[0], self.sae_out.weights)
        # In the order of the first map's calibration.
        self.stream = maps[0].encoder_stream(self.sae_out)

    def begin(self, row: int, request: SteeringRequest | None) -> None:
        """Give a row to a request, None for one that is not steered."""
        self._warn_of_residuals()
        self.first_edited[row] = NEVER
        if request is None or not set(self.names) & set(request.maps):
            return
        k_diff = self.config.k_diff
        self.first_edited[row] = request.first_edited
        self.alpha[row] = request.dspa_alpha
        self.drops[row, :k_diff] = request.dspa_mode == "ablate"
        self.drops[row, k_diff:] = request.dspa_mode == "augment"

    def _warn_of_residuals(self) -> None:
        """Warn of residuals that were not finite, as an earlier call had them copied."""
        if self.paths_seen[1]:
            (layer,) = self.writes
            warnings.warn(
                f"dspa: residuals of steered tokens after layer {layer} were NaN or infinite, or became so by their "
                "edit. Where they were so before, they are left as they are.",
                stacklevel=2,
            )
        self.paths_seen.copy_(self.paths, non_blocking=True)

    def plan(self, _h: Tensor) -> None:
        """Plan the requests of these maps whose prompt ends in the step, by the latents that were kept."""
        if (cache := self.latents.cache) is None:
            return
        due = self.batch.placed.due[self.groups]
        bit_counts(
            self.latents.bits,
            cache.blocks,
            cache.block_size,
            self.batch.prompts.n_counted,
            due.view(-1),
            self.counts,
        )
        for rows, values in zip(due, self.values, strict=True):
            map_lookup(
                self.counts,
                values,
                k_prompt=self.config.k_prompt,
                k_diff=self.config.k_diff,
                mode="both",
                rows=rows,
                out=SteeringPlan(self.slots, self.signs),
            )
        self.slots.masked_fill_(self.drops, -1)

    def edit(self, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit the residuals of a step `hidden + residual`, [n_tokens, d_in], after the layer of the output SAE."""
        row, position = self.batch.tokens(len(hidden))
        steer_(
            hidden,
            self.sae_out.weights,
            self.weights,
            SteeringPlan(self.slots, self.signs),
            row,
            residual=residual,
            alpha=self.alpha,
            stream=self.stream,
            positions=position,
            start=self.first_edited,
            paths=self.paths,
        )


def map_methods(
    settings: ServingSettings, batch: Batch, load_sae: Callable[[Place], FrozenSAE]
) -> list[PromptLatents | MapSteering]:
    """Return what steers by the maps of an engine: latents of prompts by input SAE, then maps by pair of SAEs.

    Args:
        settings: settings of the engine.
        batch: the tokens of its steps, with a group for each map of `groups_of(settings)`.
        load_sae: loads an SAE onto the device of the residuals.

    Raises:
        MapError: a map that is another one now, or belongs to other SAEs.
        SAEError: a damaged SAE.
    """
    latents = {place: PromptLatents(load_sae(place), batch) for place in settings.latent_spaces}
    groups, steerings = groups_of(settings), list[MapSteering]()
    for (sae_in, sae_out), names in _by_pair(settings).items():
        maps = {name: _load_map(settings.maps[name].file) for name in names}
        first = groups.index(names[0])
        steerings.append(MapSteering(maps, settings.config, first, latents[sae_in], load_sae(sae_out)))
    return [*latents.values(), *steerings]


def groups_of(settings: ServingSettings) -> list[str]:
    """Return the map of each group of a batch: those of a pair of SAEs are next to each other."""
    return [name for names in _by_pair(settings).values() for name in names]


def _by_pair(settings: ServingSettings) -> dict[tuple[Place, Place], list[str]]:
    """Return the names of the maps of each pair of SAEs."""
    pairs: dict[tuple[Place, Place], list[str]] = {}
    for name, place in settings.maps.items():
        pairs.setdefault((place.sae_in, place.sae_out), []).append(name)
    return pairs


def _load_map(place: Place) -> ConditionalDifferenceMap:
    place.check_unchanged(MapError)
    return ConditionalDifferenceMap.load(place.path)
