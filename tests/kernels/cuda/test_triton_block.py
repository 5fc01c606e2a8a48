"""Convolution, norm and the whole block on Triton kernels."""

import pytest
import torch
import torch.nn.functional as F

from gigavim_kernels import backends, naive

gpu = pytest.mark.gpu


@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True)], ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "channels", "taps"),
    [
        (1, 1, 5, 4),
        (2, 17, 9, 4),
        (1, 3, 130, 2),
        (1, 5, 8, 1),
        pytest.param(3, 4097, 384, 4, marks=gpu),
    ],
)
def test_convolution(relative_error, device, batch, length, channels, taps, reverse):
    from gigavim_kernels.cuda.conv import convolve

    wide = torch.randn(batch, length + 3, channels + 4, device=device)
    rows = wide[:, :, :channels]
    weight = torch.randn(len(reverse), channels, taps, device=device)
    bias = torch.randn(len(reverse), channels, device=device)
    found = convolve(rows, weight, bias, reverse=reverse, before=1, after=2)
    assert found.shape == (len(reverse), batch, length, channels)
    padded = F.pad(rows.double(), (0, 0, 3, 3))
    for s, r in enumerate(reverse):
        expected = naive.causal_conv(padded, weight[s].double(), bias[s].double(), reverse=r)
        assert relative_error(found[s], expected[:, 4 : 4 + length]) < 1e-6


@pytest.mark.parametrize(
    ("length", "width"), [(1, 3), (40, 48), (0, 8), pytest.param(9999, 192, marks=gpu)]
)
def test_norm(device, length, width):
    from gigavim_kernels.cuda.norm import rms_norm

    x, weight = torch.randn(length, width).to(device), torch.rand(width).to(device)
    found = torch.full_like(x, float("nan"))
    rms_norm(x, weight, 1e-5, out=found)
    torch.testing.assert_close(found, F.rms_norm(x, (width,), weight, 1e-5))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["v2", "v1", "none", "layer_pairs"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2.5e-2)])
@pytest.mark.parametrize(
    ("length", "d_model", "cuts"),
    [
        pytest.param(13, 16, [2, 9], id="13"),
        pytest.param(5, 8, [1, 2], id="5"),
        pytest.param(1001, 192, [1, 500], marks=gpu, id="1001"),
    ],
)
def test_block_cut_in_chunks_meets_the_specification(
    random_block,
    specified_block,
    swept,
    relative_error,
    device,
    kind,
    precision,
    tolerance,
    length,
    d_model,
    cuts,
    tied,
):
    from gigavim_kernels.cuda.block import CudaBlock

    block = random_block(kind, d_model=d_model, states=8, tied=tied)
    stream = torch.randn(length, d_model)
    found = swept(CudaBlock(block, device=device, precision=precision), stream.to(device), cuts)
    added = specified_block(block, stream) - stream
    assert relative_error(found.cpu() - stream, added) < tolerance


@pytest.mark.parametrize("kind", ["v2", "v1", "none", "layer_pairs"])
@pytest.mark.parametrize(
    ("batch", "length", "d_model"),
    [(3, 7, 8), (1, 1, 8), pytest.param(5, 197, 192, marks=gpu)],
)
def test_a_batch_is_so_many_sequences(
    random_block, specified_block, relative_error, device, kind, batch, length, d_model
):
    from gigavim_kernels.cuda.block import CudaBlock

    block = random_block(kind, d_model=d_model, states=8)
    streams = torch.randn(batch, length, d_model)
    found = streams.clone().to(device)
    CudaBlock(block, device=device, precision="fp32").apply(found)
    for got, before in zip(found.cpu(), streams):
        assert relative_error(got - before, specified_block(block, before) - before) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_rates_in_the_ratio_are_found(random_block, tied):
    from gigavim_kernels.cuda.directions import compact_rates, stack

    block = random_block("v2", d_model=8, states=8, tied=tied)
    found = stack(compact_rates(block.branches[0].directions))
    assert found.A.shape == (2, 16, 1 if tied else 8)
    assert found.states == 8


def test_gpus_run_the_triton_kernels():
    assert backends.backend_name("cuda") == "triton"


@gpu
def test_two_runs_give_the_same_bits(random_block, device):
    block = random_block("v2", d_model=192)
    kernel = backends.prepare_block(block, device=device, precision="bf16")
    stream = torch.randn(20_000, 192, device=device)
    halo = stream.new_zeros(kernel.halo, 192)
    states = kernel.zero_states(reverse=False), kernel.zero_states(reverse=True)
    results = [stream.clone() for _ in range(2)]
    for rows in results:
        kernel.update(rows, halo, halo, *states)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "channels", "rank", "states"),
    [
        (1, 1, 5, 8, 2),
        (2, 65, 70, 8, 8),
        (1, 3, 16, 24, 16),
        pytest.param(3, 4097, 384, 16, 16, marks=gpu),
        pytest.param(1, 1001, 1536, 48, 16, marks=gpu),
    ],
)
def test_products_of_convolved_rows(
    relative_error, device, batch, length, channels, rank, states, dtype
):
    from gigavim_kernels.cuda.project import project

    c = torch.randn(2, batch, length, channels).to(dtype)
    x_proj = torch.randn(2, rank + 2 * states, channels).to(dtype)
    dt_weight = torch.randn(2, channels, rank).to(dtype)
    given = [t.to(device) for t in (c, x_proj, dt_weight)]
    dt, bc, low = project(*given, keep_low=True)
    projected = torch.einsum("sble,spe->sblp", c.double(), x_proj.double())
    assert bc.dtype == torch.float32
    assert relative_error(bc.cpu(), projected[..., rank:]) < 1e-5
    assert relative_error(low.cpu(), projected[..., :rank]) < 1e-2
    exact = torch.einsum("sblr,ser->sble", low.cpu().double(), dt_weight.double())
    assert relative_error(dt.cpu(), exact) < 1e-2
    bias = torch.randn(2, channels) - 4
    steps, *_ = project(*given, dt_bias=bias.to(device))
    exact = F.softplus(exact + bias[:, None, None])
    assert relative_error(steps.cpu(), exact) < (4e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize(
    ("length", "width", "inner"),
    [(1, 3, 5), (130, 70, 33), (0, 8, 16), pytest.param(9999, 192, 384, marks=gpu)],
)
def test_a_product_is_added_in_place(relative_error, device, length, width, inner):
    from gigavim_kernels.cuda.product import add_product

    wide, weight = torch.randn(length, width + 3), torch.randn(width, inner).bfloat16()
    y = torch.randn(length, inner).bfloat16()
    found = wide.clone().to(device)
    add_product(found[:, :width], y.to(device), weight.to(device), factor=2.0)
    assert (found[:, width:].cpu() == wide[:, width:]).all()
    if length:
        expected = 2 * wide[:, :width].double() + y.double() @ weight.double().T
        assert relative_error(found[:, :width].cpu(), expected) < 1e-5


def test_norm_of_rows_between_others(device):
    from gigavim_kernels.cuda.norm import rms_norm

    rows, weight = torch.randn(45, 20), torch.rand(20)
    left, middle, right = rows.split((2, 40, 3))
    found = torch.full_like(rows, float("nan"), device=device)
    given = (t.to(device) for t in (middle, weight))
    rms_norm(*given, 1e-5, out=found, left=left.to(device), right=right.to(device))
    torch.testing.assert_close(found.cpu(), F.rms_norm(rows, (20,), weight, 1e-5))
