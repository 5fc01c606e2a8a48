"""Cutting a grid of tokens into windows that see a little of their neighbours."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a grid, and what around it has to be read to decode it."""

    top: int
    left: int
    rows: int
    cols: int
    top_seen: int
    left_seen: int
    rows_seen: int
    cols_seen: int

    @property
    def core(self) -> tuple[slice, slice]:
        """Rows and columns of the piece in the grid."""
        return slice(self.top, self.top + self.rows), slice(self.left, self.left + self.cols)

    @property
    def seen(self) -> tuple[slice, slice]:
        """Rows and columns of the piece with its surroundings in the grid."""
        return (
            slice(self.top_seen, self.top_seen + self.rows_seen),
            slice(self.left_seen, self.left_seen + self.cols_seen),
        )

    @property
    def inner(self) -> tuple[slice, slice]:
        """Rows and columns of the piece within what is seen."""
        y, x = self.top - self.top_seen, self.left - self.left_seen
        return slice(y, y + self.rows), slice(x, x + self.cols)


def windows(
    rows_of: tuple[int, int], grid_hw: tuple[int, int], *, halo: int, cols_at_once: int
) -> Iterator[Window]:
    """Cut rows first..last-1 of a grid into windows from left to right.

    Args:
        rows_of: (first, last) row of the strip; it is one window high.
        grid_hw: (rows, cols) of the whole grid.
        halo: tokens that a window sees beyond its sides, where the grid has them.
        cols_at_once: columns of a window.
    """
    (first, last), (rows, cols) = rows_of, grid_hw
    top, bottom = max(0, first - halo), min(rows, last + halo)
    for left in range(0, cols, cols_at_once):
        right = min(left + cols_at_once, cols)
        left_seen, right_seen = max(0, left - halo), min(cols, right + halo)
        yield Window(
            first, left, last - first, right - left,
            top, left_seen, bottom - top, right_seen - left_seen,
        )  # fmt: skip
