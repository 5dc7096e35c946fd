import pytest
import torch

from dspa_kernels.testing import BACKENDS


@pytest.fixture(params=[pytest.param(b, marks=[pytest.mark.gpu] * (b != "reference")) for b in BACKENDS])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of `dspa_kernels.testing.BACKENDS`."""
    if request.param != "reference" and not torch.cuda.is_available():
        pytest.skip(f"{request.param} needs a CUDA device and torch.cuda.is_available() is False")
    return str(request.param)
