"""The specification of `map_lookup`, in plain PyTorch."""

import torch
from torch import Tensor


def _extremes(score: Tensor, n: int, sign: int) -> Tensor:
    """Return slots [B, n] of the n largest positive `sign * score`, ties to the smaller slot, then -1."""
    value, slot = (sign * score).sort(dim=1, descending=True, stable=True)
    slots = torch.full((score.shape[0], n), -1, dtype=torch.int32, device=score.device)
    width = min(n, score.shape[1])
    slots[:, :width] = torch.where(value > 0, slot, -1)[:, :width].to(torch.int32)
    return slots


def map_lookup(
    counts: Tensor,
    values: Tensor,
    rows: Tensor | None,
    k_prompt: int,
    k_diff: int,
    lookup_mode: str,
    slots: Tensor,
    signs: Tensor,
) -> None:
    """Write the plan of the prompts in `rows`, by default of all, to their rows of slots and signs."""
    at = torch.arange(len(counts), device=counts.device) if rows is None else rows[rows >= 0].long()
    slots[at], signs[at] = plan_of(counts[at], values, k_prompt, k_diff, lookup_mode)


def plan_of(counts: Tensor, values: Tensor, k_prompt: int, k_diff: int, mode: str) -> tuple[Tensor, Tensor]:
    """Return the slots and signs of the k_diff extremes of s on each side.

    s = sum of values[i] over the latents i of the k_prompt largest counts that are not 0. The sum runs from the largest
    count to the smallest, in fp32, so that its rounding is defined, too.
    """
    n_prompts, d_sae = counts.shape
    # One integer orders by count and then by the smaller index, with no ties left.
    key = counts.long() * d_sae + torch.arange(d_sae - 1, -1, -1, device=counts.device)
    prompt_latents = key.topk(k_prompt, dim=1).indices
    present = counts.gather(1, prompt_latents) > 0
    score = values.new_zeros(n_prompts, values.shape[1])
    for latent, counted in zip(prompt_latents.unbind(1), present.unbind(1), strict=True):
        score = torch.where(counted[:, None], score + values[latent], score)
    sides = {"augment": (1,), "ablate": (-1,), "both": (1, -1)}[mode]
    slots = torch.cat([_extremes(score, k_diff, sign) for sign in sides], dim=1)
    signs = torch.tensor(sides, dtype=torch.int8, device=counts.device).repeat_interleave(k_diff)
    return slots, torch.where(slots < 0, 0, signs).to(torch.int8)
