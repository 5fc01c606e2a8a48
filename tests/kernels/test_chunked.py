"""The chunk-parallel scan against the token loop: values, gradients, extremes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from gigavim_kernels import chunked, naive

SENSES = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
OPTIONAL = ("D", "z", "dt_bias", "state")


def gradients(scan_function, scan, reverse):
    leaves = {k: v.clone().requires_grad_() for k, v in scan.items()}
    result = scan_function(**leaves, reverse=reverse)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (part * torch.randn(part.shape, generator=generator, dtype=torch.float64)).sum()
        for part in result
    )
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return result, {
        k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(scan.items(), grads)
    }


@SENSES
@pytest.mark.parametrize("optional", [OPTIONAL, ()], ids=["all-inputs", "required-inputs"])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 16, 17, 63, 64, 65, 300])
def test_values_and_gradients_equal_the_token_loop(random_scan, length, optional, reverse):
    scan = random_scan(2, length, 5, 3)
    scan = {k: v for k, v in scan.items() if k in optional or k not in OPTIONAL}
    expected, expected_grads = gradients(naive.selective_scan, scan, reverse)
    found, found_grads = gradients(chunked.selective_scan, scan, reverse)
    for part, specified in zip(found, expected):
        assert_close(part, specified, rtol=1e-9, atol=1e-11)
    for name, grad in found_grads.items():
        assert_close(grad, expected_grads[name], rtol=1e-8, atol=1e-10, msg=f"gradient of {name}")


def test_channel_groups_do_not_show(random_scan, monkeypatch):
    scan = random_scan(1, 40, 7, 3)
    expected, expected_grads = gradients(chunked.selective_scan, scan, False)
    monkeypatch.setitem(chunked.HIDDEN_BUDGET, "cpu", 40 * 3 * 2)
    found, found_grads = gradients(chunked.selective_scan, scan, False)
    for part, whole in zip(found, expected):
        assert_close(part, whole)
    assert_close(found_grads, expected_grads)


@settings(deadline=None, max_examples=25)
@given(
    length=st.integers(1, 400),
    channels=st.integers(1, 20),
    states=st.integers(1, 17),
    reverse=st.booleans(),
    scale=st.sampled_from([0.01, 1.0, 80.0]),
)
def test_float32_at_any_size_and_step(random_scan, length, channels, states, reverse, scale):
    scan = random_scan(1, length, channels, states)
    scan["dt"] *= scale
    single = {k: v.float() for k, v in scan.items()}
    expected = naive.selective_scan(**{k: v.double() for k, v in single.items()}, reverse=reverse)
    found = chunked.selective_scan(**single, reverse=reverse)
    assert found.y.dtype == torch.float32
    assert_close(found.y.double(), expected.y, rtol=1e-4, atol=1e-5 * (1 + scale))
    assert_close(found.state.double(), expected.state, rtol=1e-4, atol=1e-5 * (1 + scale))


@SENSES
def test_half_precision_keeps_a_float32_state(random_scan, relative_error, reverse):
    scan = random_scan(1, 50, 8, 4)
    half = {
        k: v.bfloat16() if k in ("x", "dt", "B", "C", "z") else v.float() for k, v in scan.items()
    }
    result = chunked.selective_scan(**half, reverse=reverse)
    expected = naive.selective_scan(**{k: v.double() for k, v in half.items()}, reverse=reverse)
    assert result.y.dtype == torch.bfloat16
    assert result.state.dtype == torch.float32
    assert relative_error(result.y, expected.y) < 4e-3
    assert relative_error(result.state, expected.state) < 1e-6


@SENSES
def test_nan_reaches_only_later_tokens(random_scan, reverse):
    scan = random_scan(1, 70, 4, 3)
    scan["x"][0, 30, 2] = torch.nan
    found = chunked.selective_scan(**scan, reverse=reverse).y.isnan()
    assert torch.equal(found, naive.selective_scan(**scan, reverse=reverse).y.isnan())
    assert found.sum() == (31 if reverse else 40)
