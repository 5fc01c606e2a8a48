"""OME-Zarr 0.4 and 0.5, by zarr: a folder of chunks, read where they are needed."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zarr

from gigavim.errors import CorruptSlideError, SlideError, TileReadError, UnsupportedSlideError
from gigavim.frames import Bounds
from gigavim.slides.base import RGB, WHITE, Level, OpenOptions, Slide, level_downsample
from gigavim.slides.mpp import choose_mpp, from_scale
from gigavim.slides.pixels import SampleLayout, choose_rule

log = logging.getLogger(__name__)

AXES = ("t", "c", "z", "y", "x")

RGB_COLOURS = ("FF0000", "00FF00", "0000FF")

MAX_CHUNK_BYTES = 1 << 30

SAMPLE_PX = 2048
"""Side of the middle piece of the coarsest level from which a brightness scale is taken."""


class ZarrSlide(Slide):
    """An OME-Zarr image with any of the axes t, c, z, y, x; the first t and z are read.

    Raises:
        CorruptSlideError: if its metadata are missing or contradictory.
        UnsupportedSlideError: if it is no image (a plate, say), or its samples are no picture.
    """

    reader = "zarr"

    def __init__(self, path: Path, options: OpenOptions | None = None) -> None:
        self.path = path
        self.options = options or OpenOptions()
        self.background_rgb = WHITE
        self.georeference = None
        try:
            self._open()
        except SlideError:
            raise
        # zarr raises errors of many unrelated kinds on damaged metadata.
        except Exception as error:
            raise CorruptSlideError(
                f"{path}: is a damaged OME-Zarr ({type(error).__name__}: {error})"
            ) from error

    def _open(self) -> None:
        path = self.path
        group, image = _image(path)
        multiscale = image["multiscales"][0]
        axes = [str(axis["name"]).lower() for axis in multiscale["axes"]]
        if not {"y", "x"} <= set(axes) or not set(axes) <= set(AXES):
            raise UnsupportedSlideError(
                f"{path}: has the axes {axes}; x and y and any of tcz are read"
            )
        datasets = multiscale["datasets"]
        arrays = [group[str(one["path"])] for one in datasets]
        for array in arrays:
            _check(path, array, axes)
        self._axes, self._arrays = axes, arrays
        finest = arrays[0]
        self._channels = finest.shape[axes.index("c")] if "c" in axes else 1
        scales = [_scale_yx(one, axes) for one in datasets]
        self.levels = tuple(
            self._level(array, scale, scales[0]) for array, scale in zip(arrays, scales)
        )
        self.bounds = Bounds(0, 0, self.levels[0].width, self.levels[0].height)
        layout = _layout(finest.dtype, self._channels, image.get("omero"))
        self._bands = list(range(self._channels))
        rule = choose_rule(path, layout, self.options.channels, self._sample)
        # Only the chosen channels are read.
        self._bands = sorted(set(rule.bands))
        places = tuple(self._bands.index(band) for band in rule.bands)
        self._rule = dataclasses.replace(rule, bands=places)
        units = [multiscale["axes"][axes.index(axis)].get("unit") for axis in "yx"]
        claim = from_scale(scales[0], units) if scales[0] is not None else None
        self.mpp = choose_mpp(path, [claim], user=self.options.mpp)
        version = image.get("version") or multiscale.get("version", "unknown")
        self.description = {"format": f"OME-Zarr {version}", "pixels": rule.text}
        rest = [axis for axis in "tz" if axis in axes and finest.shape[axes.index(axis)] > 1]
        if rest:
            self.description["planes"] = f"first of axes {''.join(rest)}"

    def close(self) -> None:
        """Nothing stays open between reads."""

    def _level(
        self,
        array: Any,
        scale_yx: tuple[float, float] | None,
        finest_yx: tuple[float, float] | None,
    ) -> Level:
        at_y, at_x = self._axes.index("y"), self._axes.index("x")
        height, width = array.shape[at_y], array.shape[at_x]
        whole = self._arrays[0].shape
        by_shape = (
            level_downsample(whole[at_y], height),
            level_downsample(whole[at_x], width),
        )
        down_y, down_x = by_shape
        if scale_yx is not None and finest_yx is not None:
            stated = (scale_yx[0] / finest_yx[0], scale_yx[1] / finest_yx[1])
            # A scale that its own shape contradicts by more than rounding is not believed.
            close = [
                abs(a * size - b * size) <= 2 * max(a, 1)
                for a, b, size in zip(stated, by_shape, (height, width))
            ]
            if all(close):
                down_y, down_x = max(stated[0], 1.0), max(stated[1], 1.0)
        return Level(width, height, down_x, down_y, array.chunks[at_x], array.chunks[at_y])

    def _read_inside(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        return self._rule.apply(self._raw(level, x, y, width, height), self.background_rgb)

    def _raw(self, level: int, x: int, y: int, width: int, height: int) -> npt.NDArray[np.generic]:
        """Return (height, width, bands)."""
        where: dict[str, Any] = {
            "t": 0,
            "z": 0,
            "c": self._bands,
            "y": slice(y, y + height),
            "x": slice(x, x + width),
        }
        array = self._arrays[level]
        try:
            pixels = np.asarray(array.oindex[tuple(where[axis] for axis in self._axes)])
        # Codecs raise errors of many unrelated kinds.
        except Exception as error:
            raise TileReadError(
                f"{self.path}: {width} x {height} px at ({x}, {y}) of level {level} cannot be "
                f"decoded: {error}"
            ) from error
        left = [axis for axis in self._axes if axis in "cyx"]
        pixels = pixels.reshape(
            [len(self._bands) if a == "c" else height if a == "y" else width for a in left]
        )
        if "c" not in left:
            left, pixels = [*left, "c"], pixels[..., None]
        return pixels.transpose([left.index(axis) for axis in "yxc"])

    def _sample(self) -> npt.NDArray[np.generic]:
        """Return raw samples (n, bands) from the middle of the coarsest level."""
        level = self.levels[-1]
        width, height = min(level.width, SAMPLE_PX), min(level.height, SAMPLE_PX)
        x, y = (level.width - width) // 2, (level.height - height) // 2
        return self._raw(len(self.levels) - 1, x, y, width, height).reshape(-1, len(self._bands))


def _image(path: Path) -> tuple[Any, Mapping[str, Any]]:
    """Return the group of the image and its OME metadata."""
    group = zarr.open_group(path, mode="r")
    metadata = _ome(group)
    if "multiscales" not in metadata and "bioformats2raw.layout" in metadata:
        group = zarr.open_group(path / "0", mode="r")
        metadata = _ome(group)
    if metadata.get("multiscales"):
        return group, metadata
    kind = "a plate" if "plate" in metadata else "a well" if "well" in metadata else "no image"
    inside = ", ".join(sorted(group.group_keys())[:4])
    raise UnsupportedSlideError(
        f"{path}: is a zarr group, but {kind} (no multiscales); give an image in it"
        + (f", such as one of {inside}" if inside else "")
    )


def _ome(group: Any) -> Mapping[str, Any]:
    attributes = dict(group.attrs)
    return cast(Mapping[str, Any], attributes.get("ome", attributes))


def _check(path: Path, array: Any, axes: Sequence[str]) -> None:
    if not hasattr(array, "shape") or len(array.shape) != len(axes) or 0 in array.shape:
        raise CorruptSlideError(f"{path}: a level's array does not have the axes {axes}")
    if int(np.prod(array.chunks, dtype=np.float64)) * array.dtype.itemsize > MAX_CHUNK_BYTES:
        raise UnsupportedSlideError(f"{path}: has chunks of {array.chunks}; rechunk it")


def _scale_yx(dataset: Mapping[str, Any], axes: Sequence[str]) -> tuple[float, float] | None:
    for transform in dataset.get("coordinateTransformations", ()):
        if transform.get("type") == "scale" and len(transform["scale"]) == len(axes):
            y, x = (float(transform["scale"][axes.index(axis)]) for axis in "yx")
            return (y, x) if y > 0 and x > 0 else None
    return None


def _layout(
    dtype: np.dtype[np.generic], channels: int, omero: Mapping[str, Any] | None
) -> SampleLayout:
    shown = omero.get("channels", []) if omero else []
    names = tuple(str(one.get("label", "")) for one in shown)
    colours = tuple(str(one.get("color", "")).upper() for one in shown)
    is_rgb = channels == 3 and dtype == np.uint8 and (not shown or colours == RGB_COLOURS)
    return SampleLayout(
        dtype=dtype,
        bands=channels,
        photometric="rgb" if is_rgb else "grey",
        names=names if len(names) == channels else (),
        are_channels=channels > 1 and not is_rgb,
    )
