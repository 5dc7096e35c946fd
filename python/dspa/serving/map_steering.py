"""DSPA of the requests of an engine: the latents of their prompts, their plans, and their edits."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

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


class MapSteering:
    """The maps and SAEs of an engine, and one row for each of its R requests.

    After the layer of the input SAE comes `read_prompt`, after that of the output SAE `edit`. Neither reads a number on
    the host.

    Args:
        settings: settings of the engine, which has maps.
        batch: the tokens of its steps.
        load_sae: loads an SAE onto the device of the residuals.

    Attributes:
        reads: `read_prompt`, by the layer after which it is called.
        writes: `edit`, likewise.

    Raises:
        MapError: a map that is another one now, or belongs to other SAEs.
        SAEError: a damaged SAE.
    """

    def __init__(self, settings: ServingSettings, batch: Batch, load_sae: Callable[[Place], FrozenSAE]) -> None:
        device, n_requests = batch.device, batch.n_requests
        assert settings.sae_in is not None and settings.sae_out is not None
        self.config, self.names, self.batch = settings.config, list(settings.maps), batch
        self.sae_in, self.sae_out = load_sae(settings.sae_in), load_sae(settings.sae_out)
        self._load([_load_map(place).to(device) for place in settings.maps.values()])
        self.reads: dict[int, Callable[[Tensor], None]] = {required_layer(self.sae_in): self.read_prompt}
        self.writes: dict[int, Callable[[Tensor, Tensor | None], None]] = {required_layer(self.sae_out): self.edit}
        n_slots = 2 * self.config.k_diff
        self.first_edited = torch.full((n_requests,), NEVER, dtype=torch.int64, device=device)
        self.alpha = torch.zeros(n_requests, dtype=torch.float32, device=device)
        # The slots of the sign that its mode does not use.
        self.drops = torch.zeros(n_requests, n_slots, dtype=torch.bool, device=device)
        self.cache: CacheSlots | None = None
        self.counts = torch.zeros(n_requests, self.sae_in.d_sae, dtype=torch.int32, device=device)
        self.slots = torch.full((n_requests, n_slots), -1, dtype=torch.int32, device=device)
        self.signs = torch.zeros(n_requests, n_slots, dtype=torch.int8, device=device)
        # Counters of `steer`, and where they are copied to without a wait.
        self.paths = torch.zeros(6, dtype=torch.int64, device=device)
        self.paths_seen = torch.zeros(6, dtype=torch.int64, pin_memory=device.type == "cuda")

    def _load(self, maps: list[ConditionalDifferenceMap]) -> None:
        """Keep the columns that any of the maps has [C], and the values [d_sae_in, C] of each map at them."""
        for cdmap in maps:
            cdmap.check_saes(self.sae_in, self.sae_out)
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
        """Give a row to a request, None for one that is not steered, which will be computed from its first token on."""
        self._warn_of_residuals()
        self.first_edited[row] = NEVER
        if request is None or request.dspa_map is None:
            self.batch.begin(row)
            return
        k_diff = self.config.k_diff
        self.batch.begin(row, request.n_counted, self.names.index(request.dspa_map))
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

    def keep_beside(self, cache: CacheSlots) -> None:
        """Keep the active latents of prompt tokens, a bit each, in the slots of their keys and values."""
        self.cache = cache
        self.bits = torch.zeros(cache.n_slots, n_words(self.sae_in.d_sae), dtype=torch.int32, device=self.batch.device)
        size = self.bits.nbytes / 2**20
        logger.info("Active latents of prompts, beside the key/value cache: %.1f MiB, a bit each.", size)

    def read_prompt(self, h: Tensor) -> None:
        """Keep the active latents of a step's prompt tokens, and plan the requests whose prompt ends in it.

        A prompt's other tokens can be of an earlier step, of the prefix cache, or of another request in this step.

        Args:
            h: residuals [n_tokens, d_in] after the layer of the input SAE.
        """
        if self.cache is None:
            # vLLM measures the memory of a step before there is a cache.
            return
        placed = self.batch.placed
        activation_bits(h, self.sae_in.weights, placed.slot[: len(h)], self.bits)
        bit_counts(
            self.bits,
            self.cache.blocks,
            self.cache.block_size,
            self.batch.prompts.n_counted,
            placed.due.view(-1),
            self.counts,
        )
        for due, values in zip(placed.due, self.values, strict=True):
            map_lookup(
                self.counts,
                values,
                k_prompt=self.config.k_prompt,
                k_diff=self.config.k_diff,
                mode="both",
                rows=due,
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


def _load_map(place: Place) -> ConditionalDifferenceMap:
    place.check_unchanged(MapError)
    return ConditionalDifferenceMap.load(place.path)
