"""Means over the cells of coarse grids that are laid over a whole grid of tokens."""

import torch
from torch import Tensor

SIZES = (1, 2, 3, 6)
"""Cells along a side, as in the pyramid pooling of Zhao et al. 2017 (arXiv 1612.01105)."""
BINS = sum(size**2 for size in SIZES)


def bin_sums(features: Tensor, row: Tensor, col: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Sums and counts of some tokens by cell; those of parts of a grid may be added up.

    Args:
        features: (n, C). row: (n,) int64 on the grid. col: (n,) int64.
        grid_hw: (rows, cols) of the whole grid.

    Returns:
        (BINS, C + 1) float64: sums, and how many tokens there are.
    """
    values = torch.cat((features, features.new_ones(len(features), 1)), 1).double()
    found = []
    for size in SIZES:
        down, across = row * size // grid_hw[0], col * size // grid_hw[1]
        cells = torch.arange(size**2, device=row.device)
        found.append((cells[:, None] == down * size + across).double() @ values)
    return torch.cat(found)


def grid_sums(grid: Tensor, kept: Tensor | None) -> Tensor:
    """Sums and counts of whole grids (B, rows, cols, C): (B, BINS, C + 1), with gradients.

    Args:
        kept: (B, rows, cols) bool, where tokens are; everywhere if absent.
    """
    # Sums over thousands of tokens are not for bfloat16.
    with torch.autocast(grid.device.type, enabled=False):
        grid = grid if grid.dtype == torch.float64 else grid.float()
        ones = grid.new_ones(*grid.shape[:3], 1) if kept is None else kept[..., None].to(grid.dtype)
        values = torch.cat((grid * ones, ones), 3)
        found = []
        for size in SIZES:
            down, across = (_members(n, size, grid) for n in grid.shape[1:3])
            cells = torch.einsum("ur,brcd->bucd", down, values)
            found.append(torch.einsum("vc,bucd->buvd", across, cells).flatten(1, 2))
        return torch.cat(found, 1)


def bin_means(sums: Tensor) -> Tensor:
    """(B, BINS, C + 1) sums and counts to means (B, BINS, C); zero of an empty cell."""
    return sums[..., :-1] / sums[..., -1:].clamp(min=1)


def spread_bins(
    cells: Tensor, size: int, rows: tuple[Tensor, int], cols: tuple[Tensor, int]
) -> Tensor:
    """Read (B, size * size, C) cells between their centres, bilinearly: (B, h, w, C).

    Args:
        rows: places (h,) on the whole grid, from its upper side in tokens, and the grid's rows.
        cols: the same for columns (w,).
    """
    down, across = (_between(at, length, size).to(cells.dtype) for at, length in (rows, cols))
    square = cells.reshape(len(cells), size, size, -1)
    return torch.einsum("hu,wv,buvc->bhwc", down, across, square)


def _members(length: int, size: int, like: Tensor) -> Tensor:
    """(size, length) one where a token belongs to a cell, else zero."""
    cell = torch.arange(length, device=like.device) * size // length
    return (torch.arange(size, device=like.device)[:, None] == cell).to(like.dtype)


def _between(at: Tensor, length: int, size: int) -> Tensor:
    """(n, size) weights of the cells at places (n,)."""
    place = (at.double() * size / length - 0.5).clamp(0, size - 1)
    cells = torch.arange(size, device=at.device)
    return (1 - (place[:, None] - cells).abs()).clamp(min=0)
