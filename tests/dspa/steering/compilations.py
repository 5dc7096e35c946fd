"""Specialisations of Triton kernels that steered calls of `generate()` need, in the order of the calls.

`python -m tests.dspa.steering.compilations` prints, per call, those that no earlier call needed. TRITON_INTERPRET must
not be set. The kernels are not launched: a stand-in for the driver names the GPU, and the reference computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from dspa import Steering, SteeringConfig
from dspa.testing import D_SAE_IN, D_SAE_OUT, L_IN, L_OUT, make_map, make_model, make_sae
from dspa_kernels import backends
from tests.kernels.aot import specialising

implementation = backends.implementation
# Prompts [B, T], and numbers of new tokens. Each call has 17 to 32 rows in its prompts, which one launch serves.
CALLS = (((2, 9), 4), ((2, 9), 40), ((2, 14), 24), ((1, 31), 30))


def recorded(op: str, backend: str) -> Callable[..., Any]:
    """The reference, after Triton's implementation has recorded which kernels it would launch."""

    def run(**arguments: Any) -> Any:
        implementation(op, "triton")(**arguments)
        return implementation(op, backend)(**arguments)

    return run


def main() -> None:
    """Print the kernels that are new in each call."""
    saes = [make_sae(layer, d_sae, seed=layer) for layer, d_sae in ((L_IN, D_SAE_IN), (L_OUT, D_SAE_OUT))]
    sae_in, sae_out = (sae.to(dtype=torch.bfloat16) for sae in saes)
    steering = Steering(sae_in, sae_out, make_map(sae_in, sae_out), SteeringConfig(k_diff=8))
    model = make_model("gemma2", dtype=torch.bfloat16)
    known: set[tuple[str, str]] = set()
    new = []
    with (
        mock.patch.object(backends, "implementation", recorded),
        specialising(90) as specialisations,
        steering.attach(model),
    ):
        for (n, length), n_new in CALLS:
            prompts = torch.randint(3, 60, (n, length), generator=torch.Generator().manual_seed(length))
            mask = torch.ones_like(prompts)
            model.generate(prompts, attention_mask=mask, max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False)
            new.append(sorted(name for name, _ in specialisations - known))
            known |= specialisations
    print(json.dumps(new))


if __name__ == "__main__":
    main()
