"""What the tags of a TIFF say of its samples: colours, alpha, palette, depth, channel names."""

from typing import Any

import numpy as np
import numpy.typing as npt

from gigavim.errors import CorruptSlideError, UnsupportedSlideError
from gigavim.slides.ome import channel_names
from gigavim.slides.pixels import NotAPictureError, SampleLayout

CMYK = 5


def layout_of(page: Any, channels: int, *, channels_shown: bool) -> SampleLayout:
    """Read the layout of a page's samples.

    Args:
        page: tifffile's page.
        channels: how many pages make up the picture, a channel each.
        channels_shown: whether a palette is a channel's display colour and not the picture's.

    Raises:
        NotAPictureError: if its colours would be misread by any reader.
        UnsupportedSlideError: if another reader may read them.
    """
    samples = int(page.samplesperpixel)
    extra = tuple(int(one) for one in page.extrasamples)
    photometric = int(page.photometric)
    alpha_band = None
    if channels == 1 and extra and extra[-1] in (1, 2):
        alpha_band = samples - 1
    kind = {0: "inverted", 1: "grey", 2: "rgb", 3: "palette", 4: "grey", 6: "rgb"}.get(photometric)
    if kind is None:
        message = (
            f"{page.parent.filehandle.path}: has colours of photometric kind {photometric}, which "
            "are not read; convert it to RGB"
        )
        if photometric == CMYK and samples == 4:
            raise UnsupportedSlideError(message)
        # Other readers would take these numbers for red, green and blue.
        raise NotAPictureError(message)
    palette = None
    if kind == "palette" and channels_shown:
        kind = "grey"
    if kind == "palette":
        palette = _palette(page)
    bits = page.bitspersample if isinstance(page.bitspersample, int) else 8
    return SampleLayout(
        dtype=np.dtype(page.dtype),
        bands=samples * channels,
        photometric=kind,  # type: ignore[arg-type]
        alpha_band=alpha_band,
        premultiplied=alpha_band is not None and extra[-1] == 1,
        names=_channel_names(page, channels),
        are_channels=channels > 1,
        significant_bits=bits if bits not in (8, 16) else _stated_bits(page),
        palette=palette,
    )


def _palette(page: Any) -> npt.NDArray[np.uint8]:
    colormap = np.asarray(page.colormap)  # (3, entries)
    if colormap.ndim != 2 or colormap.shape[0] != 3:
        raise CorruptSlideError(f"{page.parent.filehandle.path}: has a palette without colours")
    if colormap.dtype.itemsize > 1 and colormap.max() > 255:
        colormap = colormap >> 8
    return np.ascontiguousarray(colormap.T.astype(np.uint8))


def _stated_bits(page: Any) -> int | None:
    """Return the depth that a MaxSampleValue tag states."""
    tag = page.tags.get(281)
    value = tag.value if tag is not None else None
    if isinstance(value, tuple):
        value = max(value)
    if page.bitspersample != 16 or not isinstance(value, int) or not 255 < value < 65536:
        return None
    return value.bit_length()


def _channel_names(page: Any, channels: int) -> tuple[str, ...]:
    if channels == 1 or not page.parent.is_ome:
        return ()
    names = channel_names(page.parent.ome_metadata or "")
    return names if len(names) == channels else ()
