"""What a head reads of the layers in between, kept beside the stream while a sweep runs."""

from collections.abc import Callable

import torch

from gigavim.engine.sequence import TokenSequence
from gigavim.model.heads import Head

ROWS = 4096


class Taps:
    """Adds up a head's taps over a whole sequence; `on_block` of `gigavim.engine.sweep.sweep`.

    Args:
        head: of the model; moved to where the sequence is.
        sequence: the stream that is swept.
        keep: makes a sequence of so many numbers per token, for the sums.
    """

    def __init__(
        self, head: Head, sequence: TokenSequence, keep: Callable[[int], TokenSequence]
    ) -> None:
        self._head, self._sequence = head.to(sequence.device), sequence
        self.side = keep(head.side_width)
        """(L, side_width), complete after the last block."""

    @torch.inference_mode()
    def __call__(self, done: int) -> None:
        """Note the stream after so many blocks."""
        if done not in self._head.taps:
            return
        is_first = done == self._head.taps[0]
        for start in range(0, len(self._sequence), ROWS):
            stop = min(start + ROWS, len(self._sequence))
            rows = self._head.side(done, self._sequence.rows(start, stop))
            target = self.side.rows(start, stop)
            if is_first:
                target.copy_(rows)
            else:
                target += rows
            self._sequence.release(start, stop)
            self.side.release(start, stop)
