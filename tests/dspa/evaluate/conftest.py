"""The method that acts most strongly on the tests' model."""

from __future__ import annotations

import pytest

from dspa.config import SteeringConfig
from dspa.evaluate.compare.methods import Method
from dspa.testing import D_SAE_IN, D_SAE_OUT, L_IN, L_OUT, make_map, make_sae


@pytest.fixture(scope="module")
def dspa_method() -> Method:
    sae_in, sae_out = make_sae(L_IN, D_SAE_IN, seed=1), make_sae(L_OUT, D_SAE_OUT, seed=2)
    return Method.dspa(sae_in, sae_out, make_map(sae_in, sae_out), SteeringConfig(alpha=1.0, mode="both"))
