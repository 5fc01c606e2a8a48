"""Write a slide as Aperio-style SVS: JPEG-tiled pyramid, thumbnail, label and macro image.

The layout is the one OpenSlide recognises (openslide.org/formats/aperio): tiled pages are levels,
the stripped second page is the thumbnail, and stripped pages named on the first line of their
description are the label and the macro image.
"""

from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image, ImageDraw

from painting.pyramid import TILE_PX, PyramidStream

LIBRARY = "Aperio Image Library v12.0.15"
BIGTIFF_FROM_PX = 4_000_000_000

_MACRO_HW = (431, 1280)
_LABEL_HW = (463, 387)


def write_svs(path: Path, stream: PyramidStream, *, mpp: float, quality: int, title: str) -> None:
    """Write the slide that `stream` renders to `path`; `title` goes on the label."""
    width, height = stream.sizes[0]
    area = f"{width}x{height} [0,0 {width}x{height}] ({TILE_PX}x{TILE_PX})"
    properties = f"AppMag = {10 / mpp:g}|MPP = {mpp:.4f}|Title = {title}"
    with tifffile.TiffWriter(path, bigtiff=width * height > BIGTIFF_FROM_PX) as tiff:
        tiff.write(
            stream.tiles(),
            shape=(height, width, 3),
            dtype=np.uint8,
            description=f"{LIBRARY}\r\n{area} JPEG/RGB Q={quality}|{properties}",
            **_jpeg(tiled=True),
        )
        thumbnail = stream.overview
        size = f"{thumbnail.shape[1]}x{thumbnail.shape[0]}"
        tiff.write(
            thumbnail,
            description=f"{LIBRARY}\r\n{width}x{height} -> {size} - |{properties}",
            **_jpeg(tiled=False),
        )
        for (w, h), tiles in zip(stream.sizes[1:], stream.reduced):
            tiff.write(
                iter(tiles),
                shape=(h, w, 3),
                dtype=np.uint8,
                description=f"{LIBRARY}\r\n{area} -> {w}x{h} JPEG/RGB Q={quality}",
                **_jpeg(tiled=True),
            )
        label = _label_image(title)
        tiff.write(
            label,
            photometric="rgb",
            compression="lzw",
            predictor=True,
            rowsperstrip=label.shape[0],
            subfiletype=1,
            description=f"{LIBRARY}\r\nlabel {label.shape[1]}x{label.shape[0]}",
            metadata=None,
            software=False,
        )
        macro = _macro_image(thumbnail, label)
        tiff.write(
            macro,
            subfiletype=9,
            description=f"{LIBRARY}\r\nmacro {macro.shape[1]}x{macro.shape[0]}",
            **_jpeg(tiled=False),
        )


def write_label_map(path: Path, tiles: list[bytes], *, width: int, height: int, mpp: float) -> None:
    """Write deflated label tiles as one tiled single-channel TIFF with its resolution."""
    tifffile.imwrite(
        path,
        iter(tiles),
        shape=(height, width),
        dtype=np.uint8,
        photometric="minisblack",
        tile=(TILE_PX, TILE_PX),
        compression="adobe_deflate",
        resolution=(1e4 / mpp, 1e4 / mpp),
        resolutionunit="CENTIMETER",
        metadata=None,
        software=False,
        bigtiff=width * height > BIGTIFF_FROM_PX,
    )


def _jpeg(*, tiled: bool) -> dict[str, Any]:
    """The options that all JPEG pages share."""
    options: dict[str, Any] = {
        "photometric": "ycbcr",
        "compression": "jpeg",
        "compressionargs": {"level": 85},
        "subsampling": (2, 2),
        "metadata": None,
        "software": False,
    }
    return options | ({"tile": (TILE_PX, TILE_PX)} if tiled else {"rowsperstrip": 16})


def _label_image(title: str) -> np.ndarray:
    """A paper label (h, w, 3) with the slide's title."""
    height, width = _LABEL_HW
    picture = Image.new("RGB", (width, height), (236, 232, 220))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((12, 12, width - 13, height - 13), outline=(40, 60, 120), width=3)
    for line, text in enumerate(("GIGAVIM", title, "H & E", "synthetic")):
        draw.text((36, 50 + 90 * line), text, fill=(20, 20, 30), font_size=34)
    return np.asarray(picture)


def _macro_image(overview: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The whole glass (h, w, 3): paper label at the left, tissue at the right."""
    height, width = _MACRO_HW
    picture = Image.new("RGB", (width, height), (228, 230, 232))
    paper = Image.fromarray(label).resize((label.shape[1] * height // label.shape[0], height))
    picture.paste(paper, (0, 0))
    tissue = Image.fromarray(overview)
    tissue.thumbnail((width - paper.width - 160, height - 80))
    picture.paste(tissue, (paper.width + 80, (height - tissue.height) // 2))
    return np.asarray(picture)
