"""What the engine asks of a block on one device: two calls on a chunk of the sequence.

A sweep over the sequence is exact because a chunk needs of its neighbours only K-1 tokens on either
side (`left`, `right`: rows of the stream as it was before this block; zero rows beyond the ends of
the sequence, which RMSNorm and the bias-free in_proj keep at zero) and the scan states at its
edges.
"""

from typing import Protocol

from torch import Tensor

States = tuple[Tensor, ...]
"""One (E, N) float32 tensor per direction of one sense (forward or reverse), branch by branch."""


class BlockKernel(Protocol):
    """A block made ready on a device; see `gigavim_kernels.backends.prepare_block`."""

    halo: int
    """Rows of `left` and `right`: K - 1."""
    chunk: int
    """The number of tokens per call at which this kernel is fastest."""

    def zero_states(self, *, reverse: bool) -> States:
        """The states at the start (forward) or at the end (reverse) of the sequence."""
        ...

    def edge_states(self, stream: Tensor, left: Tensor, right: Tensor, states: States) -> States:
        """Carry the reverse directions over a chunk without computing outputs.

        Args:
            stream: (T, D) float32, before this block. left, right: (halo, D) float32.
            states: of the reverse directions at the chunk's right edge.

        Returns:
            The states of the reverse directions at the chunk's left edge.
        """
        ...

    def update(
        self, stream: Tensor, left: Tensor, right: Tensor, forward: States, reverse: States
    ) -> States:
        """Apply the block to a chunk in place.

        Args:
            stream: (T, D) float32, before this block; after the call it holds the result.
            left, right: (halo, D) float32, rows of the stream before this block.
            forward: states of the forward directions at the left edge.
            reverse: states of the reverse directions at the right edge.

        Returns:
            The states of the forward directions at the chunk's right edge.
        """
        ...

    def apply(self, streams: Tensor) -> None:
        """Apply the block in place to whole sequences (B, L, D), contiguous float32."""
        ...


def apply_each(kernel: BlockKernel, streams: Tensor) -> None:
    """`BlockKernel.apply` by one `update` a sequence."""
    halo = streams.new_zeros(kernel.halo, streams.shape[2])
    forward, reverse = (kernel.zero_states(reverse=r) for r in (False, True))
    for stream in streams:
        kernel.update(stream, halo, halo, forward, reverse)
