"""How raw samples become 8-bit RGB: one stated rule per slide, never per tile.

- 8-bit RGB is left as it is; one band of grey is given to all three colours; a palette is
  expanded.
- Alpha is composited on the slide's background colour.
- Red, green, blue and a fourth band that is no alpha (near infrared): the first three. What the
  fourth is, its values tell where the file does not, or wrongly.
- 10- to 16-bit colour or grey is scaled linearly from black = 0 to white = 2^bits - 1, where bits
  is what the file states, else the smallest of 8, 10, 12, 14, 16 that holds the brightest value of
  a fixed sample of the whole slide. All colours share it, so that the white balance stays.
- Bilevel is black and white.
- Float, signed and wider integers are measurements and not pictures, and are refused; so are
  channels that no one calls red, green and blue, until three of them are chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from gigavim.errors import UnsupportedSlideError

Raw = npt.NDArray[np.generic]
RGB = npt.NDArray[np.uint8]

BIT_DEPTHS = (8, 10, 12, 14, 16)

MOSTLY = 0.5
"""An alpha band of which more than this share is neither clear nor opaque holds something else."""


class NotAPictureError(UnsupportedSlideError):
    """The samples are well understood, and no picture: another reader would only hide that."""


COLOUR_NAMES = (
    ("red", "green", "blue"),
    ("r", "g", "b"),
)


@dataclass(frozen=True, slots=True)
class SampleLayout:
    """What a file says of its samples."""

    dtype: np.dtype[np.generic]
    bands: int
    photometric: Literal["rgb", "grey", "inverted", "palette"]
    alpha_band: int | None = None
    premultiplied: bool = False
    names: tuple[str, ...] = ()
    """Names of the bands, where the file gives any."""
    are_channels: bool = False
    """Whether the bands are a microscope's channels: no three are a picture by themselves."""
    significant_bits: int | None = None
    palette: RGB | None = None
    """(entries, 3)."""
    nodata: float | None = None


@dataclass(frozen=True, slots=True)
class PixelRule:
    """Turns (h, w, bands) raw samples into (h, w, 3) uint8."""

    text: str
    bands: tuple[int, ...]
    alpha_band: int | None = None
    premultiplied: bool = False
    alpha_max: int = 255
    table: RGB | None = field(default=None, repr=False)
    """Sample value to 8 bits, (2^n,) or, of a palette, (entries, 3)."""
    nodata: float | None = None

    @property
    def keeps_rgb(self) -> bool:
        """Whether 8-bit samples of three bands come out as they are."""
        plain = self.alpha_band is None and self.table is None and self.nodata is None
        return plain and self.bands == (0, 1, 2)

    def apply(self, raw: Raw, background_rgb: tuple[int, int, int]) -> RGB:
        """Return (h, w, 3) uint8 of raw (h, w, bands)."""
        rgb = self._colours(raw)
        if self.alpha_band is not None:
            alpha = raw[..., self.alpha_band].astype(np.float32) / np.float32(self.alpha_max)
            rgb = composite(rgb, alpha, background_rgb, premultiplied=self.premultiplied)
        if self.nodata is not None:
            empty = (raw[..., list(self.bands)] == self.nodata).all(axis=-1)
            if empty.any():
                rgb = rgb.copy()
                rgb[empty] = background_rgb
        return rgb

    def _colours(self, raw: Raw) -> RGB:
        if raw.shape[-1] == 3 and self.bands == (0, 1, 2):
            chosen = raw
        elif len(self.bands) == 1:
            chosen = raw[..., self.bands[0]]
        else:
            chosen = raw[..., list(self.bands)]
        if self.table is not None:
            index = chosen.astype(np.uint16, copy=False)
            chosen = self.table[np.minimum(index, len(self.table) - 1)]
        if chosen.ndim == 2:
            chosen = np.repeat(chosen[..., None], 3, axis=2)
        return np.ascontiguousarray(chosen, dtype=np.uint8)


def composite(
    rgb: RGB,
    alpha: npt.NDArray[np.float32],
    background_rgb: tuple[int, int, int],
    *,
    premultiplied: bool = False,
) -> RGB:
    """Lay (h, w, 3) colours with (h, w) alpha in 0..1 over a background colour."""
    alpha = np.clip(alpha, 0, 1)[..., None]
    background = np.asarray(background_rgb, np.float32)
    colour = rgb.astype(np.float32)
    mixed = (colour if premultiplied else colour * alpha) + background * (1 - alpha)
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def choose_rule(
    path: Path,
    layout: SampleLayout,
    channels: tuple[int, int, int] | None,
    sample: Callable[[], Raw],
) -> PixelRule:
    """Choose the rule for a slide.

    Args:
        path: the file, for messages.
        layout: what the file says of its samples.
        channels: three bands that the user wants as red, green, blue.
        sample: gives raw samples (n, bands) of places all over the slide; called where needed.

    Raises:
        NotAPictureError: if the samples are no picture.
    """
    refuse_measurements(path, layout)
    alpha_band = layout.alpha_band
    if alpha_band is not None and not _is_alpha(sample()[..., alpha_band]):
        alpha_band = None
    if alpha_band is None and channels is None and _is_unnamed_mask(layout, sample):
        alpha_band = 3
    bands, text = _choose_bands(path, layout, channels, alpha_band)
    table, depth_text = _table(layout, bands, sample)
    alpha_max = 255
    if alpha_band is not None:
        text += ", alpha composited on the background"
        if layout.dtype.itemsize > 1:
            alpha_max = (1 << _bits(sample()[..., alpha_band])) - 1
        elif layout.dtype == np.bool_:
            alpha_max = 1
    if layout.nodata is not None:
        text += f", no-data value {layout.nodata:g} shown as background"
    return PixelRule(
        text=f"{depth_text}{text}",
        bands=bands,
        alpha_band=alpha_band,
        premultiplied=layout.premultiplied,
        alpha_max=alpha_max,
        table=table,
        nodata=layout.nodata,
    )


