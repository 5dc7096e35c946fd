"""Gates by decision points: which tokens of an answer are steered, as in Sparse Junction Steering.

Token i of an answer is predicted from the residual of the token before it: i = 0 from that of the last prompt token. A
gate says for every i whether that residual is changed. Tokens of the prompt before its last are not gated.

All here are operations on tensors, on the device and without waiting for it, which a server can call with a state of
its own. Integers of 32 bits are kept in int64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, ClassVar, TypeAlias

import torch
from pydantic import Field, StrictInt
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Self

from dspa.errors import ModelError, refusal
from dspa.schemas import Accepts, Flag, Fraction, NonNegative, PositiveInt, Seed, schema

TopK: TypeAlias = Annotated[StrictInt, Field(ge=2), Accepts("a whole number >= 2 (published: 10)")]
BITS_32 = 0xFFFFFFFF


def top_entropy(logits: Tensor, k: int) -> Tensor:
    """Return the entropy of the k largest logits, renormalised, `-sum p ln p` with `p = softmax(top-k)`, in nats.

    Args:
        logits: [..., V]. Logits that differ by a constant per row, as log-probabilities do, have the same entropy.
        k: number of logits; all where V is smaller.
    """
    top = logits.float().topk(min(k, logits.shape[-1])).values
    entropy: Tensor = torch.special.entr(top.softmax(dim=-1)).sum(dim=-1)
    return entropy


def mixed(state: Tensor | int, number: Tensor | int) -> Tensor:
    """Return a hash of 32 bits, [...] int64, of a hash and the next number, by the rounds of lowbias32."""
    x = torch.as_tensor((state ^ (number & BITS_32)) + 0x9E3779B9) & BITS_32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        # The product is more than 63 bits, of which the lowest 32 are right.
        x = ((x ^ (x >> shift)) * factor) & BITS_32
    return x ^ (x >> 16)


def prompt_key(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return a hash of each prompt [B] int64, the same with and without padding.

    Args:
        tokens: token ids [B, T].
        mask: [B, T] bool, True at prompt tokens.
    """
    return mixed(mixed(0, tokens.long()), mask.long().cumsum(dim=1)).where(mask, 0).sum(dim=1) & BITS_32


class Gate(ABC):
    """A rule for which tokens of an answer are steered.

    Attributes:
        complement: steer the tokens that the rule leaves out, and no others.
        reads_logits: True if it depends on logits of earlier tokens, so that tokens have to be steered one at a time.
    """

    reads_logits: ClassVar[bool] = False
    complement: bool

    def opened(self, index: Tensor, key: Tensor, entropy: Tensor | None = None) -> Tensor:
        """Return True for residuals that are steered, [B, T] bool.

        Args:
            index: number in the answer of the token that each residual predicts [B, T], below 0 in the prompt.
            key: `prompt_key` of each row [B].
            entropy: `top_entropy` of the logits that the residual's own token was chosen from [B, 1], for a gate that
                `reads_logits`. None where T is the prompt.
        """
        chosen = self._chosen(index, key, entropy)
        return (~chosen if self.complement else chosen) | (index < 0)

    @abstractmethod
    def _chosen(self, index: Tensor, key: Tensor, entropy: Tensor | None) -> Tensor:
        """Return True for the residuals that the rule chooses."""

    def settings(self) -> dict[str, Any]:
        """Return the kind of the gate with its settings, as JSON."""
        return {"gate": {"kind": type(self).__name__, **asdict(self)}}  # type: ignore[call-overload]

    def complemented(self) -> Self:
        """Return the gate that opens where this one is closed."""
        return replace(self, complement=not self.complement)  # type: ignore[type-var]

    @property
    def label(self) -> str:
        """Short name for tables."""
        return f"{self._words} complement" if self.complement else self._words

    @property
    @abstractmethod
    def _words(self) -> str:
        """Short name of the rule."""


