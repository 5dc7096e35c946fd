"""The losses of RAHF's two stages, as published and as its code computes them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

# Label of a token that does not count.
IGNORED = -100
# Added by RAHF's code before it takes a logarithm.
TINY = 1e-8


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `-log p(label)` at each place, 0 where the label is IGNORED, [B, T] fp32."""
    return cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")


def contrast(own: Tensor, opposite: Tensor, epsilon: float) -> Tensor:
    """Return `-(1 - eps) log(p+ / (p+ + p-)) - eps log(p- / (p+ + p-))` with `p+ = exp(-own)`, `p- = exp(-opposite)`.

    Args:
        own: mean loss per token of each response after its own instruction, [B].
        opposite: the same after the opposite one.
        epsilon: share of the opposite label.
    """
    return (1 - epsilon) * softplus(own - opposite) + epsilon * softplus(opposite - own)


def clean_loss(own: Tensor, opposite: Tensor, lengths: Tensor, epsilon: float) -> Tensor:
    """Return the mean loss per response token plus the contrast of means per response, a scalar.

    Args:
        own: losses of the response tokens after their own instruction, 0 elsewhere, [B, T].
        opposite: the same after the opposite one.
        lengths: number of tokens of each response, [B].
        epsilon: as for `contrast`.
    """
    own, opposite = own.sum(dim=1), opposite.sum(dim=1)
    return own.sum() / lengths.sum() + contrast(own / lengths, opposite / lengths, epsilon).mean()


def paper_loss(own: Tensor, opposite: Tensor) -> Tensor:
    """Return `-(P+ + log(e^P+ / (e^P+ + e^P-)))`, the mean over responses; P are sums over the tokens of a response.

    Args:
        own: as for `clean_loss`, which gives -P+.
        opposite: as for `clean_loss`, which gives -P-.
    """
    own, opposite = own.sum(dim=1), opposite.sum(dim=1)
    return (own + softplus(own - opposite)).mean()


def code_loss(logits: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Return the loss of RAHF's code, with its defects.

    The contrast compares logits with the labels of their own place, not of the next one. Labels are those after the own
    instruction for both. Means are over all T places, so they depend on padding.

    Args:
        logits: after the own instructions, then after the opposite ones, cut or padded to the same T, [2 B, T, V].
        labels: after the own instructions, [B, T].
        epsilon: as for `contrast`.
    """
    own = logits[: len(labels)]
    ce = cross_entropy(own[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)
    p_own, p_opposite = (-token_losses(logits, labels.repeat(2, 1)).mean(dim=1)).exp().chunk(2)
    share = p_own / (p_own + p_opposite)
    other = p_opposite / (p_own + p_opposite)
    return ce - ((1 - epsilon) * (share + TINY).log() + epsilon * (other + TINY).log()).mean()


def alignment_loss(h: Tensor, target: Tensor, kind: str, n_places: int) -> Tensor:
    """Return how far residuals are from their targets, a scalar fp32.

    "norm" is the mean Euclidean distance over layers and tokens, as in RAHF's code without padding. "squared" is the
    paper's squared distance, summed over layers, the mean over tokens. "rahf_code_compat" is RAHF's code: as "norm",
    with every place of a padded response in the mean.

    Args:
        h: residuals of R response tokens at L layers under the LoRA, [L, R, d_in].
        target: where they should be, the same shape.
        kind: "norm", "squared" or "rahf_code_compat".
        n_places: places of the batch's responses, padding included, for "rahf_code_compat".
    """
    moved = h.float() - target.float()
    if kind == "squared":
        return moved.square().sum(dim=-1).sum(dim=0).mean()
    distances: Tensor = torch.linalg.vector_norm(moved, dim=-1)
    return distances.mean() if kind == "norm" else distances.sum() / (len(h) * n_places)
