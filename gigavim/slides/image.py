"""Plain PNG, JPEG and BMP, by Pillow: decoded once, whole, within a stated limit."""

import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from gigavim.errors import CorruptSlideError, SlideError, UnsupportedSlideError
from gigavim.frames import Bounds
from gigavim.slides.base import RGB, WHITE, Level, OpenOptions, Slide
from gigavim.slides.chatter import silenced
from gigavim.slides.mpp import choose_mpp, from_resolution
from gigavim.slides.pixels import PixelRule, SampleLayout, choose_rule

MAX_IMAGE_PX = 1 << 28
"""Pixels of a plain image that may be decoded (268 million; 805 MB as RGB)."""

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "JPEG2000")

DECODED_AS = {
    "1": "L",
    "L": "L",
    "LA": "RGBA",
    "La": "RGBA",
    "P": "RGBA",
    "PA": "RGBA",
    "RGB": "RGB",
    "RGBA": "RGBA",
    "RGBX": "RGB",
    "CMYK": "RGB",
    "YCbCr": "RGB",
}
"""Pillow's modes, and the mode of the same picture in 8-bit samples."""


class ImageSlide(Slide):
    """An image that is held in memory.

    Raises:
        CorruptSlideError: if it cannot be decoded.
        UnsupportedSlideError: if it has more than MAX_IMAGE_PX pixels.
    """

    reader = "image"

    def __init__(self, path: Path, options: OpenOptions | None = None) -> None:
        self.path = path
        self.options = options or OpenOptions()
        self.background_rgb = WHITE
        self.georeference = None
        try:
            with silenced(), warnings.catch_warnings():
                # The limit is our own, checked before anything is decoded.
                # What Pillow warns about, damaged tags, ends in an error or does not matter.
                warnings.simplefilter("ignore")
                self._decode()
        except Image.DecompressionBombError as error:
            raise _too_large(path, str(error)) from error
        except SlideError:
            raise
        # Pillow's decoders raise errors of many unrelated kinds on damaged data.
        except Exception as error:
            raise CorruptSlideError(
                f"{path}: cannot be decoded: {error}; copy or export it again"
            ) from error

    def _decode(self) -> None:
        with Image.open(self.path, formats=FORMATS) as image:
            width, height = image.size
            if width < 1 or height < 1:
                raise CorruptSlideError(
                    f"{self.path}: claims {width} x {height} px; export it again"
                )
            if width * height > MAX_IMAGE_PX:
                raise _too_large(self.path, f"{width} x {height} px")
            form, mode, dpi = image.format or "image", image.mode, image.info.get("dpi")
            icc = "icc_profile" in image.info
            raw, layout = _samples(self.path, image)
        rule = choose_rule(
            self.path, layout, self.options.channels, lambda: raw.reshape(-1, raw.shape[-1])
        )
        self._pixels = self._apply(rule, raw)
        self.levels = (Level(width, height, 1.0, 1.0, width, height),)
        self.bounds = Bounds(0, 0, width, height)
        claim = from_resolution(float(dpi[0]), float(dpi[1]), "inch") if dpi else None
        self.mpp = choose_mpp(self.path, [claim], user=self.options.mpp)
        self.description = {"format": f"{form} ({mode})", "pixels": rule.text}
        if icc:
            self.description["icc"] = "present, not applied"

    def _apply(self, rule: PixelRule, raw: npt.NDArray[np.generic]) -> RGB:
        """Apply the rule in strips: compositing needs several times a strip's memory."""
        strips = [
            rule.apply(raw[y : y + 512], self.background_rgb) for y in range(0, len(raw), 512)
        ]
        return np.concatenate(strips)

    def close(self) -> None:
        """Forget the pixels."""
        self._pixels = np.empty((0, 0, 3), np.uint8)

    def _read_inside(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        return self._pixels[y : y + height, x : x + width].copy()


def _samples(path: Path, image: Image.Image) -> tuple[npt.NDArray[np.generic], SampleLayout]:
    """Return (h, w, bands) and what they are."""
    mode = image.mode
    if mode == "P" and "transparency" not in image.info:
        image = image.convert("RGB")
    elif mode in DECODED_AS:
        image = image if mode == DECODED_AS[mode] else image.convert(DECODED_AS[mode])
    elif not mode.startswith("I;16"):
        raise UnsupportedSlideError(
            f"{path}: has samples of Pillow's mode {mode}, a measurement and not a picture; "
            "convert it to 8 bits first"
        )
    raw = np.asarray(image)
    raw = raw.astype(raw.dtype.newbyteorder("="), copy=False)
    raw = raw[..., None] if raw.ndim == 2 else raw
    bands = raw.shape[-1]
    return raw, SampleLayout(
        dtype=raw.dtype,
        bands=bands,
        photometric="rgb" if bands > 1 else "grey",
        alpha_band=3 if bands == 4 else None,
    )


def _too_large(path: Path, what: str) -> UnsupportedSlideError:
    return UnsupportedSlideError(
        f"{path}: {what}: a plain image is decoded whole, which is limited to {MAX_IMAGE_PX:,} px; "
        "save it as a tiled TIFF (vips tiffsave --tile, gdal_translate -of COG)"
    )
