"""The numba scan and convolution against the specification in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gigavim_kernels import naive

cpu = pytest.importorskip("gigavim_kernels.cpu", exc_type=ImportError)

SENSES = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def double(tensors):
    return {k: v.double() for k, v in tensors.items()}


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(0, 2),
    length=st.integers(0, 150),
    channels=st.integers(1, 40),
    states=st.sampled_from([1, 5, 8, 16, 24, 32]),
    reverse=st.booleans(),
    scale=st.sampled_from([0.01, 1.0, 20.0, 80.0]),
)
def test_scan_at_any_size_and_step(
    random_scan, relative_error, batch, length, channels, states, reverse, scale
):
    scan = random_scan(batch, length, channels, states, torch.float32)
    scan["dt"] *= scale
    found = cpu.selective_scan(**scan, reverse=reverse)
    expected = naive.selective_scan(**double(scan), reverse=reverse)
    assert found.y.dtype == torch.float32
    assert relative_error(found.y, expected.y) < 1e-5  # one number may cancel
    assert relative_error(found.state, expected.state) < 1e-6
    # Each by itself: the sum of so many roundings has no bound of its own.
    torch.testing.assert_close(found.decay.double(), expected.decay, rtol=0, atol=1e-6)


@SENSES
@pytest.mark.parametrize("states", [8, 16, 24, 32])
@pytest.mark.parametrize("scale", [0.1, 1.0, 40.0])
def test_rates_in_the_ratio_of_their_initialisation(
    random_scan, relative_error, states, scale, reverse
):
    scan = random_scan(1, 99, 33, states, torch.float32)
    scan["A"] = scan["A"][:, :1] * torch.arange(1.0, states + 1)
    scan["dt"] *= scale
    found = cpu.selective_scan(**scan, reverse=reverse)
    expected = naive.selective_scan(**double(scan), reverse=reverse)
    assert relative_error(found.y, expected.y) < 1e-6
    assert relative_error(found.state, expected.state) < 1e-6


@SENSES
@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "state"])
def test_optional_inputs_of_the_scan(random_scan, relative_error, absent, reverse):
    scan = random_scan(2, 37, 19, 16, torch.float32)
    del scan[absent]
    found = cpu.selective_scan(**scan, reverse=reverse)
    expected = naive.selective_scan(**double(scan), reverse=reverse)
    assert relative_error(found.y, expected.y) < 1e-6
    assert relative_error(found.state, expected.state) < 1e-6


@SENSES
@pytest.mark.parametrize("gate", [-200.0, -20.0, 20.0, 200.0])
def test_extreme_gates_and_steps(random_scan, relative_error, gate, reverse):
    scan = random_scan(1, 64, 16, 16, torch.float32)
    scan["z"] = scan["z"] + gate
    scan["dt"] = scan["dt"] * 1e4
    found = cpu.selective_scan(**scan, reverse=reverse)
    expected = naive.selective_scan(**double(scan), reverse=reverse)
    assert found.y.isfinite().all()
    assert (found.y.double() - expected.y).abs().max() <= 1e-6 * max(1, expected.y.abs().max())


@SENSES
@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z"])
def test_nan_reaches_what_causality_allows(random_scan, name, reverse):
    scan = random_scan(1, 70, 20, 16, torch.float32)
    scan[name][0, 33, 3] = torch.nan
    found = cpu.selective_scan(**scan, reverse=reverse)
    expected = naive.selective_scan(**double(scan), reverse=reverse)
    assert expected.y.isnan().any()
    assert torch.equal(found.y.isnan(), expected.y.isnan())
    assert torch.equal(found.state.isnan(), expected.state.isnan())


@settings(deadline=None, max_examples=30)
@given(
    length=st.integers(1, 80),
    channels=st.integers(1, 40),
    width=st.integers(1, 5),
    reverse=st.booleans(),
    with_halo=st.booleans(),
)
def test_convolution_at_any_size(relative_error, length, channels, width, reverse, with_halo):
    given_tensors = {
        "x": torch.randn(2, length, channels) * 3,
        "weight": torch.randn(channels, width),
        "bias": torch.randn(channels),
    }
    if with_halo:
        given_tensors["halo"] = torch.randn(2, width - 1, channels)
    found = cpu.causal_conv(**given_tensors, reverse=reverse)
    expected = naive.causal_conv(**double(given_tensors), reverse=reverse)
    assert found.shape == expected.shape
    assert relative_error(found, expected) < 1e-6


@SENSES
def test_nan_in_the_convolution_reaches_its_taps_only(reverse):
    x = torch.randn(1, 40, 17)
    x[0, 20, 5] = torch.nan
    weight, bias = torch.randn(17, 4), torch.randn(17)
    found = cpu.causal_conv(x, weight, bias, reverse=reverse).isnan()
    assert torch.equal(found, naive.causal_conv(x, weight, bias, reverse=reverse).isnan())
    assert found.sum() == 4


def test_repeats_bit_for_bit(random_scan):
    scan = random_scan(1, 200, 48, 16, torch.float32)
    assert torch.equal(cpu.selective_scan(**scan).y, cpu.selective_scan(**scan).y)
