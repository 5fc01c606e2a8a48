"""What stains, scanners and slide preparation do to a picture, at random.

Colours are handled as optical density over the glass, -log(I / I_glass), in which stains add up
(Ruifrok and Johnston 2001); `finish` turns density into the picture that a scanner would store.
"""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from gigavim.training.data import BACKGROUND, NUCLEI, TISSUE

STAINS = torch.tensor(
    [[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], dtype=torch.float32
).t()
"""(3, 3): columns are the density of haematoxylin, eosin and a residual in red, green and blue."""
UNMIX = torch.linalg.inv(STAINS)
PENS = torch.tensor(
    [[0.10, 0.14, 0.30], [0.05, 0.30, 0.16], [0.08, 0.08, 0.09], [0.45, 0.06, 0.10]]
)


def rand(*shape: int, generator: Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Draw uniform numbers."""
    return low + (high - low) * torch.rand(*shape, generator=generator)


def random_stain(generator: Generator, strength: float = 1.0) -> Tensor:
    """Draw a (3, 3) map of densities: other stain strengths and slightly other stain colours."""
    gain = torch.exp(strength * rand(3, generator=generator, low=-0.45, high=0.45))
    colours = STAINS * torch.exp(strength * rand(3, 3, generator=generator, low=-0.15, high=0.15))
    colours = colours / colours.norm(dim=0) * STAINS.norm(dim=0)
    look: Tensor = colours @ torch.diag(gain) @ UNMIX
    return look


def stain(density: Tensor, look: Tensor, generator: Generator) -> Tensor:
    """Stain a field's density (3, h, w) with the look of its slide and a little of its own."""
    own = random_stain(generator, strength=0.3) @ look
    return (own @ density.flatten(1)).clamp_(-0.05, 4.0).view_as(density)


def smooth_noise(height: int, width: int, wavelength_px: float, generator: Generator) -> Tensor:
    """A smooth random surface (height, width), about uniform in [0, 1], of a given wavelength."""
    rows, cols = (max(2, math.ceil(side / wavelength_px) + 1) for side in (height, width))
    coarse = torch.rand(1, 1, rows, cols, generator=generator)
    size = (height, width)
    return F.interpolate(coarse, size, mode="bicubic", align_corners=True)[0, 0]


def finish(density: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Add glass, dust and pen to a canvas of densities (3, h, w), then scan it.

    Returns:
        (3, h, w) float32 in [0, 1] and the labels (h, w).
    """
    _, height, width = density.shape
    draw = torch.rand(8, generator=generator).tolist()
    if draw[0] < 0.35:
        _lay_glass(density, labels, generator)
    if draw[1] < 0.3:
        _drop_dust(density, labels, generator)
    if draw[2] < 0.15:
        _draw_pen(density, labels, generator)
    if draw[3] < 0.4:  # thickness of the section
        surface = smooth_noise(height, width, 200.0, generator)
        density = density * (0.7 + 0.6 * surface)
    image = torch.exp(-density) * _illumination(height, width, generator)
    if draw[4] < 0.35:
        image = _blur(image, float(rand(1, generator=generator, low=0.3, high=1.1)))
    elif draw[4] < 0.6:  # scanners sharpen
        amount = float(rand(1, generator=generator, low=0.2, high=1.5))
        image = image + amount * (image - _blur(image, 1.0))
    if draw[5] < 0.5:
        grain = float(rand(1, generator=generator, high=0.03))
        image = image + grain * torch.randn(image.shape, generator=generator)
    image = image.clamp(0, 1)
    if draw[6] < 0.4:
        image = _compress(image, int(rand(1, generator=generator, low=35, high=92)))
    return image, labels


def _illumination(height: int, width: int, generator: Generator) -> Tensor:
    """The intensity of empty glass (3, h, w) or (3, 1, 1): exposure, colour cast, shading."""
    dim = float(torch.rand((), generator=generator)) < 0.3  # the darkest scanners give 0.55
    low, high = (0.54, 0.72) if dim else (0.8, 0.99)
    white = rand(1, generator=generator, low=low, high=high)
    cast = rand(3, generator=generator, low=0.96, high=1.03)
    light = (white * cast)[:, None, None]
    if float(torch.rand((), generator=generator)) < 0.3:
        light = light * (0.93 + 0.07 * smooth_noise(height, width, 300.0, generator))
    return light


def _lay_glass(density: Tensor, labels: Tensor, generator: Generator) -> None:
    _, height, width = density.shape
    wavelength_px = float(rand(1, generator=generator, low=60.0, high=350.0))
    level = float(rand(1, generator=generator, low=0.25, high=0.75))
    surface = smooth_noise(height, width, wavelength_px, generator)
    surface = surface + 0.05 * smooth_noise(height, width, 9.0, generator)
    steepness = float(rand(1, generator=generator, low=25.0, high=120.0))
    tissue = torch.sigmoid((surface - level) * steepness)
    density.mul_(tissue)
    faint = float(rand(1, generator=generator, high=0.05))
    density.add_((1 - tissue) * faint * rand(3, 1, 1, generator=generator))
    labels[tissue < 0.3] = BACKGROUND


def _drop_dust(density: Tensor, labels: Tensor, generator: Generator) -> None:
    """Dark specks of 1 to 6 px: background on glass, otherwise what they lie on."""
    _, height, width = density.shape
    for _ in range(1 + height * width // 30000):
        y, x = (
            int(rand(1, generator=generator, high=height)),
            int(rand(1, generator=generator, high=width)),
        )
        radius = float(rand(1, generator=generator, low=0.8, high=6.0))
        reach = math.ceil(2 * radius)
        rows = torch.arange(max(0, y - reach), min(height, y + reach + 1))
        cols = torch.arange(max(0, x - reach), min(width, x + reach + 1))
        if not len(rows) or not len(cols):
            continue
        here = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1))
        aspect = float(rand(1, generator=generator, low=0.5, high=2.0))
        distance = ((rows[:, None] - y) ** 2 * aspect + (cols[None] - x) ** 2 / aspect).sqrt()
        speck = torch.sigmoid((radius - distance) * 2)
        if (labels[here] == NUCLEI).any():
            continue  # a speck over a nucleus would hide what the label claims
        grey = rand(3, 1, 1, generator=generator, low=0.3, high=0.5)
        strength = float(rand(1, generator=generator, low=0.4, high=3.0))
        density[:, *here] += grey * strength * speck


def _draw_pen(density: Tensor, labels: Tensor, generator: Generator) -> None:
    """A felt pen stroke: background on glass, tissue where it hides nuclei."""
    _, height, width = density.shape
    angle = float(rand(1, generator=generator, high=math.pi))
    offset = float(rand(1, generator=generator, low=-0.35, high=0.35)) * (height + width) / 2
    half_px = float(rand(1, generator=generator, low=8.0, high=90.0))
    y = torch.arange(height)[:, None] - height / 2
    x = torch.arange(width)[None] - width / 2
    bend = 25 * (smooth_noise(height, width, 120.0, generator) - 0.5)
    distance = (math.cos(angle) * x + math.sin(angle) * y - offset + bend).abs()
    stroke = torch.sigmoid((half_px - distance) * 0.7)
    colour = PENS[int(torch.randint(len(PENS), (), generator=generator))]
    strength = float(rand(1, generator=generator, low=0.3, high=1.0))
    texture = 0.7 + 0.5 * smooth_noise(height, width, 14.0, generator)
    density += -torch.log(colour)[:, None, None] * strength * stroke * texture
    labels[(stroke > 0.5) & (labels == NUCLEI)] = TISSUE


def _blur(image: Tensor, sigma_px: float) -> Tensor:
    reach = 3
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma_px) ** 2)
    taps = (taps / taps.sum()).repeat(3, 1)
    padded = F.pad(image[None], (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, taps[:, None, None], groups=3)
    return F.conv2d(rows, taps[:, None, :, None], groups=3)[0]


def _compress(image: Tensor, quality: int) -> Tensor:
    """Store as JPEG and read back."""
    pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    decoded = np.array(Image.open(buffer))
    return torch.from_numpy(decoded).permute(2, 0, 1).float() / 255
