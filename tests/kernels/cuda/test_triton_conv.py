"""The convolution for training on a GPU against the specification, gradients too."""

import pytest
import torch

from gigavim_kernels import naive

conv_adjoint = pytest.importorskip("gigavim_kernels.cuda.conv_adjoint")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(("length", "channels"), [(1, 3), (31, 16), (70, 70)], ids=str)
def test_convolution_and_its_gradients(device, length, channels, reverse, dtype):
    generator = torch.Generator().manual_seed(length)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    wide = draw(2, length, 2 * channels).to(dtype)
    inputs = [wide, draw(channels, 4), draw(channels)]
    fast = [t.clone().to(device).requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    y = conv_adjoint.causal_conv(fast[0][..., :channels], *fast[1:], reverse=reverse)
    expected = naive.causal_conv(exact[0][..., :channels], *exact[1:], reverse=reverse)
    grad = draw(2, length, channels).to(dtype)
    y.backward(grad.to(device))
    expected.backward(grad.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in [(y, expected), *((f.grad, e.grad) for f, e in zip(fast, exact))]:
        error = (one.cpu().double() - other).norm() / other.norm()
        assert error < tolerance
