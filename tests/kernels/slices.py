"""Calls with sliced arguments, and the specialisations of Triton kernels that they add to those of whole arguments.

`python -m tests.kernels.slices` prints, per op, the kernels of both in JSON. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dspa_kernels import formulas
from dspa_kernels.backends import implementation
from dspa_kernels.testing import random_sae
from tests.kernels.aot import adapting, plain_steering, specialising

# The capacity and height are odd, so that slices of rows are not aligned to 16 bytes.
N_ROWS, CAPACITY, HEIGHT = 16, 37, 3
D_SAE = 512


def sliced(tensor: Tensor) -> Tensor:
    """Return equal numbers at an address that is not a multiple of 16."""
    longer = torch.cat([tensor[:1], tensor])[1:]
    assert tensor.data_ptr() % 16 == 0 and longer.data_ptr() % 16 != 0
    return longer


def calls() -> Iterator[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """Yield ops, their arguments, and the names of those that callers slice."""
    h = torch.zeros(N_ROWS, 256, dtype=torch.bfloat16)
    for kind in ("jumprelu", "topk"):
        rows = {"h": h, **random_sae(kind, 256, D_SAE, dtype=torch.bfloat16).encoder()}
        sequences, counts = torch.zeros(N_ROWS, dtype=torch.int32), torch.zeros(1, D_SAE, dtype=torch.int32)
        yield "activation_counts", {**rows, "sequences": sequences, "counts": counts}, ("sequences",)
        yield "activation_sums", {**rows, "sequences": sequences, "sums": counts.float()}, ("sequences",)
        yield "sparse_encode", {**rows, "capacity": CAPACITY}, ()
        steering = plain_steering(kind, (torch.bfloat16, torch.bfloat16), N_ROWS, "none", "none", record=False)
        steering |= {"rows": torch.zeros(N_ROWS, dtype=torch.int32), "alphas": torch.zeros(N_ROWS)}
        sliced_in_steer = ("rows", "positions", "start", "paths", "alphas")
        yield "steer", steering, sliced_in_steer
        del steering["record"]
        yield "steer_", {**steering, "residual": h.clone()}, sliced_in_steer
    latents = {"indices": torch.zeros(N_ROWS, CAPACITY, dtype=torch.int32), "values": torch.zeros(N_ROWS, CAPACITY)}
    yield "sparse_decode", {**latents, "W_dec": torch.zeros(D_SAE, 256), "b_dec": None}, tuple(latents)
    adapter = adapting("jumprelu", "jumprelu", (torch.bfloat16, torch.bfloat16), N_ROWS, x=False)
    names = ("h", "encoder_rows", "W_dec", "W_a", "b_a", "threshold", "activation", "bandwidth")
    gradients = {
        "grad": h,
        "grad_l1": torch.zeros(N_ROWS),
        "codes": torch.zeros(N_ROWS, D_SAE, dtype=torch.uint8),
        **{name: adapter[name] for name in names},
        "adds": True,
        "needs_h": True,
        "needs_x": False,
    }
    yield "fsrl_residual_backward", gradients, ("grad_l1",)


def main() -> None:
    """Print the op, and the kernels of its call with whole and of all its calls, for each call."""
    results = []
    for op, arguments, names in calls():
        run = implementation(op, "triton")
        with specialising(90) as specialisations:
            run(**arguments)
            whole = sorted(specialisations)
            run(**arguments | {name: sliced(arguments[name]) for name in names})
            # In blocks of rows, the op itself slices.
            with mock.patch.object(formulas, "MAX_ELEMENTS", HEIGHT * D_SAE):
                run(**arguments)
            results.append([op, whole, sorted(specialisations)])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
