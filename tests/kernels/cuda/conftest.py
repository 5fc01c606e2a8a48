"""Run the kernels on a GPU where there is one, else in Triton's interpreter on the CPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any import

pytest.importorskip("triton", reason="Triton is not installed here")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if request.node.get_closest_marker("gpu"):
        pytest.skip("needs a CUDA device")
    return torch.device("cpu")
