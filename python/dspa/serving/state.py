"""The steered requests, on the device: tensors at fixed addresses, so that a CUDA graph can read them."""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dspa.serving.requests import SteeringRequest
from dspa.serving.settings import ServingSettings, Steerers
from dspa_kernels import SteeringPlan, activation_counts, map_lookup, steer

# States by name, as the ops of a graph find theirs. A state belongs to its engine.
STATES: WeakValueDictionary[str, ServingState] = WeakValueDictionary()


class ServingState:
    """One row for each request that can run at once, and one number for each token of a step.

    A step writes `place`, then the layer of the input SAE calls `count` and that of the output SAE `edit`. Neither
    reads a number on the host, and both leave tokens alone whose row is -1: those of unsteered requests, and padding.

    Args:
        settings: settings of the engine.
        n_requests: requests that can run at once, R.
        n_tokens: tokens of a step at most.
        device: device of the residuals.
    """

    def __init__(self, settings: ServingSettings, n_requests: int, n_tokens: int, device: torch.device) -> None:
        self.settings, self.steerers = settings, Steerers.load(settings, device)
        n_slots, d_sae_in = 2 * settings.config.k_diff, self.steerers.sae_in.d_sae
        # By request.
        self.steered = torch.zeros(n_requests, dtype=torch.bool, device=device)
        self.n_counted = torch.zeros(n_requests, dtype=torch.int64, device=device)
        self.first_edited = torch.zeros(n_requests, dtype=torch.int64, device=device)
        self.alpha = torch.zeros(n_requests, dtype=torch.float32, device=device)
        self.map = torch.zeros(n_requests, dtype=torch.int32, device=device)
        # The signs that its mode keeps.
        self.keeps = torch.zeros(n_requests, n_slots, dtype=torch.bool, device=device)
        self.counts = torch.zeros(n_requests, d_sae_in, dtype=torch.int32, device=device)
        self.slots = torch.full((n_requests, n_slots), -1, dtype=torch.int32, device=device)
        self.signs = torch.zeros(n_requests, n_slots, dtype=torch.int8, device=device)
        # By token.
        self.row = torch.full((n_tokens,), -1, dtype=torch.int32, device=device)
        self.position = torch.zeros(n_tokens, dtype=torch.int64, device=device)

    def begin(self, row: int, request: SteeringRequest | None, n_prompt: int) -> None:
        """Give a row to a request, new or resumed, which will be computed from its first token on."""
        self.steered[row] = request is not None
        if request is None:
            return
        k_diff = self.settings.config.k_diff
        self.n_counted[row] = request.n_counted(n_prompt)
        self.first_edited[row] = request.first_edited(n_prompt)
        self.alpha[row] = request.dspa_alpha
        self.map[row] = self.settings.names.index(request.dspa_map)
        self.keeps[row, :k_diff] = request.dspa_mode != "ablate"
        self.keeps[row, k_diff:] = request.dspa_mode != "augment"
        self.counts[row] = 0
        self.slots[row], self.signs[row] = -1, 0

    def place(self, rows: Tensor, starts: Tensor, positions: Tensor) -> None:
        """Say which request each token of a step belongs to.

        Args:
            rows: [B] row of each sequence of the batch.
            starts: [B + 1] its first token in the step; the last is the number of tokens.
            positions: [n_tokens] position of each token in its sequence.
        """
        n_tokens = len(positions)
        self.row.fill_(-1)
        if not n_tokens:
            return
        token = torch.arange(n_tokens, device=self.row.device)
        sequence = torch.searchsorted(starts[1:].long().contiguous(), token, right=True).clamp(max=len(rows) - 1)
        row = rows[sequence].long()
        self.row[:n_tokens] = torch.where(self.steered[row], row, -1).int()
        self.position[:n_tokens] = positions

    def place_nothing(self) -> None:
        """Leave all tokens of a step alone."""
        self.row.fill_(-1)

    def count(self, h: Tensor) -> None:
        """Count the latents of a step's prompt tokens, and plan the requests whose prompt ends in it.

        Args:
            h: residuals [n_tokens, d_in] after the layer of the input SAE.
        """
        row, position = self.row[: len(h)], self.position[: len(h)]
        request = row.clamp(min=0).long()
        counted = (row >= 0) & (position < self.n_counted[request])
        activation_counts(
            h,
            self.steerers.sae_in.weights,
            torch.where(counted, row, -1),
            len(self.counts),
            out=self.counts,
            accumulate=True,
        )
        ends = (row >= 0) & (position == self.n_counted[request] - 1)
        # Row R takes the tokens that end no prompt.
        due = self.steered.new_zeros(len(self.counts) + 1)
        due = due.index_fill_(0, torch.where(ends, request, len(self.counts)), True)[:-1]
        self._plan(due)

    def _plan(self, due: Tensor) -> None:
        """Choose the latents of some requests, each by its map and for its mode.

        Args:
            due: [R] bool.
        """
        rows = torch.arange(len(due), dtype=torch.int32, device=due.device)
        config, plan = self.settings.config, SteeringPlan(self.slots, self.signs)
        for number, values in enumerate(self.steerers.values):
            map_lookup(
                self.counts,
                values,
                k_prompt=config.k_prompt,
                k_diff=config.k_diff,
                mode="both",
                rows=torch.where(due & (self.map == number), rows, -1),
                out=plan,
            )
        self.slots.masked_fill_(~self.keeps, -1)
        self.signs.masked_fill_(~self.keeps, 0)

    def edit(self, h: Tensor) -> Tensor:
        """Return the residuals of a step [n_tokens, d_in] after the layer of the output SAE, with their edits."""
        n_tokens = len(h)
        return steer(
            h,
            self.steerers.sae_out.weights,
            self.steerers.weights,
            SteeringPlan(self.slots, self.signs),
            self.row[:n_tokens],
            alpha=self.alpha,
            stream=self.steerers.stream,
            positions=self.position[:n_tokens],
            start=self.first_edited,
        )
