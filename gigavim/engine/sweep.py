"""The sweep: blocks over a whole sequence, chunk by chunk, exact for any chunk length.

For each block two passes. Right to left, the reverse directions' state at the right edge of every
chunk; left to right, the block itself in place, from the forward state carried along and those
edges. A chunk needs of its neighbours only these states and a few rows (the convolution's halo).
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from gigavim.engine.sequence import TokenSequence
from gigavim.errors import ModelError
from gigavim_kernels.backends import Precision, prepare_block
from gigavim_kernels.block import BlockKernel, States
from gigavim_kernels.weights import BlockWeights

Progress = Callable[[int], object]
"""Called with a number of tokens that one more block is done with: a progress bar's `update`."""
BLOCKS_AHEAD = 1
"""Blocks that a GPU may be told of before the numbers of an earlier one are looked at."""


def sweep(
    sequence: TokenSequence,
    blocks: Sequence[BlockWeights],
    *,
    device: torch.device | str,
    precision: Precision,
    chunk: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    on_block: Callable[[int], None] | None = None,
) -> None:
    """Run the blocks over the sequence in place, one after the other.

    Args:
        chunk: tokens per step; the kernel's own choice if absent. It sets memory and speed, and
            changes the result by rounding only.
        threads: CPU threads; all if absent.
        progress: called after each chunk; the numbers add up to tokens x blocks.
        on_block: called with the number of blocks done, 0 at first, while the sequence holds what
            they left.

    Raises:
        ModelError: the stream is no longer finite after a block (see `sweep_block`).
    """
    device = torch.device(device)
    on_block = on_block or (lambda done: None)
    on_block(0)
    kernels: Iterable[BlockKernel] = (
        prepare_block(block, device=device, precision=precision, threads=threads)
        for block in blocks
    )
    if device.type == "cuda":
        kernels = list(kernels)  # copying weights would wait for the block before
    waiting: list[Callable[[], bool]] = []
    for i, kernel in enumerate(kernels):
        waiting.append(sweep_block(sequence, kernel, device=device, chunk=chunk, progress=progress))
        on_block(i + 1)
        last = i + 1 == len(blocks)
        while waiting and (last or len(waiting) > BLOCKS_AHEAD):
            if not waiting.pop(0)():
                raise ModelError(
                    f"block {i - len(waiting)} of {len(blocks)}: the numbers are no longer finite: "
                    f"the weights are damaged, or do not bear the precision {precision}: try fp32, "
                    "or fetch them again"
                )


@torch.no_grad()
def sweep_block(
    sequence: TokenSequence,
    kernel: BlockKernel,
    *,
    device: torch.device,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> Callable[[], bool]:
    """Run one block over the sequence in place.

    Returns:
        A look, which waits for the block only, at whether the first and last rows of all chunks
        are finite. That is a check of the whole input, nearly for free: a NaN or infinity anywhere
        stays in the scan's state and so reaches every later token. One that only this block's
        output has is found by the next block.
    """
    chunk = kernel.chunk if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"a chunk of {chunk} tokens")
    edges = _reverse_edges(sequence, kernel, device, chunk)
    states = kernel.zero_states(reverse=False)
    left = torch.zeros(kernel.halo, sequence.width, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for i, start in enumerate(range(0, sequence.length, chunk)):
        stop = min(start + chunk, sequence.length)
        sequence.prefetch(stop, stop + chunk)
        rows = sequence.load(start, stop, device)  # (T, D)
        right = _load_padded(sequence, stop, stop + kernel.halo, device)
        # The next chunk's left halo, as before the update; a chunk may be shorter than the halo.
        before = torch.cat((left, rows[max(0, stop - start - kernel.halo) :]))
        states = kernel.update(rows, left, right, states, tuple(edge[i] for edge in edges))
        finite &= torch.isfinite(rows[:: max(1, rows.shape[0] - 1)]).all()
        sequence.store(start, rows)
        sequence.release(start, stop)
        left = before[before.shape[0] - kernel.halo :]
        if progress is not None:
            progress(stop - start)
    look = _look(finite)
    if sequence.device != finite.device:
        look()  # the host may read the rows from now on
    return look


def _look(flag: Tensor) -> Callable[[], bool]:
    """A way to read a flag later without waiting for what a GPU was told to do in between."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    copy = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
    copied = torch.cuda.current_stream(flag.device).record_event()

    def look() -> bool:
        copied.synchronize()
        return bool(copy)

    return look


def edge_state_bytes(length: int, blocks: Sequence[BlockWeights], chunk: int) -> int:
    """Memory for the states at chunk edges that a sweep keeps at a time (one block's)."""
    chunks = -(-length // chunk)
    per_chunk = (
        sum(
            len(d.A) * d.states * 4 for branch in b.branches for d in branch.directions if d.reverse
        )
        for b in blocks
    )
    return chunks * max(per_chunk, default=0)


def _reverse_edges(
    sequence: TokenSequence, kernel: BlockKernel, device: torch.device, chunk: int
) -> States:
    """The reverse directions' states at the right edges of all chunks, (chunks, E, N) each."""
    states = kernel.zero_states(reverse=True)
    starts = range(0, sequence.length, chunk)
    # One block of memory each: thousands of small tensors would fragment the heap.
    edges = tuple(s.new_zeros(len(starts), *s.shape) for s in states)
    if not states:
        return edges
    # The first chunk's left edge is the end of the scan: nobody needs its state.
    for i in range(len(starts) - 1, 0, -1):
        start, stop = starts[i], min(starts[i] + chunk, sequence.length)
        sequence.prefetch(start - chunk, start)
        rows = sequence.load(start, stop, device)
        left = _load_padded(sequence, start - kernel.halo, start, device)
        right = _load_padded(sequence, stop, stop + kernel.halo, device)
        states = kernel.edge_states(rows, left, right, states)
        for edge, state in zip(edges, states):
            edge[i - 1] = state
        sequence.release(start, stop)
    return edges


def _load_padded(sequence: TokenSequence, start: int, stop: int, device: torch.device) -> Tensor:
    """Rows start..stop-1, zero beyond the ends of the sequence."""
    length = sequence.length
    first, last = min(max(start, 0), length), min(max(stop, 0), length)
    rows = sequence.load(first, last, device)
    if rows.shape[0] == stop - start:
        return rows
    padded = torch.zeros(stop - start, sequence.width, device=device)
    padded[first - start : last - start] = rows
    return padded
