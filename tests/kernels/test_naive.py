"""What the specification itself must satisfy, in float64."""

import pytest
import torch
from torch.testing import assert_close

from gigavim_kernels import naive


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cut", [0, 1, 7, 20])
def test_two_halves_with_carried_state_equal_the_whole(random_scan, reverse, cut):
    scan = random_scan(2, 20, 3, 4)
    whole = naive.selective_scan(**scan, reverse=reverse)

    def part(start, stop, state):
        rows = {k: scan[k][:, start:stop] for k in ("x", "dt", "B", "C", "z")}
        return naive.selective_scan(**{**scan, **rows, "state": state}, reverse=reverse)

    if reverse:
        second = part(cut, 20, scan["state"])
        first = part(0, cut, second.state)
        last = first
    else:
        first = part(0, cut, scan["state"])
        second = part(cut, 20, first.state)
        last = second
    assert_close(torch.cat((first.y, second.y), 1), whole.y)
    assert_close(last.state, whole.state)
    assert_close(first.decay * second.decay, whole.decay)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_decay_is_the_factor_of_the_initial_state(random_scan, reverse):
    scan = random_scan(2, 9, 3, 4)
    given = naive.selective_scan(**scan, reverse=reverse)
    zero = naive.selective_scan(**{**scan, "state": None}, reverse=reverse)
    assert_close(zero.state + zero.decay * scan["state"], given.state)


def test_reverse_scan_is_the_scan_of_the_flipped_sequence(random_scan):
    scan = random_scan(2, 9, 3, 4)
    flipped = {k: scan[k].flip(1) for k in ("x", "dt", "B", "C", "z")}
    expected = naive.selective_scan(**{**scan, **flipped})
    found = naive.selective_scan(**scan, reverse=True)
    assert_close(found.y, expected.y.flip(1))
    assert_close(found.state, expected.state)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_with_halo_equals_the_whole(width):
    x, weight, bias = torch.randn(2, 12, 3), torch.randn(3, width), torch.randn(3)
    forward = naive.causal_conv(x, weight, bias)
    assert_close(naive.causal_conv(x[:, 5:], weight, bias, x[:, 6 - width : 5]), forward[:, 5:])
    reverse = naive.causal_conv(x, weight, bias, reverse=True)
    assert_close(
        naive.causal_conv(x[:, :5], weight, bias, x[:, 5 : 4 + width], reverse=True),
        reverse[:, :5],
    )
    assert_close(reverse, naive.causal_conv(x.flip(1), weight, bias).flip(1))
