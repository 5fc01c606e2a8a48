"""All pictures of a training in one block of device memory, sampled at any place and scale.

Colours come from a pyramid of halved copies by bilinear interpolation, labels from the full
resolution by nearest neighbour. Everything is done in batches, so that a GPU draws its own data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from kornia.geometry.transform import homography_warp
from torch import Tensor

from gigavim.model.pictures import mirrored
from gigavim.training.pack import Picture

LEVELS = 4
CUT_PX = 2**25
"""Stored pixels that are cut out at once."""


@dataclass(frozen=True, slots=True)
class Level:
    """The pictures at one resolution, one after the other."""

    pixels: Tensor
    """(pixels, c) uint8: colours or labels."""
    start: Tensor
    """(pictures,) int64: the first pixel of each."""
    size_hw: Tensor
    """(pictures, 2) int64."""


class Atlas:
    """Pictures on a device."""

    def __init__(self, pictures: Sequence[Picture], device: torch.device) -> None:
        self.device = device
        names = sorted({p.group for p in pictures})
        self.group = torch.tensor([names.index(p.group) for p in pictures])
        """(pictures,) int64: which group each is of, on the CPU."""
        self.mpp = torch.tensor([p.mpp for p in pictures])
        """(pictures,) float32, on the CPU."""
        self.size_hw = torch.tensor([p.labels.shape for p in pictures])
        """(pictures, 2) int64 in stored pixels, on the CPU."""
        planes = [torch.tensor(p.image).to(device).permute(2, 0, 1) for p in pictures]
        levels = [_level(planes, device)]
        for _ in range(1, LEVELS):
            planes = [_halved(plane) for plane in planes]
            levels.append(_level(planes, device))
        self.levels = tuple(levels)
        labels = torch.cat([torch.tensor(p.labels).flatten() for p in pictures])
        self.labels = labels.to(device)[:, None]

    @property
    def nbytes(self) -> int:
        """Of the device's memory."""
        own = sum(level.pixels.nbytes + level.size_hw.nbytes for level in self.levels)
        return own + self.labels.nbytes

    def sample(
        self, index: Tensor, size_hw: tuple[int, int], centre_yx: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cut a window out of each of n pictures; beyond its border a picture is mirrored.

        Args:
            index: (n,) int64, which pictures.
            size_hw: of the windows.
            centre_yx: (n, 2), the middle of each window in pixels of its picture.
            step: (n, 2, 2), stored pixels (y, x) that a window's pixel step in (y, x) makes.
                All three on the CPU, so that nothing waits for the device.

        Returns:
            (n, 3, h, w) float32, 0 to 255, and labels (n, h, w) uint8.
        """
        scale = float(torch.linalg.det(step).abs().sqrt().mean())
        level = min(LEVELS - 1, max(0, math.floor(math.log2(scale) + 0.3)))
        coarse, part = self.levels[level], 0.5**level
        colours = self._warp(coarse, index, size_hw, part * centre_yx, part * step)
        marks = replace(self.levels[0], pixels=self.labels)
        labels = self._warp(marks, index, size_hw, centre_yx, step, mode="nearest")
        return colours, labels[:, 0].byte()

    def _warp(
        self,
        level: Level,
        index: Tensor,
        size_hw: tuple[int, int],
        centre_yx: Tensor,
        step: Tensor,
        mode: str = "bilinear",
    ) -> Tensor:
        """Do as `sample`, in pixels of a level; windows (n, c, h, w) float32."""
        last = torch.tensor(size_hw) - 1.0
        reach = 0.5 * (step.abs() @ last)  # (n, 2): of a window from its middle
        corner = (centre_yx - 0.5 - reach).floor().long()
        hw = (2 * reach).ceil().amax(0).long() + 2
        first = centre_yx - 0.5 - (step @ last) / 2 - corner  # where a window's first pixel lies
        matrix = torch.eye(3).repeat(len(index), 1, 1)  # (n, 3, 3), of (x, y, 1)
        matrix[:, :2, :2], matrix[:, :2, 2] = step.flip(1, 2), first.flip(1)
        cells_at_once = max(1, CUT_PX // int(hw.prod()))
        parts = zip(*(torch.split(t, cells_at_once) for t in (index, corner, matrix)), strict=True)
        return torch.cat(
            [
                homography_warp(
                    self._cut(level, which, start, hw.tolist()),
                    to.to(self.device, non_blocking=True),
                    size_hw,
                    mode=mode,
                    padding_mode="border",
                    align_corners=True,
                    normalized_coordinates=False,
                )
                for which, start, to in parts
            ]
        )

    def _cut(self, level: Level, index: Tensor, corner_yx: Tensor, hw: Sequence[int]) -> Tensor:
        """Upright windows (n, c, *hw) float32 of a level from corners (n, 2) on the CPU."""
        index = index.to(self.device, non_blocking=True)
        corner = corner_yx.to(self.device, non_blocking=True)
        size = level.size_hw[index]
        y, x = (
            mirrored(corner[:, k, None] + torch.arange(hw[k], device=self.device), size[:, k, None])
            for k in range(2)
        )
        row = level.start[index, None] + y * size[:, 1:]  # (n, h)
        found = level.pixels[row[:, :, None] + x[:, None]]  # (n, h, w, c)
        return found.permute(0, 3, 1, 2).float()


def _halved(plane: Tensor) -> Tensor:
    mean = F.avg_pool2d(plane[None].float(), 2, ceil_mode=True, count_include_pad=False)
    return mean[0].round().to(torch.uint8)


def _level(planes: Sequence[Tensor], device: torch.device) -> Level:
    sizes = torch.tensor([plane.shape[1:] for plane in planes], device=device)
    pixels = sizes.prod(1)
    rgb = torch.cat([plane.permute(1, 2, 0).reshape(-1, 3) for plane in planes])
    return Level(rgb, pixels.cumsum(0) - pixels, sizes)
