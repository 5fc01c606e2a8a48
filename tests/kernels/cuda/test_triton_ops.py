"""The scan as a torch operator: every gradient, in the specification's words."""

import pytest
import torch

from gigavim_kernels import chunked, naive

gpu = pytest.mark.gpu


@pytest.fixture
def ops():
    from gigavim_kernels.cuda import ops

    return ops


def gradients(scan, given, weights, reverse):
    leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
    results = scan(**leaves, reverse=reverse)
    loss = sum((found * w.to(found.dtype)).sum() for found, w in zip(results, weights))
    loss.backward()
    return results, {name: t.grad for name, t in leaves.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "states", "dtype"),
    [
        pytest.param(1, 1, 5, 8, torch.float32, id="one token"),
        pytest.param(2, 3, 4, 16, torch.float32, id="three tokens"),
        pytest.param(1, 71, 33, 8, torch.float32, id="two chunks, odd channels"),
        pytest.param(1, 5, 3, 32, torch.float32, id="32 states"),
        *(
            pytest.param(batch, length, channels, states, torch.float32, marks=gpu)
            for batch, length in ((1, 2), (3, 63), (3, 1000), (1, 4097))
            for channels in (32, 100, 384)
            for states in (8, 16, 32)
        ),
        pytest.param(1, 1536, 1536, 16, torch.float32, marks=gpu),
    ],
)
def test_results_and_gradients_meet_the_specification(
    ops, random_scan, relative_error, device, batch, length, channels, states, dtype, reverse, tied
):
    given = random_scan(batch, length, channels, states, torch.float32)
    if tied:
        given["A"] = given["A"][:, :1]
    given = {name: t.to(device) for name, t in given.items()}
    expected_in = {name: t.double() for name, t in given.items()}
    shapes = ((batch, length, channels), *[(batch, channels, states)] * 2)
    weights = [torch.randn(*shape, device=device, dtype=torch.float64) for shape in shapes]
    found, found_grads = gradients(ops.selective_scan, given, weights, reverse)
    specification = naive.selective_scan if length < 100 else chunked.selective_scan
    expected, expected_grads = gradients(specification, expected_in, weights, reverse)
    for got, want in zip(found, expected):
        assert relative_error(got.detach(), want.detach()) < 1e-5
    for name, want in expected_grads.items():
        assert relative_error(found_grads[name], want) < 1e-5, name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_start_from_the_states_that_the_scan_marked(
    ops, random_scan, relative_error, device, monkeypatch, reverse, tied
):
    """Whatever the plans: the passes hold different numbers of programs on a chip."""
    from gigavim_kernels.cuda import plan

    for name in ("INTERPRETED_MULTIPROCESSORS", "SHORTEST_CHUNK", "GOOD_CHUNK"):
        monkeypatch.setattr(plan, name, 1)
    length = 200 if device.type == "cpu" else 70_001
    given = random_scan(1, length, 5, 8, torch.float32)
    if tied:
        given["A"] = given["A"][:, :1]
    given = {name: t.to(device) for name, t in given.items()}
    weights = [torch.randn(1, length, 5, dtype=torch.float64).to(device)]
    _, found = gradients(ops.selective_scan, given, weights, reverse)
    wide = {name: t.double() for name, t in given.items()}
    _, expected = gradients(chunked.selective_scan, wide, weights, reverse)
    for name, want in expected.items():
        assert relative_error(found[name], want) < 1e-5, name


@pytest.mark.parametrize("channels", [6, pytest.param(64, id="scratch of 16 bits if tied")])
@pytest.mark.parametrize("tied", [False, True])
def test_half_precision_gradients(ops, random_scan, relative_error, device, tied, channels):
    given = random_scan(1, 9, channels, 8, torch.float32)
    if tied:
        given["A"] = given["A"][:, :1]
    half = {
        name: t.to(device, torch.bfloat16 if name in ("x", "dt", "B", "C", "z") else None)
        for name, t in given.items()
    }
    weights = [torch.randn(1, 9, channels), *(torch.zeros(1, channels, 8) for _ in range(2))]
    weights = [w.to(device) for w in weights]
    _, found = gradients(ops.selective_scan, half, weights, False)
    _, expected = gradients(
        naive.selective_scan,
        {n: t.double() for n, t in half.items()},
        # The gradient of y arrives in y's dtype.
        [w.bfloat16().double() for w in weights],
        False,
    )
    limit = 5e-3 if device.type == "cuda" else 8e-3  # the interpreter cuts off in place of rounding
    for name, want in expected.items():
        assert found[name].dtype == half[name].dtype
        assert relative_error(found[name], want) < limit, name


def test_absent_arguments_get_no_gradient(ops, random_scan, relative_error, device):
    given = random_scan(1, 6, 5, 8, torch.float32)
    given = {name: given[name].to(device) for name in ("x", "dt", "A", "B", "C")}
    weights = [torch.randn(1, 6, 5).to(device)]
    _, found = gradients(ops.selective_scan, given, weights, True)
    expected_in = {n: t.double() for n, t in given.items()}
    _, expected = gradients(naive.selective_scan, expected_in, weights, True)
    for name, want in expected.items():
        assert relative_error(found[name], want) < 1e-5, name


def test_no_tokens(ops, random_scan, device):
    given = {n: t.to(device) for n, t in random_scan(2, 0, 4, 8, torch.float32).items()}
    weights = [torch.ones(2, 0, 4), torch.ones(2, 4, 8), torch.ones(2, 4, 8)]
    (y, state, _), found = gradients(
        ops.selective_scan, given, [w.to(device) for w in weights], False
    )
    assert y.shape == (2, 0, 4)
    assert torch.equal(state, given["state"])
    assert torch.equal(found["state"], torch.ones_like(state))
    assert not found["A"].any()


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_the_operator_keeps_torchs_contracts(ops, random_scan, device, tied, optional):
    given = {n: t.to(device) for n, t in random_scan(1, 4, 3, 8, torch.float32).items()}
    if tied:
        given["A"] = given["A"][:, :1].contiguous()
    given["bc"] = torch.cat((given["B"], given["C"]), -1)
    names = ("x", "dt", "A", "bc", "D", "z", "dt_bias", "state")
    args = [given[n].requires_grad_() if n in names[:4] or optional else None for n in names]
    torch.library.opcheck(torch.ops.gigavim.selective_scan.default, (*args, False, True))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=gpu)])
def test_compiling_does_not_break_the_graph(ops, random_scan, relative_error, device, backend):
    given = {n: t.to(device) for n, t in random_scan(1, 5, 3, 8, torch.float32).items()}
    compiled = torch.compile(ops.selective_scan, backend=backend, fullgraph=True)
    weights = [torch.ones(1, 5, 3, device=device)]
    found, found_grads = gradients(compiled, given, weights, True)
    expected, expected_grads = gradients(ops.selective_scan, given, weights, True)
    torch.testing.assert_close(found.y, expected.y)
    for name, want in expected_grads.items():
        torch.testing.assert_close(found_grads[name], want)


@gpu
@pytest.mark.parametrize("tied", [False, True])
def test_two_runs_give_the_same_bits(ops, random_scan, device, tied):
    given = {n: t.to(device) for n, t in random_scan(2, 3000, 96, 16, torch.float32).items()}
    if tied:
        given["A"] = given["A"][:, :1]
    weights = [torch.randn(2, 3000, 96, device=device)]
    (first, first_grads), (second, second_grads) = (
        gradients(ops.selective_scan, given, weights, False) for _ in range(2)
    )
    assert torch.equal(first.y, second.y)
    for name, grad in first_grads.items():
        assert torch.equal(grad, second_grads[name]), name
