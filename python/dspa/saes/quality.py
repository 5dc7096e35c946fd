"""The quality of an SAE: how well it reconstructs residuals."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dspa.errors import TrainingError, refusal
from dspa.saes.config import MAX_NORM_RATIO
from dspa.saes.frozen import FrozenSAE
from dspa.saes.outliers import typical_rows
from dspa.training_folder import TrainingFolder

# Latents that are held at once while an SAE is evaluated.
LATENTS_PER_BLOCK = 1 << 24


@dataclass(frozen=True)
class Quality:
    """Quality of an SAE on N rows x [N, d_in] with its reconstructions x'.

    For a centred SAE, x are the residuals less their mean over d_in, in which it has no part.

    Attributes:
        explained_variance: `1 - sum (x - x')^2 / sum (x - mean x)^2`.
        l0: mean number of active latents per row.
        dead: number of latents that are active on none of these rows.
        mse: `(x - x')^2`, summed over d_in, mean over rows, as SAELens' loss.
        n_tokens: number of rows.
        n_left_out: number of rows of outlying norm that are not among these.
    """

    explained_variance: float
    l0: float
    dead: int
    mse: float
    n_tokens: int
    n_left_out: int = 0


def read_figures(folder: Path) -> dict[str, float]:
    """Return the figures that a finished training recorded in its folder; none where no training did.

    They are the fields of `Quality` after the training, and `n_left_out_training`, if it is recorded.
    """
    try:
        record = TrainingFolder(folder).read()
        figures = asdict(Quality(**record["after"]))
    # A file of this name may be another program's.
    except (FileNotFoundError, KeyError, TypeError, TrainingError):
        return {}
    return figures | ({"n_left_out_training": record["n_left_out"]} if "n_left_out" in record else {})


@torch.no_grad()
def evaluate_sae(sae: FrozenSAE, rows: Tensor, *, max_norm_ratio: float = MAX_NORM_RATIO) -> Quality:
    """Return the quality of `sae` on residuals.

    Args:
        sae: the SAE.
        rows: residuals [N, d_in], of any float dtype, on the SAE's device.
        max_norm_ratio: leave out rows with more than this many times the median norm; 0 keeps all.

    Raises:
        ValueError: rows without variance.
    """
    n_given, rows = len(rows), rows[typical_rows(rows, max_norm_ratio)]
    active = torch.zeros(sae.d_sae, dtype=torch.long, device=sae.device)
    if sae.centered:
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        rows = rows - rows.mean(dim=1, keepdim=True)
    mean = rows.double().mean(dim=0)
    error = variance = 0.0
    for block in rows.split(max(1, LATENTS_PER_BLOCK // sae.d_sae)):
        f = sae.encode(block)
        error += float((sae.decode(f, like=block).double() - block.double()).square().sum())
        variance += float((block.double() - mean).square().sum())
        active += (f > 0).sum(dim=0)
    if not variance:
        advice = "Take more text, such as a larger `held_out_tokens`."
        raise refusal(
            ValueError, "The sample to report on", f"{len(rows)} tokens without variance", "tokens that differ", advice
        )
    return Quality(
        explained_variance=1 - error / variance,
        l0=int(active.sum()) / len(rows),
        dead=int((active == 0).sum()),
        mse=error / len(rows),
        n_tokens=len(rows),
        n_left_out=n_given - len(rows),
    )
