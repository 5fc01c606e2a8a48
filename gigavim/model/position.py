"""Position embeddings, evaluated for any cells of any grid without building the grid's table.

A cell is given by its row and column, (n,) int64 each; the answer is (n, D).
"""

import math

import torch
from torch import Tensor

from gigavim.model.config import CLASS_TOKENS, ClassToken
from gigavim.model.sequence import class_slots, without_class_tokens

# Waves reach from 4 tokens, the shortest that neighbouring tokens sample well, to 2^16 tokens,
# wider than any slide.
SHORTEST_TOKENS = 4.0
LONGEST_TOKENS = 65536.0


def split_table(pos_embed: Tensor, kind: ClassToken) -> tuple[Tensor, Tensor]:
    """Part a learned table (1, M + k, D) into patches (M, D) and class tokens (k, D).

    The slot is where the token stands. The published resizing code takes slot 0 always, which
    shifts half of the table of a model with a middle token.
    """
    slots = class_slots(pos_embed.shape[1] - CLASS_TOKENS[kind], kind)
    # Slices: a list of slots would become a tensor of the host, which CUDA graphs cannot copy.
    own = [pos_embed[0, slot : slot + 1] for slot in slots]
    return without_class_tokens(pos_embed, kind)[0], torch.cat([pos_embed[0, :0], *own])


def grid_position(
    table: Tensor, table_hw: tuple[int, int], row: Tensor, col: Tensor, grid_hw: tuple[int, int]
) -> Tensor:
    """Interpolate a learned table (rows * cols, D) of `table_hw` to cells of a grid `grid_hw`.

    Bicubic (a = -0.75), aligned by area (`align_corners=False`), without antialiasing: the numbers
    of `torch.nn.functional.interpolate` on the whole grid.
    """
    rows, cols = table_hw
    if table_hw == grid_hw:
        return table[row * cols + col]
    distinct, place = torch.unique(row, return_inverse=True)
    row_taps, row_weights = _bicubic_taps(distinct, grid_hw[0], rows)  # (r, 4)
    col_taps, col_weights = _bicubic_taps(col, grid_hw[1], cols)  # (n, 4)
    spread = torch.zeros(len(distinct), rows, dtype=torch.float64, device=table.device)
    spread.scatter_add_(1, row_taps, row_weights)  # clamped taps meet at the border
    lines = spread.to(table.dtype) @ table.view(rows, -1)  # (r, cols * D)
    lines = lines.view(len(distinct) * cols, table.shape[1])  # (r * cols, D)
    weights = col_weights.to(table.dtype)
    taps = [lines[place * cols + col_taps[:, k]] * weights[:, k, None] for k in range(4)]
    return taps[0] + taps[1] + taps[2] + taps[3]


def block_position(table: Tensor, table_hw: tuple[int, int], row: Tensor, col: Tensor) -> Tensor:
    """Repeat a learned table (rows * cols, D) of shape `table_hw` block by block over any grid."""
    rows, cols = table_hw
    return table[row % rows * cols + col % cols]


def wave_position(
    y_um: Tensor, x_um: Tensor, d_model: int, shortest_um: float, longest_um: float
) -> Tensor:
    """Return the 2-D sine-cosine embedding (n, d_model) of places in micrometres, (n,) float64.

    Quarters of the channels: sin and cos along y, sin and cos along x; wavelengths in a geometric
    series. The phase is taken in float64, as a slide is many thousand waves wide.
    """
    steps = torch.linspace(0, 1, d_model // 4, dtype=torch.float64, device=y_um.device)
    wavelength_um = shortest_um * (longest_um / shortest_um) ** steps
    along_y = 2 * math.pi * y_um[:, None] / wavelength_um  # (n, D / 4)
    along_x = 2 * math.pi * x_um[:, None] / wavelength_um
    waves = (along_y.sin(), along_y.cos(), along_x.sin(), along_x.cos())
    return torch.cat(waves, 1).float()


def _bicubic_taps(place: Tensor, size: int, table_size: int) -> tuple[Tensor, Tensor]:
    """Return indices into the table, (n, 4) int64, and their weights, (n, 4) float64."""
    source = (place.double() + 0.5) * (table_size / size) - 0.5
    below = source.floor()
    t = (source - below)[:, None]
    distance = torch.cat((t + 1, t, 1 - t, 2 - t), 1)
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    taps = below.long()[:, None] + torch.arange(-1, 3, device=place.device)
    return taps.clamp(0, table_size - 1), torch.where(distance <= 1, near, far)
