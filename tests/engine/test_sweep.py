import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gigavim.engine.sequence import TokenSequence
from gigavim.engine.sweep import edge_state_bytes, sweep, sweep_block
from gigavim.errors import ModelError
from gigavim_kernels.torch_block import TorchBlock

CPU = torch.device("cpu")
KINDS = ("v2", "v1", "none", "layer_pairs")
WIDTH = 8


def swept(stream, blocks, *, location="ram", scratch_dir=None, **options):
    with TokenSequence(*stream.shape, location=location, scratch_dir=scratch_dir) as sequence:
        sequence.rows(0, len(stream)).copy_(stream)
        sweep(sequence, blocks, device=CPU, precision="fp32", **options)
        return sequence.rows(0, len(stream)).clone()


def expected_stream(reference, stream, blocks):
    for block in blocks:
        stream = reference(stream, block)
    return stream


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(0, 70),
    chunk=st.integers(1, 80),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_any_chunking_equals_the_whole_sequence(
    make_block, reference, error_of, length, chunk, kinds, seed
):
    blocks = [make_block(kind, d_model=WIDTH, seed=seed + i) for i, kind in enumerate(kinds)]
    stream = torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(seed))
    found = swept(stream, blocks, chunk=chunk)
    assert error_of(found, expected_stream(reference, stream, blocks)) <= 1e-5


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(0, 70),
    chunk=st.integers(1, 80),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
def test_any_chunking_is_exact_in_plain_torch(
    make_block, reference, error_of, length, chunk, kind, seed
):
    block = make_block(kind, d_model=WIDTH, seed=seed)
    stream = torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(seed))
    kernel = TorchBlock(block, device=CPU, precision="fp32")
    with TokenSequence(length, WIDTH) as sequence:
        sequence.rows(0, length).copy_(stream)
        assert sweep_block(sequence, kernel, device=CPU, chunk=chunk)()
        found = sequence.rows(0, length).clone()
    assert error_of(found, reference(stream, block)) <= 1e-5


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("chunk", [1, 2, 3, None])
@pytest.mark.parametrize("kind", KINDS)
def test_shorter_than_the_convolution(make_block, reference, error_of, length, chunk, kind):
    block = make_block(kind, d_model=WIDTH)
    stream = torch.randn(length, WIDTH)
    found = swept(stream, [block], chunk=chunk)
    assert found.shape == (length, WIDTH)
    assert error_of(found, reference(stream, block)) <= 1e-5


def test_one_token_chunks_carry_states_over_thousands_of_tokens(make_block, error_of):
    blocks = [make_block("v2", d_model=WIDTH, seed=1)]
    stream = torch.randn(1500, WIDTH)
    one = swept(stream, blocks, chunk=1)
    assert error_of(one, swept(stream, blocks, chunk=1499).double()) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_ram_and_disk_and_repeats_agree_to_the_bit(make_block, kind):
    blocks = [make_block(kind, d_model=WIDTH, seed=i) for i in range(3)]
    stream = torch.randn(3001, WIDTH)
    first = swept(stream, blocks, chunk=512)
    assert torch.equal(first, swept(stream, blocks, chunk=512))
    assert torch.equal(first, swept(stream, blocks, chunk=512, location="disk"))


def test_thread_count_does_not_change_a_bit(make_block):
    blocks = [make_block("v2", d_model=WIDTH)]
    stream = torch.randn(3001, WIDTH)
    one = swept(stream, blocks, chunk=1000, threads=1)
    assert torch.equal(one, swept(stream, blocks, chunk=1000, threads=2))


def test_far_ends_see_each_other(make_block):
    blocks = [make_block("v2", d_model=WIDTH, seed=i) for i in range(2)]
    slow = torch.randn(200, WIDTH)
    changed = slow.clone()
    changed[-1] += 1
    difference = swept(slow, blocks, chunk=16) - swept(changed, blocks, chunk=16)
    assert difference[:100].abs().max() > 0


@pytest.mark.parametrize(("length", "chunk"), [(0, 5), (1, 5), (23, 5), (25, 5), (4, 5)])
def test_progress_adds_up_to_tokens_times_blocks(make_block, length, chunk):
    steps = []
    blocks = [make_block(kind, d_model=WIDTH) for kind in KINDS]
    swept(torch.randn(length, WIDTH), blocks, chunk=chunk, progress=steps.append)
    assert sum(steps) == length * len(blocks)
    assert len(steps) == math.ceil(length / chunk) * len(blocks)


@pytest.mark.parametrize("place", [0, 5, 12, 24])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_reported(make_block, place, value):
    stream = torch.randn(25, WIDTH)
    stream[place, 3] = value
    blocks = [make_block("none", d_model=WIDTH, seed=i) for i in range(4)]
    with pytest.raises(ModelError, match="block 0 of 4"):
        swept(stream, blocks, chunk=10)


def test_the_block_that_breaks_is_named(make_block):
    blocks = [make_block("v2", d_model=WIDTH, seed=i) for i in range(4)]
    blocks[2].branches[0].out_proj[0, 0] = math.nan
    with pytest.raises(ModelError, match=r"block 2 of 4.*fp32"):
        swept(torch.randn(25, WIDTH), blocks, chunk=10)


def test_an_interrupted_sweep_leaves_no_file(make_block, tmp_path):
    def interrupt(tokens):
        raise KeyboardInterrupt

    blocks = [make_block("v2", d_model=WIDTH)]
    options = {"location": "disk", "scratch_dir": tmp_path, "chunk": 7, "progress": interrupt}
    with pytest.raises(KeyboardInterrupt):
        swept(torch.randn(50, WIDTH), blocks, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("chunk", [0, -3])
def test_a_chunk_holds_a_token_at_least(make_block, chunk):
    with pytest.raises(ValueError, match="chunk"):
        swept(torch.randn(5, WIDTH), [make_block("none", d_model=WIDTH)], chunk=chunk)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("location", ["device", "ram", "disk"])
def test_a_gpu_sweeps_a_stream_that_lives_anywhere(make_block, error_of, location):
    blocks = [make_block(kind, d_model=WIDTH) for kind in KINDS]
    stream = torch.randn(3001, WIDTH)
    expected = swept(stream, blocks, chunk=512)
    with TokenSequence(3001, WIDTH, location=location, device="cuda") as sequence:
        sequence.scatter(torch.arange(3001), stream)
        sweep(sequence, blocks, device="cuda", precision="fp32", chunk=700)
        assert error_of(sequence.rows(0, 3001).cpu(), expected.double()) <= 1e-5


def test_edge_states_count_reverse_directions_only(make_block):
    blocks = {kind: make_block(kind, d_model=WIDTH, d_state=4) for kind in KINDS}
    per_edge = 16 * 4 * 4  # E x N float32
    assert edge_state_bytes(100, [blocks["none"]], 7) == 0
    assert edge_state_bytes(100, [blocks["none"], blocks["v2"]], 7) == 15 * per_edge
    assert edge_state_bytes(100, [blocks["layer_pairs"]], 100) == per_edge
    assert edge_state_bytes(0, [blocks["v2"]], 7) == 0