@schema
class EntropyGate(Gate):
    """Steer a token where the model was undecided one token before, `H >= threshold`.

    H is the `top_entropy` of the logits, as steered, from which the token whose residual is changed was chosen: the
    newest that are known before it is read. The residual of the last prompt token, which predicts the first token of
    the answer, has none, and is chosen.

    Attributes:
        threshold: in nats, at most ln k. Published: 1.
        k: number of logits.
        complement: steer only where the model was decided.

    Raises:
        ValueError: an invalid setting.
    """

    reads_logits: ClassVar[bool] = True
    threshold: NonNegative = 1.0
    k: TopK = 10
    complement: Flag = False

    def __post_init__(self) -> None:
        # Rounding takes an entropy of equal logits above its limit.
        if self.threshold > (1 + 1e-6) * math.log(self.k):
            raise refusal(ValueError, "`threshold`", self.threshold, f"0 to ln {self.k}, {math.log(self.k):.4g} nats")

    @property
    def _words(self) -> str:
        return f"entropy >= {self.threshold:.3g}"

    def _chosen(self, index: Tensor, key: Tensor, entropy: Tensor | None) -> Tensor:
        return index <= 0 if entropy is None else (index <= 0) | (entropy >= self.threshold)


@schema
class RandomGate(Gate):
    """Steer a random share of tokens, drawn by a hash of the seed, the prompt's tokens and the token's number.

    A token has the same draw alone, in a batch and in every run. All answers to one prompt have the same draws. A
    prompt that is given as embeddings counts by its length alone.

    Attributes:
        share: probability of each token.
        seed: of the draws.
        complement: steer the other tokens.

    Raises:
        ValueError: an invalid setting.
    """

    share: Fraction
    seed: Seed = 0
    complement: Flag = False

    @property
    def _words(self) -> str:
        return f"random {self.share:.3g}"

    def _chosen(self, index: Tensor, key: Tensor, entropy: Tensor | None) -> Tensor:
        state = mixed(mixed(mixed(self.seed & BITS_32, self.seed >> 32), key), 0)
        return mixed(state[:, None], index) < round(self.share * (BITS_32 + 1))


@schema
class FirstTokens(Gate):
    """Steer the first tokens of each answer.

    Attributes:
        n: number of tokens.
        complement: steer all after them.

    Raises:
        ValueError: an invalid setting.
    """

    n: PositiveInt
    complement: Flag = False

    @property
    def _words(self) -> str:
        return f"first {self.n}"

    def _chosen(self, index: Tensor, key: Tensor, entropy: Tensor | None) -> Tensor:
        return index < self.n


GATES = ", ".join(f"a dspa.{kind.__name__}" for kind in (EntropyGate, RandomGate, FirstTokens))


