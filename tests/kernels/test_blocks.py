"""Every block kernel against the block written out in float64, whole and in chunks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gigavim_kernels import backends
from gigavim_kernels.torch_block import TorchBlock

KINDS = ["v2", "v1", "none", "layer_pairs"]
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}  # of what the block adds to the stream
BACKENDS = ["torch", "numba"]
CPU = torch.device("cpu")


def kernel_of(backend, block, precision, threads=2):
    if backend == "torch":
        return TorchBlock(block, device=CPU, precision=precision)
    pytest.importorskip("numba")
    from gigavim_kernels.cpu.block import CpuBlock

    return CpuBlock(block, precision=precision, threads=threads)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("d_model", "states", "taps"), [(32, 16, 4), (24, 32, 1), (7, 5, 2)])
def test_block_equals_the_specification(
    random_block, specified_block, swept, relative_error,
    backend, kind, precision, d_model, states, taps, tied,
):  # fmt: skip
    block = random_block(kind, d_model, states, taps, tied=tied)
    stream = torch.randn(75, d_model)
    added = specified_block(block, stream) - stream.double()
    kernel = kernel_of(backend, block, precision)
    assert kernel.halo == taps - 1
    found = swept(kernel, stream, [])
    assert relative_error(found - stream, added) < TOLERANCE[precision]
    in_chunks = swept(kernel, stream, [1, 2, 10, 40])
    assert relative_error(in_chunks - stream, added) < TOLERANCE[precision]


@settings(deadline=None, max_examples=25)
@given(
    length=st.integers(1, 120),
    cuts=st.lists(st.floats(0, 1), max_size=5),
    kind=st.sampled_from(KINDS),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 1000),
)
def test_chunks_do_not_show(random_block, swept, relative_error, length, cuts, kind, backend, seed):
    kernel = kernel_of(backend, random_block(kind, 16, 8, seed=seed), "fp32")
    stream = torch.randn(length, 16)
    whole = swept(kernel, stream, [])
    places = sorted({int(cut * length) for cut in cuts} - {0, length})
    assert relative_error(swept(kernel, stream, places), whole) <= 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cpu_block_repeats_bit_for_bit_on_any_number_of_threads(random_block, swept, precision):
    block, stream = random_block("v2", 40), torch.randn(3000, 40)
    first = swept(kernel_of("numba", block, precision), stream, [1100])
    for threads in (1, 2, 3, 7):
        again = swept(kernel_of("numba", block, precision, threads), stream, [1100])
        assert torch.equal(again, first)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cpu_block_works_in_inference_mode_and_out_of_it(random_block, swept, precision):
    stream, results = torch.randn(30, 48), []
    for inference in (True, False):
        with torch.inference_mode(inference):
            block = random_block("v2", d_model=48)
            kernel = backends.MAKERS["numba"](block, torch.device("cpu"), precision, 3)
            results.append(swept(kernel, stream, []).numpy())
    assert (results[0] == results[1]).all()


def test_cpu_block_leaves_torch_threads_alone(random_block, swept):
    before = torch.get_num_threads()
    swept(kernel_of("numba", random_block(), "fp32"), torch.randn(9, 32), [4])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows_beyond_the_ends_change_nothing(random_block, backend):
    kernel = kernel_of(backend, random_block("v2"), "fp32")
    states = kernel.zero_states(reverse=True)
    beyond = torch.zeros(3, 32)
    carried = kernel.edge_states(torch.zeros(50, 32), beyond, beyond, states)
    assert [s.shape for s in carried] == [(64, 16)]
    assert kernel.zero_states(reverse=False)[0].count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_chunk_stays_out_of_causally_earlier_tokens(random_block, swept, backend):
    kernel = kernel_of(backend, random_block("none"), "fp32")
    stream = torch.randn(60, 32)
    stream[30, 0] = torch.nan
    found = swept(kernel, stream, [20, 40]).isnan().any(1)
    assert not found[:30].any()
    assert found[30:].all()


def test_layer_pairs_read_the_stream_before_either_writes(random_block, specified_block, swept):
    block, stream = random_block("layer_pairs"), torch.randn(20, 32)
    prepared = backends.prepare_block(block, device="cpu", precision="fp32")
    torch.testing.assert_close(
        swept(prepared, stream, [7]).double(), specified_block(block, stream), rtol=1e-4, atol=1e-4
    )
