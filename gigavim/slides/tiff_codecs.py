"""What turns the bytes of a TIFF's tiles and strips into samples."""

from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

from gigavim.errors import UnsupportedSlideError
from gigavim.slides.tiff_structure import Plane

Samples = npt.NDArray[np.generic]

APERIO_YCBCR = 33003
"""Aperio's JPEG 2000 of Y, Cb and Cr, said by the compression and not by the photometric tag."""

# The red, green and blue of a full-range Y, Cb, Cr: JFIF 1.02, section 7.
_RED_OF_CR, _GREEN_OF_CB, _GREEN_OF_CR, _BLUE_OF_CB = 1.402, 0.344136, 0.714136, 1.772

_SIZ = b"\xff\x4f\xff\x51"
"""Start of a JPEG 2000 codestream and its size marker: ISO/IEC 15444-1, A.4.1 and A.5.1."""


def tile_decoder(
    plane: Plane, raw_dtype: np.dtype[np.generic] | None, bands: int
) -> Callable[[bytes, int], Samples]:
    """Return what turns a segment's bytes and index into (h, w, bands).

    Raises:
        UnsupportedSlideError: if its coding is not read here.
    """
    page: Any = plane.page
    if raw_dtype is not None:
        return _plain(int(page.imagewidth), bands, raw_dtype)
    simple = jpeg_decoder(page)
    if page.compression == APERIO_YCBCR and bands == 3:
        simple = aperio_ycbcr
    if simple is not None:
        decode = simple
        return lambda data, index: decode(data)
    subsampled_codecs = (6, 7, 34892, 33007)
    if page.compression in (33003, 33004):
        raise UnsupportedSlideError(
            f"{page.parent.filehandle.path}: has JPEG 2000 tiles of unknown colours; convert it "
            "to RGB"
        )
    if page.is_subsampled and page.compression not in subsampled_codecs:
        raise UnsupportedSlideError(
            f"{page.parent.filehandle.path}: has subsampled colours without JPEG; convert it to RGB"
        )
    tables, header, decode_page = page.jpegtables, page.jpegheader, page.decode

    def general(data: bytes, index: int) -> Samples:
        decoded, _, _ = decode_page(
            data, plane.first_index + index, jpegtables=tables, jpegheader=header
        )
        return decoded[0]  # type: ignore[no-any-return]

    return general


def jpeg_decoder(page: Any) -> Callable[..., Samples] | None:
    """Return what decodes an ordinary JPEG tile of three colours, or None for other pages.

    It takes the tile's bytes and, if the result has a place, that place: contiguous uint8 of
    exactly the tile's shape, or the codec's ValueError says that it is not.
    """
    colours = page.photometric in (2, 6) and page.samplesperpixel == 3 and page.planarconfig == 1
    ordinary = page.compression == 7 and page.dtype == np.uint8 and page.jpegheader is None
    if not (colours and ordinary):
        return None
    tables = page.jpegtables
    # The tag, not the stream, says how colours are coded: Aperio's RGB has no marker of it.
    colourspace, outcolourspace = tifffile.tifffile.jpeg_decode_colorspace(
        page.photometric, page.planarconfig, page.extrasamples, page.is_jfif
    )

    def jpeg(data: Any, out: Samples | None = None) -> Samples:
        decoded: Samples = imagecodecs.jpeg8_decode(
            data, tables=tables, colorspace=colourspace, outcolorspace=outcolourspace, out=out
        )
        return decoded

    return jpeg


def aperio_ycbcr(data: bytes) -> Samples:
    """Return (h, w, 3) RGB of a JPEG 2000 codestream of Y, Cb and Cr."""
    if not data.startswith(_SIZ):
        raise ValueError("it is no JPEG 2000 codestream")  # a boxed one may name its colours
    decoded: Samples = imagecodecs.jpeg2k_decode(data)
    if decoded.ndim != 3 or decoded.shape[2] != 3 or decoded.dtype != np.uint8:
        raise ValueError(f"it holds {decoded.dtype} samples of the shape {decoded.shape}")
    # Where Cb and Cr are coarser than Y the codec has to scale them up, and gives RGB at once.
    return decoded if _is_subsampled(data) else _rgb_of_ycbcr(decoded)


def _is_subsampled(data: bytes) -> bool:
    """Whether a codestream's second component is coarser than its first."""
    components = data[42:48]  # after the sizes; of each its depth, and its steps across and down
    return components[1:3] != components[4:6]


def _rgb_of_ycbcr(ycbcr: Samples) -> Samples:
    y, cb, cr = np.moveaxis(ycbcr.astype(np.float32), -1, 0)
    cb, cr = cb - 128, cr - 128
    red = y + _RED_OF_CR * cr
    green = y - _GREEN_OF_CB * cb - _GREEN_OF_CR * cr
    blue = y + _BLUE_OF_CB * cb
    rgb: npt.NDArray[np.uint8] = np.rint(np.stack([red, green, blue], -1)).clip(0, 255).astype("u1")
    return rgb


def _plain(
    width: int, bands: int, raw_dtype: np.dtype[np.generic]
) -> Callable[[bytes, int], Samples]:
    row = width * bands

    def plain(data: bytes, index: int) -> Samples:
        usable = len(data) // (row * raw_dtype.itemsize) * row
        samples = np.frombuffer(data, raw_dtype, usable).reshape(-1, width, bands)
        return samples.astype(raw_dtype.newbyteorder("="), copy=False)

    return plain
