"""The slide and its label map as OME-Zarr (NGFF) 0.4 or 0.5.

The image is the slide at the map's resolution; the labels lie in its `labels/segmentation` and have
as many levels (https://ngff.openmicroscopy.org/0.4/#label-md). Metadata are written by hand: they
are few, and everything is streamed.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import numcodecs
import numpy as np
import zarr
from zarr.codecs import BloscCodec, BloscShuffle

from gigavim import __version__
from gigavim.frames import ClassSpec, MapFrame
from gigavim.outputs.atomic import explained
from gigavim.outputs.labels import LabelMap, every_second, windows
from gigavim.outputs.ome_tiff import level_shapes

Version = Literal["0.4", "0.5"]
CHUNK_PX = 1024
NAME = "segmentation"


class Pixels(Protocol):
    """A slide."""

    def read_salvage(
        self, x_level0: float, y_level0: float, width: int, height: int,
        *, scale_xy: tuple[float, float],
    ) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
        """(height, width, 3) at a resolution, and where it could not be read."""


def write_ome_zarr(
    slide: Pixels,
    labels: LabelMap,
    frame: MapFrame,
    classes: Sequence[ClassSpec],
    folder: Path,
    *,
    name: str,
    version: Version = "0.4",
) -> None:
    """Fill an empty folder with image and labels, window by window.

    Args:
        slide: gives the image.
        labels: the (height, width) label map.
        frame: its placement on the slide.
        classes: name and colour of each label value.
        folder: exists, and is empty.
        name: of the image.
        version: of NGFF; 0.4 is zarr v2, 0.5 zarr v3.

    Raises:
        OutputError: the folder cannot be written.
        SlideError: the slide cannot be read.
    """
    shapes = level_shapes(labels.height, labels.width)
    with explained(folder):
        root = zarr.open_group(folder, mode="w", zarr_format=2 if version == "0.4" else 3)
        image = [_array(root, str(i), (3, *shape), version) for i, shape in enumerate(shapes)]
        _describe(root, _image_metadata(frame, len(shapes), name, version), version)
        for y0, y1, x0, x1 in windows(*shapes[0], side_px=CHUNK_PX):
            pixels, _ = slide.read_salvage(
                frame.x_level0 + x0 * frame.scale_x,
                frame.y_level0 + y0 * frame.scale_y,
                x1 - x0,
                y1 - y0,
                scale_xy=(frame.scale_x, frame.scale_y),
            )
            image[0][:, y0:y1, x0:x1] = pixels.transpose(2, 0, 1)
        for fine, coarse in pairwise(image):
            for window, pixels in _halves(fine, coarse.shape[1:]):
                coarse[:, window[0], window[1]] = _mean_of_quarters(pixels)
        _write_labels(root, labels, frame, classes, shapes, version)


def _write_labels(
    root: zarr.Group,
    labels: LabelMap,
    frame: MapFrame,
    classes: Sequence[ClassSpec],
    shapes: Sequence[tuple[int, int]],
    version: Version,
) -> None:
    container = root.create_group("labels")
    _describe(container, {"labels": [NAME]}, version)
    group = container.create_group(NAME)
    _describe(group, _label_metadata(frame, classes, len(shapes), version), version)
    levels = [_array(group, str(i), shape, version) for i, shape in enumerate(shapes)]
    for y0, y1, x0, x1 in windows(*shapes[0], side_px=CHUNK_PX):
        levels[0][y0:y1, x0:x1] = labels.read(y0, y1, x0, x1)
    for number, (fine, coarse) in enumerate(pairwise(levels), 1):
        for window, values in _halves(fine, coarse.shape):
            # As in the OME-TIFF: the pixel taken alternates, and so stays near the centre.
            height, width = (part.stop - part.start for part in window)
            coarse[window] = every_second(values, (height, width), offset=number % 2)


def _array(
    group: zarr.Group, name: str, shape: tuple[int, ...], version: Version
) -> "zarr.Array[Any]":
    chunks = tuple(
        1 if axis < len(shape) - 2 else min(CHUNK_PX, side) for axis, side in enumerate(shape)
    )
    common: dict[str, Any] = {"shape": shape, "chunks": chunks, "dtype": "uint8", "fill_value": 0}
    if version == "0.4":
        return group.create_array(
            name,
            compressors=numcodecs.Blosc("zstd", clevel=3, shuffle=numcodecs.Blosc.BITSHUFFLE),
            # Nested chunks, as NGFF wants them.
            chunk_key_encoding={"name": "v2", "separator": "/"},
            **common,
        )
    codec = BloscCodec(cname="zstd", clevel=3, shuffle=BloscShuffle.bitshuffle)
    axes = ("c", "y", "x")[-len(shape) :]
    return group.create_array(name, compressors=codec, dimension_names=axes, **common)


def _halves(
    fine: "zarr.Array[Any]", shape_hw: tuple[int, ...]
) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """Windows of the next level, with the pixels of the finer one that they cover."""
    height, width = fine.shape[-2:]
    for y0, y1, x0, x1 in windows(*shape_hw, side_px=CHUNK_PX):
        source = slice(2 * y0, min(2 * y1, height)), slice(2 * x0, min(2 * x1, width))
        yield (slice(y0, y1), slice(x0, x1)), np.asarray(fine[(..., *source)])


def _mean_of_quarters(pixels: np.ndarray) -> np.ndarray:
    """(3, h, w) uint8 -> (3, ceil(h / 2), ceil(w / 2)); the last row and column stand for two."""
    height, width = pixels.shape[1:]
    padded = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    quads = padded.reshape(3, padded.shape[1] // 2, 2, padded.shape[2] // 2, 2)
    return np.asarray((quads.sum((2, 4), dtype=np.uint16) + 2) // 4, np.uint8)


def _describe(group: zarr.Group, metadata: dict[str, Any], version: Version) -> None:
    if version == "0.4":
        group.attrs.update(metadata)
    else:
        group.attrs.update({"ome": {"version": version, **metadata}})


def _multiscales(
    frame: MapFrame, levels: int, name: str, version: Version, *, channels: bool
) -> list[dict[str, Any]]:
    known = math.isfinite(frame.mpp_x * frame.mpp_y)
    size_yx = (frame.mpp_y, frame.mpp_x) if known else (1.0, 1.0)
    unit = {"unit": "micrometer"} if known else {}
    axes: list[dict[str, str]] = [{"name": side, "type": "space", **unit} for side in "yx"]
    if channels:
        axes.insert(0, {"name": "c", "type": "channel"})
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [
                {
                    "type": "scale",
                    "scale": [1.0] * channels + [size * 2**level for size in size_yx],
                }
            ],
        }
        for level in range(levels)
    ]
    entry: dict[str, Any] = {"name": name, "axes": axes, "datasets": datasets}
    return [({"version": version} if version == "0.4" else {}) | entry]


def _image_metadata(frame: MapFrame, levels: int, name: str, version: Version) -> dict[str, Any]:
    colors = {"red": "FF0000", "green": "00FF00", "blue": "0000FF"}
    channels = [
        {
            "label": label,
            "color": color,
            "active": True,
            "window": {"min": 0, "max": 255, "start": 0, "end": 255},
        }
        for label, color in colors.items()
    ]
    omero: dict[str, Any] = {"channels": channels, "rdefs": {"model": "color"}}
    return {
        "multiscales": _multiscales(frame, levels, name, version, channels=True),
        "omero": ({"version": version} if version == "0.4" else {}) | omero,
        "_creator": {"name": "gigavim", "version": __version__},
    }


def _label_metadata(
    frame: MapFrame, classes: Sequence[ClassSpec], levels: int, version: Version
) -> dict[str, Any]:
    # Value 0 is transparent in every viewer, and background of most models.
    colors = [
        {"label-value": value, "rgba": [*spec.color_rgb, 0 if value == 0 else 255]}
        for value, spec in enumerate(classes)
    ]
    properties = [{"label-value": value, "class": spec.name} for value, spec in enumerate(classes)]
    label = {"colors": colors, "properties": properties, "source": {"image": "../../"}}
    return {
        "multiscales": _multiscales(frame, levels, NAME, version, channels=False),
        "image-label": ({"version": version} if version == "0.4" else {}) | label,
    }