def refuse_measurements(path: Path, layout: SampleLayout) -> None:
    """Raise NotAPictureError for samples that are no brightness."""
    kind, size = layout.dtype.kind, layout.dtype.itemsize
    if kind == "b" or (kind == "u" and size <= 2):
        return
    names = {"f": "float", "i": "signed integer", "u": "integer", "c": "complex"}
    what = f"{size * 8}-bit {names.get(kind, 'unknown')}"
    bands = "one band" if layout.bands == 1 else f"{layout.bands} bands"
    raise NotAPictureError(
        f"{path}: {bands} of {what} samples: a measurement (such as an elevation model), not a "
        "picture; convert it to 8 bits first, for example with gdal_translate -ot Byte -scale"
    )


def _choose_bands(
    path: Path,
    layout: SampleLayout,
    channels: tuple[int, int, int] | None,
    alpha_band: int | None,
) -> tuple[tuple[int, ...], str]:
    colours = [band for band in range(layout.bands) if band != alpha_band]
    if channels is not None:
        wrong = [band for band in channels if not 0 <= band < layout.bands]
        if wrong:
            raise NotAPictureError(
                f"{path}: has no channel {wrong[0]}; its channels are 0 to {layout.bands - 1}"
                f"{_named(layout)}"
            )
        return channels, "channels {}, {}, {} as red, green, blue".format(*channels)
    if layout.photometric == "palette":
        return (0,), "palette expanded"
    if len(colours) == 1:
        inverted = ", inverted" if layout.photometric == "inverted" else ""
        return (colours[0],), f"grey{inverted} given to red, green and blue"
    names = tuple(name.strip().lower() for name in layout.names)
    for wanted in COLOUR_NAMES:
        if all(name in names for name in wanted):
            chosen = tuple(names.index(name) for name in wanted)
            rest = len(colours) - 3
            return chosen, "RGB" if not rest else f"red, green and blue of {layout.bands} bands"
    if not layout.are_channels and len(colours) == 3:
        return tuple(colours), "RGB"
    if not layout.are_channels and len(colours) == 4:
        return tuple(colours[:3]), (
            "first three of four bands as RGB; the fourth (near infrared?) left out"
        )
    example = ",".join(str(min(band, layout.bands - 1)) for band in range(3))
    raise NotAPictureError(
        f"{path}: holds {layout.bands} channels{_named(layout)} and does not say which are red, "
        f"green and blue; choose three, for example --channels {example} (channels=({example}))"
    )


def _named(layout: SampleLayout) -> str:
    return f" ({', '.join(layout.names)})" if any(layout.names) else ""


def _table(
    layout: SampleLayout, bands: tuple[int, ...], sample: Callable[[], Raw]
) -> tuple[RGB | None, str]:
    """Return the lookup table from sample to 8 bits, and the start of the rule's text."""
    if layout.photometric == "palette":
        return layout.palette, ""
    if layout.dtype == np.bool_:
        levels = np.array([0, 255], np.uint8)
        return levels[::-1] if layout.photometric == "inverted" else levels, "bilevel "
    text, bits, size = "", 8, 256
    if layout.dtype.itemsize == 2:
        size = 1 << 16
        bits = layout.significant_bits or _bits(sample()[..., list(bands)])
        text = f"16-bit samples scaled from 0..{(1 << bits) - 1} to 0..255, "
    elif layout.significant_bits is not None and layout.significant_bits < 8:
        bits = layout.significant_bits
        text = f"{bits}-bit samples scaled to 0..255, "
    elif layout.photometric != "inverted":
        return None, ""
    white = (1 << bits) - 1
    values = np.minimum(np.arange(size, dtype=np.float64), white)
    table = np.rint(values * (255 / white)).astype(np.uint8)
    return 255 - table if layout.photometric == "inverted" else table, text


def _bits(values: Raw) -> int:
    brightest = int(values.max()) if values.size else 0
    return next(bits for bits in BIT_DEPTHS if brightest < 1 << bits)


def _is_unnamed_mask(layout: SampleLayout, sample: Callable[[], Raw]) -> bool:
    """Tell a fourth band of nothing but 0 and the largest value, which is alpha unsaid."""
    if layout.bands != 4 or layout.are_channels or layout.alpha_band is not None:
        return False
    values, opaque = sample()[..., 3], np.iinfo(np.uint8).max
    if layout.dtype.itemsize == 2:
        opaque = np.iinfo(np.uint16).max
    return bool(values.size and ((values == 0) | (values == opaque)).all())


def _is_alpha(values: Raw) -> bool:
    """Tell alpha from a near-infrared band that calls itself alpha."""
    if values.size == 0 or values.dtype == np.bool_:
        return True
    opaque = values.max()
    between = (values != 0) & (values != opaque)
    return bool(between.mean() <= MOSTLY)
