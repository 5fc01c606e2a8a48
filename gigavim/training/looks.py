"""What stains, scanners and slide preparation do to a picture, at random and in batches.

The operations are kornia's functions, whose parameters are drawn here: kornia's random classes draw
from torch's global generator, so that neither threads nor a resumed training would see what they
saw. What only slides have (bare glass, dust, pens) is drawn here and applied as light is absorbed.
Parameters that kornia checks are drawn on the CPU, for a check on a GPU would wait for it.
"""

import math

import torch
from kornia.enhance import (
    adjust_brightness,
    adjust_gamma,
    adjust_saturation_with_gray_subtraction,
    jpeg_codec_differentiable,
)
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import resize
from torch import Generator, Tensor

from gigavim.training.constants import constant
from gigavim.training.recipe import Recipe
from gigavim.training.stain import RandomStain

PENS = torch.tensor(
    [[0.10, 0.14, 0.30], [0.05, 0.30, 0.16], [0.08, 0.08, 0.09], [0.45, 0.06, 0.10]]
)
TAPS = 9


class Dice:
    """Random numbers on a device, and some that the CPU has to know.

    Args:
        generator: on the device.
        plan: on the CPU.
    """

    def __init__(self, generator: Generator, plan: Generator) -> None:
        self.generator, self.plan = generator, plan

    def planned(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers on the CPU."""
        return low + (high - low) * torch.rand(shape, generator=self.plan)

    def rand(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers."""
        drawn = torch.rand(*shape, generator=self.generator, device=self.generator.device)
        return low + (high - low) * drawn

    def some(self, count: int, share: float) -> Tensor:
        """(count, 1, 1, 1) float32: one with this probability, else zero."""
        return (self.rand(count, 1, 1, 1) < share).float()

    def surface(self, count: int, height: int, width: int, wavelength_px: float) -> Tensor:
        """Smooth random surfaces (count, 1, h, w), about uniform in [0, 1].

        Not kornia's plasma: its wavelengths are the picture's, and a GPU is waited for to draw it.
        """
        rows, cols = (max(2, math.ceil(side / wavelength_px) + 1) for side in (height, width))
        coarse = self.rand(count, 1, rows, cols)
        return resize(coarse, (height, width), interpolation="bicubic", align_corners=True)


def prepare(rgb: Tensor, cells: int, recipe: Recipe, dice: Dice) -> Tensor:
    """Give every cell its canvas's look and a little of its own.

    Args:
        rgb: (canvases * cells, 3, h, w), 0 to 255.

    Returns:
        The same shape in 0..1, for kind "stain" relative to empty glass.
    """
    strength = recipe.augment.strength
    if recipe.augment.kind == "stain":
        stain = RandomStain(strength, cells=cells, generator=dice.generator, p=1.0)
        changed: Tensor = stain(rgb / (recipe.data.glass or 255.0))
        return changed

    def drawn(low: float, high: float, channels: int = 1) -> Tensor:
        found = dice.rand(len(rgb) // cells, channels, low=low, high=high)
        return (strength * found).repeat_interleave(cells, 0)

    gain, gamma = drawn(-0.12, 0.12, 3) + drawn(-0.4, 0.12), drawn(-0.35, 0.35)
    colours = adjust_gamma((rgb / 255).clamp(min=1e-3), gamma.exp(), gain.exp())
    colours = adjust_brightness(colours, drawn(-0.03, 0.06, 3))
    return adjust_saturation_with_gray_subtraction(colours, drawn(-0.7, 0.5).exp())


def scan(canvas: Tensor, labels: Tensor, recipe: Recipe, dice: Dice) -> tuple[Tensor, Tensor]:
    """Prepare and scan a batch of canvases.

    Args:
        canvas: (n, 3, h, w) as `prepare` leaves it. labels: (n, h, w) uint8.

    Returns:
        (n, 3, h, w) float32 in [0, 1] and labels (n, h, w) int64.
    """
    labels = labels.long()
    count, _, height, width = canvas.shape
    if recipe.augment.kind == "stain":
        image = _slide(canvas, labels, recipe, dice)
    else:
        haze = dice.some(count, 0.2) * dice.surface(count, height, width, 400.0) * 0.15
        image = canvas + haze * (0.9 - canvas)
    image = _focus(image, recipe.augment.blur_px, dice)
    grain = dice.some(count, 0.5) * dice.rand(count, 1, 1, 1, high=0.03)
    noise = torch.randn(image.shape, generator=dice.generator, device=image.device)
    image = (image + grain * noise).clamp(0, 1)
    stored = (dice.planned(count) < 0.4).nonzero().flatten()
    if len(stored):
        quality = dice.planned(len(stored), low=35.0, high=92.0)
        place = stored.to(image.device, non_blocking=True)
        image.index_copy_(0, place, jpeg_codec_differentiable(image[place], quality))
    return image.clamp_(0, 1), labels


def _focus(image: Tensor, most_px: float, dice: Dice) -> Tensor:
    """Blur a third of the images; sharpen a quarter of the others by an unsharp mask."""
    count = len(image)
    soft, sharp = dice.planned(count) < 0.35, dice.planned(count) < 0.25
    sigma = torch.where(soft, dice.planned(count, low=0.3, high=most_px), 1.0)
    amount = dice.planned(count, low=0.2, high=1.5)
    share = torch.where(soft, 0.0, 1 + sharp * amount).to(image.device, non_blocking=True)
    blurred = gaussian_blur2d(image, TAPS, sigma[:, None].expand(-1, 2), "replicate")
    return torch.lerp(blurred, image, share[:, None, None, None])


def _slide(image: Tensor, labels: Tensor, recipe: Recipe, dice: Dice) -> Tensor:
    """Add glass, dust, pen, an uneven thickness and the scanner's light; labels change in place."""
    augment = recipe.augment
    count, _, height, width = image.shape
    glass, objects = recipe.label(augment.glass_class), recipe.label(augment.object_class)
    ground = recipe.label(augment.ground_class)
    uneven = dice.some(count, 0.4) * (0.6 * dice.surface(count, height, width, 200.0) - 0.3)
    thickness, density = 1 + uneven, torch.zeros_like(image)
    if glass is not None:
        surface = dice.surface(count, height, width, float(dice.planned(low=60.0, high=350.0)))
        surface = surface + 0.05 * dice.surface(count, height, width, 9.0)
        level = dice.rand(count, 1, 1, 1, low=0.25, high=0.75)
        tissue = torch.sigmoid((surface - level) * dice.rand(count, 1, 1, 1, low=25.0, high=120.0))
        tissue = torch.maximum(tissue, 1 - dice.some(count, 0.35))
        faint = dice.rand(count, 3, 1, 1) * dice.rand(count, 1, 1, 1, high=0.05)
        thickness, density = thickness * tissue, (1 - tissue) * faint
        labels.masked_fill_(tissue[:, 0] < 0.3, glass)
    wavelength_px = float(dice.planned(low=5.0, high=14.0))
    specks = torch.sigmoid(60 * (dice.surface(count, height, width, wavelength_px) - 1.02))
    specks = specks * dice.some(count, 0.3)
    if objects is not None:  # a speck over an object would hide what the label claims
        specks = specks * (labels != objects)[:, None]
    grey = dice.rand(count, 3, 1, 1, low=0.3, high=0.5)
    density = density + grey * dice.rand(count, 1, 1, 1, low=0.8, high=4.0) * specks
    stroke = _pen_stroke(count, height, width, dice)
    colour = constant(PENS, image.device)[(dice.rand(count) * len(PENS)).long()]
    ink = -colour.log()[:, :, None, None] * dice.rand(count, 1, 1, 1, low=0.3)
    density = density + ink * stroke * (0.7 + 0.5 * dice.surface(count, height, width, 14.0))
    if objects is not None and ground is not None:
        labels.masked_fill_((stroke[:, 0] > 0.5) & (labels == objects), ground)
    light = torch.exp(-density) * _illumination(count, height, width, dice)
    return adjust_gamma(image, thickness, light)  # absorbed through the thickness, and by the dirt


def _pen_stroke(count: int, height: int, width: int, dice: Dice) -> Tensor:
    """Where a felt pen went, (count, 1, h, w) in 0..1; over one canvas in seven."""
    angle = dice.rand(count, 1, 1, 1, high=math.pi)
    offset = dice.rand(count, 1, 1, 1, low=-0.35, high=0.35) * (height + width) / 2
    half_px = dice.rand(count, 1, 1, 1, low=8.0, high=90.0)
    device = angle.device
    y = torch.arange(height, device=device)[:, None] - height / 2
    x = torch.arange(width, device=device) - width / 2
    bend = 25 * (dice.surface(count, height, width, 120.0) - 0.5)
    distance = (angle.cos() * x + angle.sin() * y - offset + bend).abs()
    return torch.sigmoid((half_px - distance) * 0.7) * dice.some(count, 0.15)


def _illumination(count: int, height: int, width: int, dice: Dice) -> Tensor:
    """The intensity of empty glass (count, 3, h, w): exposure, colour cast, shading."""
    dim = dice.some(count, 0.3)  # the darkest scanners give 0.55
    white = dim * dice.rand(count, 1, 1, 1, low=0.54, high=0.72)
    white = white + (1 - dim) * dice.rand(count, 1, 1, 1, low=0.8, high=0.99)
    cast = dice.rand(count, 3, 1, 1, low=0.96, high=1.03)
    shade = dice.some(count, 0.3) * 0.07 * (1 - dice.surface(count, height, width, 300.0))
    return white * cast * (1 - shade)
