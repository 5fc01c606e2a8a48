"""The gradients of the convolutions on a GPU against the specification."""

import pytest
import torch
import torch.nn.functional as F

from gigavim_kernels import naive

conv_adjoint = pytest.importorskip("gigavim_kernels.cuda.conv_adjoint")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True)], ids=str)
@pytest.mark.parametrize(
    ("length", "channels", "halo"),
    [
        (1, 3, (0, 0)),
        (31, 16, (3, 0)),
        (70, 70, (2, 3)),
        pytest.param(4097, 384, (3, 3), marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_gradients_of_convolutions_with_halos(device, length, channels, halo, reverse, dtype):
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    count, (before, after) = len(reverse), halo
    wide = draw(2, before + length + after, 2 * channels).to(dtype)
    weight, bias = draw(count, channels, 4), draw(count, channels)
    grad = draw(count, 2, length, channels).to(dtype)
    d_rows = torch.full_like(wide, 7.0).to(device)
    d_weight, d_bias = conv_adjoint.convolve_gradients(
        grad.to(device), wide.to(device)[..., :channels], weight.to(device), bias.to(device),
        reverse=reverse, before=before, after=after, out=d_rows[..., channels:],
    )  # fmt: skip
    rows, weight, bias = (t.double().requires_grad_() for t in (wide[..., :channels], weight, bias))
    padded = F.pad(rows, (0, 0, 3, 3))
    tokens = slice(3 + before, 3 + before + length)
    found = [
        naive.causal_conv(padded, w, b, reverse=r)[:, tokens]
        for w, b, r in zip(weight, bias, reverse)
    ]
    torch.stack(found).backward(grad.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    pairs = [(d_rows[..., channels:], rows), (d_weight, weight), (d_bias, bias)]
    for one, other in pairs:
        error = (one.cpu().double() - other.grad).norm() / other.grad.norm()
        assert error < tolerance
    assert (d_rows[..., :channels] == 7).all()
