"""The training kernels against the specification in float64, gradients too."""

from dataclasses import replace

import pytest
import torch

from gigavim.model.registry import REGISTRY
from gigavim.model.vim import Vim
from gigavim.model.weights import tie_rates
from gigavim.training.encode import encode
from gigavim_kernels import naive
from gigavim_kernels.cpu.training import scan as cpu_scan


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("length", "channels", "reverse"),
    [(2, 16, False), (16, 16, True), (37, 32, False), (50, 48, True)],
    ids=str,
)
def test_scan_and_its_gradients(length, channels, reverse):
    generator = torch.Generator().manual_seed(length)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    gated, projected = draw(2, length, 2 * channels), draw(2, length, 38)
    inputs = {
        "x": gated[..., :channels],
        "dt": draw(2, length, channels),
        "rate": -torch.rand(channels, generator=generator) - 0.05,
        "B": projected[..., 6:22],
        "C": projected[..., 22:],
        "D": draw(channels),
        "z": gated[..., channels:],
        "dt_bias": draw(channels),
    }
    fast = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    y = cpu_scan.selective_scan(**fast, reverse=reverse)
    others = {k: v for k, v in exact.items() if k != "rate"}
    rates = exact["rate"][:, None] * torch.arange(1, 17)
    expected = naive.selective_scan(**others, A=rates, reverse=reverse).y
    grad = draw(2, length, channels)
    y.backward(grad)
    expected.backward(grad.double())
    assert relative_error(y, expected) < 1e-6
    for name in inputs:
        assert relative_error(fast[name].grad, exact[name].grad) < 3e-6, name


@pytest.mark.parametrize(("length", "reverse"), [(1, False), (3, True), (29, False), (29, True)])
def test_convolution_and_its_gradients(length, reverse):
    generator = torch.Generator().manual_seed(length)
    inputs = [torch.randn(*s, generator=generator) for s in ((2, length, 32), (32, 4), (32,))]
    fast = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    y, expected = (
        cpu_scan.causal_conv(*fast, reverse=reverse),
        naive.causal_conv(*exact, reverse=reverse),
    )
    grad = torch.randn(y.shape, generator=generator)
    y.backward(grad)
    expected.backward(grad.double())
    assert relative_error(y, expected) < 1e-6
    for one, other in zip(fast, exact, strict=True):
        assert relative_error(one.grad, other.grad) < 3e-6


@pytest.mark.parametrize("bidirectional", ["v2", "v1", "none", "layer_pairs"])
def test_fast_encoder_is_the_model(bidirectional):
    torch.manual_seed(0)
    config = replace(
        REGISTRY["vim-nano"], depth=4, bidirectional=bidirectional, divide_out=bidirectional == "v2"
    )
    encoder = Vim(config)
    images = torch.randn(2, 3, 16, 72)
    with torch.no_grad():
        tokens = encoder.tokens(images)
        assert relative_error(encode(encoder, tokens), encoder.encode(tokens)) < 1e-5


def test_tying_rates_changes_nothing_at_initialisation():
    encoder = Vim(REGISTRY["vim-nano"])
    before = encoder.state_dict()["layers.3.mixer.A_b_log"].clone()
    tie_rates(encoder)
    after = encoder.state_dict()["layers.3.mixer.A_b_log"]
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
