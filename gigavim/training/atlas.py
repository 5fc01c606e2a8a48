"""All pictures of a training in one block of device memory, sampled at any place and scale.

Colours come from a pyramid of halved copies by bilinear interpolation, labels from the full
resolution by nearest neighbour. Everything is done in batches, so that a GPU draws its own data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kornia.geometry.transform import remap
from torch import Tensor

from gigavim.model.pictures import mirrored
from gigavim.training.pack import Picture

LEVELS = 4


@dataclass(frozen=True, slots=True)
class Level:
    """The pictures at one resolution, one after the other."""

    rgb: Tensor
    """(pixels, 3) uint8."""
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
        self.labels = torch.cat([torch.tensor(p.labels).flatten() for p in pictures]).to(device)

    @property
    def nbytes(self) -> int:
        """Of the device's memory."""
        own = sum(level.rgb.nbytes + level.size_hw.nbytes for level in self.levels)
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
        h, w = size_hw
        scale = float(torch.linalg.det(step).abs().sqrt().mean())
        level = min(LEVELS - 1, max(0, math.floor(math.log2(scale) + 0.3)))
        reach = 0.5 * (step.abs() * torch.tensor([h - 1.0, w - 1.0])).sum(-1)  # (n, 2)
        corner = ((centre_yx - reach) / 2**level - 0.5).floor().long()
        cut_hw = (2 * reach / 2**level).ceil().amax(0).long() + 2
        index, centre_yx, step, corner = (
            t.to(self.device, non_blocking=True) for t in (index, centre_yx, step, corner)
        )
        y = torch.arange(h, device=self.device) - (h - 1) / 2
        x = torch.arange(w, device=self.device) - (w - 1) / 2
        along_y = step[:, :, 0, None, None] * y[:, None]  # (n, 2, h, 1)
        place = along_y + step[:, :, 1, None, None] * x + centre_yx[:, :, None, None]
        cut_h, cut_w = cut_hw.tolist()
        rows, cols = (place / 2**level - 0.5 - corner[:, :, None, None]).unbind(1)
        colours = remap(
            self._cut(self.levels[level], index, corner, (cut_h, cut_w)),
            cols * (2 / (cut_w - 1)) - 1,
            rows * (2 / (cut_h - 1)) - 1,
            padding_mode="border",
            align_corners=True,
            normalized_coordinates=True,  # of pixels, kornia would wait for the device
        )
        return colours, self._nearest(index, (place - 0.5).round().long())

    def _cut(self, level: Level, index: Tensor, corner_yx: Tensor, hw: tuple[int, int]) -> Tensor:
        """Upright windows (n, 3, *hw) float32 of a level, mirrored beyond its borders."""
        size = level.size_hw[index]
        y, x = (
            mirrored(
                corner_yx[:, k, None] + torch.arange(hw[k], device=self.device), size[:, k, None]
            )
            for k in range(2)
        )
        row = level.start[index, None] + y * size[:, 1:]  # (n, h)
        return level.rgb[row[:, :, None] + x[:, None]].permute(0, 3, 1, 2).float()

    def _nearest(self, index: Tensor, place: Tensor) -> Tensor:
        level = self.levels[0]
        size = level.size_hw[index][:, :, None, None]
        y, x = mirrored(place, size).unbind(1)
        return self.labels[level.start[index][:, None, None] + y * size[:, 1] + x]


def _halved(plane: Tensor) -> Tensor:
    mean = F.avg_pool2d(plane[None].float(), 2, ceil_mode=True, count_include_pad=False)
    return mean[0].round().to(torch.uint8)


def _level(planes: Sequence[Tensor], device: torch.device) -> Level:
    sizes = torch.tensor([plane.shape[1:] for plane in planes], device=device)
    pixels = sizes.prod(1)
    rgb = torch.cat([plane.permute(1, 2, 0).reshape(-1, 3) for plane in planes])
    return Level(rgb, pixels.cumsum(0) - pixels, sizes)
