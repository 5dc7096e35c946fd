"""Gates of the requests of an engine: which tokens of their answers are steered."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dspa.errors import ModelError
from dspa.serving.batch import Batch
from dspa.serving.requests import SteeringRequest
from dspa.steering.decisions import EntropyGate, Gate, prompt_key, top_entropy


class RequestGates:
    """The gates of R requests, and the entropies that those gates read which depend on logits.

    Before a step, `close` takes the tokens out of the batch that gates leave alone, so that all methods do. After it,
    `observe` reads the logits. Both work on the device alone, and launch nothing where no request has a gate.

    Args:
        batch: the tokens of the engine's steps.
        n_positions: positions of a sequence at most.
    """

    def __init__(self, batch: Batch, n_positions: int) -> None:
        self.batch, self.n_positions = batch, n_positions
        # Gates by the row of their request, and their numbers.
        self.gates: dict[int, Gate] = {}
        self.numbers: dict[Gate, int] = {}
        self._next = itertools.count()
        self.number, self.key, self.last_prompt = torch.full((3, batch.n_requests), -1, device=batch.device)
        # By the number of the token of an answer, as in `Gate.opened`. Made for the first gate that reads logits.
        self.entropy: Tensor | None = None
        # Entropies of requests that have no row now, by the id of the request.
        self.kept: dict[str, Tensor] = {}
        # Of the sequences of a step, their rows and the number of the token after the step.
        self._due: tuple[Tensor, Tensor] | None = None

    def begin(self, row: int, request: SteeringRequest | None, request_id: str, prompt: Sequence[int]) -> None:
        """Give a row to a request, None for one that is not steered.

        Args:
            row: the row.
            request: what the request asks for.
            request_id: its id, by which `keep` kept its entropies where it had a row before.
            prompt: token ids of its prompt.
        """
        self._drop(row)
        if request is None or request.gate is None:
            return
        assert request.dspa_start is not None
        gate = self.gates[row] = request.gate
        self.number[row] = self.numbers.setdefault(gate, next(self._next))
        ids = torch.tensor([prompt[: request.dspa_start]])
        self.key[row] = prompt_key(ids, torch.ones_like(ids, dtype=torch.bool))[0]
        self.last_prompt[row] = request.dspa_start - 1
        if gate.reads_logits and self.entropy is None:
            # The last token of a sequence has logits, too.
            shape = self.batch.n_requests, self.n_positions + 1
            self.entropy = torch.zeros(shape, dtype=torch.float32, device=self.batch.device)
        if (kept := self.kept.pop(request_id, None)) is not None:
            assert self.entropy is not None
            self.entropy[row] = kept

    def keep(self, row: int, request_id: str) -> None:
        """Take the row of a request, and keep its entropies, for it may go on after a preemption."""
        gate = self.gates.get(row)
        if gate is not None and gate.reads_logits:
            assert self.entropy is not None
            self.kept[request_id] = self.entropy[row].clone()
        self._drop(row)

    def _drop(self, row: int) -> None:
        if row in self.gates:
            self.number[row] = -1
            del self.gates[row]
            self.numbers = {gate: number for gate, number in self.numbers.items() if gate in self.gates.values()}

    def forget(self, request_id: str) -> None:
        """Drop the entropies of a request that has ended."""
        self.kept.pop(request_id, None)

    def close(self, rows: Tensor, starts: Tensor, positions: Tensor) -> None:
        """Take the tokens out of a step that gates leave alone, after `Batch.place` of the same arguments."""
        self._due = None
        if not self.gates:
            return
        row, position = self.batch.tokens(len(self.batch.placed.row))
        of_row = row.clamp(min=0).long()
        index = position - self.last_prompt[of_row]
        opened = torch.ones_like(row, dtype=torch.bool)
        for gate, number in self.numbers.items():
            entropy = None
            if gate.reads_logits:
                assert self.entropy is not None
                entropy = self.entropy[of_row, index.clamp(0, self.n_positions)][:, None]
            own = self.number[of_row] == number
            opened &= ~own | gate.opened(index[:, None], self.key[of_row], entropy)[:, 0]
        row.masked_fill_(~opened, -1)
        if self.entropy is not None:
            index = positions[starts[1:].long() - 1] - self.last_prompt[rows] + 1
            self._due = rows, index.clamp(0, self.n_positions)

    def observe(self, logits: Tensor) -> None:
        """Read the logits [B, V] of the last token of each sequence of a step; other calls do nothing.

        Raises:
            ModelError: logits of other tokens.
        """
        if self._due is None:
            return
        (rows, index), self._due = self._due, None
        assert self.entropy is not None
        if len(logits) != len(rows):
            raise ModelError(
                f"dspa: a step of {len(rows)} requests has {len(logits)} rows of logits, not one for each."
            )
        for gate, number in self.numbers.items():
            if isinstance(gate, EntropyGate):
                own, before = self.number[rows] == number, self.entropy[rows, index]
                self.entropy[rows, index] = torch.where(own, top_entropy(logits, gate.k), before)