@dataclass(eq=False)
class Decisions:
    """The decisions of a gate in one call of a model, and how many tokens they touched.

    Attributes:
        gate: the gate.
        key: `prompt_key` of each prompt [B].
        width: number of columns of the prompts.
        keyword: name of the keyword that tells the layers.
        opened: True for residuals that are steered [R, N], by the number of the token that they predict.
        read: number of them per row up to the end of its answer, [R] int64. With beams, and with tokens that an
            assistant proposed in vain, they are those that the model read.
    """

    gate: Gate
    key: Tensor
    width: int
    keyword: str
    opened: Tensor = field(init=False)
    read: Tensor = field(init=False)
    _n_prompts: int = field(init=False)
    _n_new: int = 0
    _ends: Tensor = field(init=False)
    _ended: Tensor | None = None
    _ids: Tensor | None = None
    _entropy: Tensor | None = None

    def __post_init__(self) -> None:
        self._n_prompts = len(self.key)
        self.opened = torch.empty(self._n_prompts, 0, dtype=torch.bool, device=self.key.device)
        self.read = torch.zeros_like(self.key)

    @property
    def touched(self) -> Tensor:
        """Number of tokens per row that were predicted from a steered residual, [R] int64."""
        index = torch.arange(self.opened.shape[1], device=self.read.device)
        return (self.opened & (index < self.read[:, None])).sum(dim=1)

    @property
    def share(self) -> float:
        """Share of the tokens of all answers that were predicted from a steered residual. Waits for the device."""
        return int(self.touched.sum()) / max(1, int(self.read.sum()))

    def teacher_forced(self, index: Tensor) -> Tensor:
        """Return which residuals of a pass over whole sequences are steered, [B, T] bool.

        Args:
            index: number in the response of the token after each [B, T], below 0 in the prompt, -1 at padding.
        """
        # The last token of a row is followed by none.
        self.read = index.amax(dim=1)
        numbers = torch.arange(index.shape[1], device=index.device).expand_as(index)
        self.opened = self.gate.opened(numbers, self.key)
        return self.gate.opened(index, self.key)

    # Generation

    def begin(self, ends: Sequence[int], n_new: int) -> None:
        """Note the tokens that end an answer, and the largest number of its tokens."""
        self._ends, self._n_new = torch.tensor(list(ends), dtype=torch.int64, device=self.key.device), n_new

    def observe(self, ids: Tensor, logits: Tensor) -> None:
        """Keep the entropies of the logits from which the next token is chosen.

        Args:
            ids: all tokens so far [R, T].
            logits: [R, V], before anything changes them.
        """
        assert isinstance(self.gate, EntropyGate)
        self._ids, self._entropy = ids, top_entropy(logits, self.gate.k).to(ids.device)

    def step(self, ids: Tensor, n_columns: int, n_total: int) -> Tensor:
        """Return which residuals of the next pass are steered, [R, n_columns] bool.

        Args:
            ids: all tokens so far, with those of the pass [R, T]; while a prompt is read in chunks, those of the chunk.
            n_columns: number of tokens of the pass, the last of all.
            n_total: number of columns with those of the pass.

        Raises:
            ModelError: several new tokens of an answer in one pass, for a gate that reads the logits before each.
        """
        n_known, last = self.opened.shape[1], n_total - self.width
        if self.gate.reads_logits and last >= 0 and last != n_known:
            got = f"over tokens {n_known} to {last} of an answer"
            accepted = "passes over one token at a time, since its gate depends on the logits before it"
            advice = "Generate without an assistant, or use a RandomGate or FirstTokens."
            raise refusal(ModelError, f"A pass with an {type(self.gate).__name__}", got, accepted, advice)
        if self._ended is None:
            self._repeat_rows(ids)
        self._keep_order(ids)
        if last >= n_known:
            entropy = None if self._entropy is None else self._entropy[:, None]
            index = torch.arange(n_known, last + 1, device=ids.device).expand(len(ids), -1)
            self.opened = torch.cat([self.opened, self.gate.opened(index, self.key, entropy)], dim=1)
            self._count(ids, n_known, last)
        opened = self.opened[:, max(0, last + 1 - n_columns) : max(0, last + 1)]
        # Before the answer, in the first pass and in those without a cache, there is the prompt.
        return pad(opened, (n_columns - opened.shape[1], 0), value=True)

    def _repeat_rows(self, ids: Tensor) -> None:
        """Repeat the rows of prompts, as `generate()` does for beams and return sequences."""
        times = len(ids) // self._n_prompts
        self.key, self.read = (one.to(ids.device).repeat_interleave(times) for one in (self.key, self.read))
        self.opened = self.opened.to(ids.device).repeat_interleave(times, dim=0)
        self._ends = self._ends.to(ids.device)
        self._ended = torch.zeros_like(self.key, dtype=torch.bool)

    def _keep_order(self, ids: Tensor) -> None:
        """Bring what is known into the order of `ids`: beams of a prompt change places and take that of others."""
        n = len(ids) // self._n_prompts
        if self._entropy is None or self._ids is None or n == 1:
            return
        before, now = (one.view(self._n_prompts, n, -1) for one in (self._ids, ids[:, : self._ids.shape[1]]))
        same = (now[:, :, None] == before[:, None]).all(dim=-1)
        # A row that stayed is taken before others that are equal so far.
        order = (2 * same + torch.eye(n, device=ids.device, dtype=torch.int64)).argmax(dim=-1)
        rows = (order + n * torch.arange(self._n_prompts, device=ids.device)[:, None]).flatten()
        self._entropy, self.opened, self.read = self._entropy[rows], self.opened[rows], self.read[rows]

    def _count(self, ids: Tensor, first: int, last: int) -> None:
        """Count the residuals that predict tokens `first` to `last` of answers that have not ended."""
        assert self._ended is not None
        if last > 0:
            self._ended = self._ended | (ids[:, -1:] == self._ends).any(dim=1)
        self.read = self.read + max(0, min(last + 1, self._n_new) - first) * ~self._ended
