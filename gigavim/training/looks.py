"""What stains, scanners and slide preparation do to a picture, at random and in batches.

Stained tissue is handled as optical density over the glass, -log(I / I_glass), in which stains add
up (Ruifrok and Johnston 2001); `scan` turns density into the picture that a scanner would store.
Aerial pictures are handled as colours.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gigavim.training.recipe import Recipe

STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]).t()
"""(3, 3): columns are the density of haematoxylin, eosin and a residual in red, green and blue."""
PENS = torch.tensor(
    [[0.10, 0.14, 0.30], [0.05, 0.30, 0.16], [0.08, 0.08, 0.09], [0.45, 0.06, 0.10]]
)
UNMIXING = torch.linalg.inv(STAINS)
TAPS = 9


@cache
def constant(values: Tensor | tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on a device, sent there once: sending them waits for all that is queued there."""
    return (values if isinstance(values, Tensor) else torch.tensor(values)).to(device)


class Dice:
    """Random numbers on a device, and a few that the CPU has to know.

    Args:
        generator: on the device.
        plan: on the CPU.
    """

    def __init__(self, generator: Generator, plan: Generator) -> None:
        self.generator, self.plan = generator, plan

    def number(self, low: float, high: float) -> float:
        """A uniform number for the CPU."""
        return low + (high - low) * float(torch.rand((), generator=self.plan))

    def rand(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers."""
        drawn = torch.rand(*shape, generator=self.generator, device=self.generator.device)
        return low + (high - low) * drawn

    def some(self, count: int, share: float) -> Tensor:
        """(count, 1, 1, 1) float32: one with this probability, else zero."""
        return (self.rand(count, 1, 1, 1) < share).float()

    def surface(self, count: int, height: int, width: int, wavelength_px: float) -> Tensor:
        """Smooth random surfaces (count, 1, h, w), about uniform in [0, 1]."""
        rows, cols = (max(2, math.ceil(side / wavelength_px) + 1) for side in (height, width))
        coarse = self.rand(count, 1, rows, cols)
        return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)


def prepare(rgb: Tensor, cells: int, recipe: Recipe, dice: Dice) -> Tensor:
    """Give every cell its canvas's look and a little of its own.

    Args:
        rgb: (canvases * cells, 3, h, w), 0 to 255.

    Returns:
        Densities for kind "stain", colours in 0..1 for "colour"; same shape.
    """
    strength = recipe.augment.strength
    canvases = len(rgb) // cells
    if recipe.augment.kind == "stain":
        glass = recipe.data.glass or 255.0
        density = -torch.log(rgb.clamp(1.0, glass) / glass)
        look = random_stain(canvases, strength, dice).repeat_interleave(cells, 0)
        own = random_stain(len(rgb), 0.3 * strength, dice)
        mixed = (own @ look) @ density.flatten(2)
        return mixed.clamp_(-0.05, 4.0).view_as(density)
    colours = rgb / 255
    gain = (strength * dice.rand(canvases, 3, 1, 1, low=-0.12, high=0.12)).exp()
    gain = gain * (strength * dice.rand(canvases, 1, 1, 1, low=-0.4, high=0.12)).exp()
    gamma = (strength * dice.rand(canvases, 1, 1, 1, low=-0.35, high=0.35)).exp()
    lift = strength * dice.rand(canvases, 3, 1, 1, low=-0.03, high=0.06)
    saturation = (strength * dice.rand(canvases, 1, 1, 1, low=-0.7, high=0.5)).exp()
    per_cell = [t.repeat_interleave(cells, 0) for t in (gain, gamma, lift, saturation)]
    colours = per_cell[0] * colours.clamp(min=1e-3) ** per_cell[1] + per_cell[2]
    grey = colours.mean(1, keepdim=True)
    return grey + per_cell[3] * (colours - grey)


def random_stain(count: int, strength: float, dice: Dice) -> Tensor:
    """Draw (count, 3, 3) maps of densities: other stain strengths and slightly other colours."""
    device = dice.generator.device
    stains = constant(STAINS, device)
    gain = (strength * dice.rand(count, 1, 3, low=-0.45, high=0.45)).exp()
    colours = stains * (strength * dice.rand(count, 3, 3, low=-0.15, high=0.15)).exp()
    colours = colours / colours.norm(dim=1, keepdim=True) * stains.norm(dim=0)
    look: Tensor = (colours * gain) @ constant(UNMIXING, device)
    return look


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
        canvas = _slide(canvas, labels, recipe, dice)
        image = torch.exp(-canvas) * _illumination(count, height, width, dice)
    else:
        haze = dice.some(count, 0.2) * dice.surface(count, height, width, 400.0) * 0.15
        image = canvas + haze * (0.9 - canvas)
    sigma = dice.rand(count, low=0.3, high=recipe.augment.blur_px)
    soft, sharp = dice.some(count, 0.35), dice.some(count, 0.25)
    amount = dice.rand(count, 1, 1, 1, low=0.2, high=1.5) * sharp * (1 - soft)
    blurred = _blur(image, torch.where(soft.flatten() > 0, sigma, 1.0))
    image = soft * blurred + (1 - soft) * (image + amount * (image - blurred))
    grain = dice.some(count, 0.5) * dice.rand(count, 1, 1, 1, high=0.03)
    noise = torch.randn(image.shape, generator=dice.generator, device=image.device)
    image = (image + grain * noise).clamp(0, 1)
    compressed = _jpeg(image, dice.rand(count, low=35.0, high=92.0))
    return torch.where(dice.some(count, 0.4) > 0, compressed, image), labels


def _slide(density: Tensor, labels: Tensor, recipe: Recipe, dice: Dice) -> Tensor:
    """Add glass, dust, pen and an uneven thickness; labels are changed in place."""
    augment = recipe.augment
    count, _, height, width = density.shape
    glass, objects = recipe.label(augment.glass_class), recipe.label(augment.object_class)
    ground = recipe.label(augment.ground_class)
    if glass is not None:
        surface = dice.surface(count, height, width, dice.number(60.0, 350.0))
        surface = surface + 0.05 * dice.surface(count, height, width, 9.0)
        level = dice.rand(count, 1, 1, 1, low=0.25, high=0.75)
        tissue = torch.sigmoid((surface - level) * dice.rand(count, 1, 1, 1, low=25.0, high=120.0))
        tissue = torch.maximum(tissue, 1 - dice.some(count, 0.35))
        faint = dice.rand(count, 3, 1, 1) * dice.rand(count, 1, 1, 1, high=0.05)
        density = density * tissue + (1 - tissue) * faint
        labels[tissue[:, 0] < 0.3] = glass
    thickness = 0.7 + 0.6 * dice.surface(count, height, width, 200.0)
    density = torch.where(dice.some(count, 0.4) > 0, density * thickness, density)
    specks = torch.sigmoid(
        60 * (dice.surface(count, height, width, dice.number(5.0, 14.0)) - 1.02)
    ) * dice.some(count, 0.3)
    if objects is not None:  # a speck over an object would hide what the label claims
        specks = specks * (labels != objects)[:, None]
    grey = dice.rand(count, 3, 1, 1, low=0.3, high=0.5) * dice.rand(
        count, 1, 1, 1, low=0.8, high=4.0
    )
    density = density + grey * specks
    stroke = _pen_stroke(count, height, width, dice)
    colour = constant(PENS, density.device)[(dice.rand(count) * len(PENS)).long()]
    ink = -colour.log()[:, :, None, None] * dice.rand(count, 1, 1, 1, low=0.3)
    texture = 0.7 + 0.5 * dice.surface(count, height, width, 14.0)
    density = density + ink * stroke * texture
    if objects is not None and ground is not None:
        labels[(stroke[:, 0] > 0.5) & (labels == objects)] = ground
    return density


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


def _blur(image: Tensor, sigma_px: Tensor) -> Tensor:
    """Blur each image of (n, 3, h, w) by its own Gaussian, sigma at most about 2."""
    height, width = image.shape[2:]
    reach = TAPS // 2
    distance = torch.arange(-reach, reach + 1, device=image.device)
    taps = torch.exp(-0.5 * (distance / sigma_px[:, None]) ** 2)
    taps = (taps / taps.sum(1, keepdim=True))[:, None, None, None]  # (n, 1, 1, 1, 7)
    padded = F.pad(image, (reach,) * 4, mode="replicate")
    rows = torch.zeros_like(padded[:, :, :height])
    for k in range(TAPS):
        rows += taps[..., k] * padded[:, :, k : k + height]
    found = torch.zeros_like(image)
    for k in range(TAPS):
        found += taps[..., k] * rows[..., k : k + width]
    return found


_LUMA = torch.tensor(  # the standard JPEG luminance table (ITU-T T.81, table K.1)
    [
        [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56], [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
    ]
).float()  # fmt: skip
_YCC = torch.tensor(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
)
_RGB = torch.linalg.inv(_YCC)


def _jpeg(image: Tensor, quality: Tensor) -> Tensor:
    """What JPEG at a quality (n,) leaves of images (n, 3, h, w): blocks of rounded cosines."""
    height, width = image.shape[2:]
    device = image.device
    frequency, place = torch.arange(8.0, device=device)[:, None], torch.arange(8.0, device=device)
    cosines = torch.cos((2 * place + 1) * frequency * math.pi / 16) / 2
    cosines[0] /= math.sqrt(2)
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality) / 100
    chroma = torch.full((8, 8), 80.0, device=device)
    tables = torch.stack((constant(_LUMA, device), chroma, chroma))
    steps = (tables * scale[:, None, None, None]).clamp(min=1)[:, :, None, None]
    colours = torch.einsum("ck,nkhw->nchw", constant(_YCC, device), image * 255 - 128)
    padded = F.pad(colours, (0, -width % 8, 0, -height % 8), mode="replicate")
    blocks = padded.unfold(2, 8, 8).unfold(3, 8, 8)  # (n, 3, rows, cols, 8, 8)
    found = cosines @ blocks @ cosines.T
    rounded = (found / steps).round() * steps
    back = (cosines.T @ rounded @ cosines).permute(0, 1, 2, 4, 3, 5).reshape(padded.shape)
    back = torch.einsum("ck,nkhw->nchw", constant(_RGB, device), back)
    return ((back[..., :height, :width] + 128) / 255).clamp(0, 1)
