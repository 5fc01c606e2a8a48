"""What every slide can do, whichever library reads it.

A reader gives levels and `_read_inside`; all else (clipping, salvage, resampling to a wanted mpp,
thumbnails, dask) is here and is therefore the same for every format.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from gigavim.errors import MissingMppError, TileReadError
from gigavim.frames import Bounds, GeoReference, Mpp
from gigavim.slides.resample import SourceWindow, resample, source_window

if TYPE_CHECKING:
    import dask.array

log = logging.getLogger(__name__)

RGB = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

WHITE = (255, 255, 255)

LEVEL_SLACK = 1.01
"""A level this much coarser than wanted still counts as fine enough."""

SOURCE_BLOCK_PX = 4096 * 4096
"""Pixels of a level held at once while they are resampled; larger requests are cut."""

FINGERPRINT_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of a slide."""

    width: int
    height: int
    downsample_x: float
    """Level-0 pixels per pixel of this level, at least 1."""
    downsample_y: float
    tile_width: int
    tile_height: int


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """What a user may say about a file that does not say it itself, or says it wrongly."""

    mpp: float | None = None
    channels: tuple[int, int, int] | None = None


def level_downsample(size_level0: int, size_level: int) -> float:
    """How many level-0 pixels a level's pixel covers along one axis.

    Levels are made by a whole factor and the remainder of the slide's edge is cut or padded, so a
    ratio that a whole factor explains is that factor: 62 of 250 px is 4, not 4.03.
    """
    ratio = size_level0 / size_level
    factor = max(round(ratio), 1)
    if size_level in (size_level0 // factor, -(-size_level0 // factor)):
        return float(factor)
    return max(ratio, 1.0)


class Slide(ABC):
    """An image of any size, as RGB pixels at any resolution.

    Coordinates are level-0 pixels, x right and y down. Reading is thread-safe; a slide pickles as
    its path and options and is opened anew where it is unpickled.
    """

    path: Path
    options: OpenOptions
    reader: str
    levels: tuple[Level, ...]
    mpp: Mpp | None
    bounds: Bounds
    background_rgb: tuple[int, int, int]
    georeference: GeoReference | None
    description: dict[str, str]

    @abstractmethod
    def _read_inside(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        """Return (height, width, 3) of a rectangle that lies wholly inside the level.

        Raises:
            TileReadError: if any part of it cannot be decoded.
        """

    @abstractmethod
    def close(self) -> None:
        """Close every handle; the slide cannot be read afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.options)

    def __dask_tokenize__(self) -> tuple[str, ...]:
        return (type(self).__name__, str(self.path), repr(self.options), self.fingerprint())

    def __repr__(self) -> str:
        size = f"{self.levels[0].width} x {self.levels[0].height} px"
        return f"<{type(self).__name__} {self.path.name}, {size}, {len(self.levels)} levels>"

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        """Return (height, width, 3) at level pixel (x, y); background outside the level.

        Raises:
            TileReadError: if any tile of it cannot be decoded.
        """
        return self._clipped(level, x, y, width, height, self._read_inside)

    def read_level_salvage(
        self, level: int, x: int, y: int, width: int, height: int
    ) -> tuple[RGB, Mask | None]:
        """Like `read_level`, but undecodable tiles come out as background.

        Returns:
            The pixels, and (height, width) that is True where they could not be read; None if all
            could.
        """
        try:
            return self.read_level(level, x, y, width, height), None
        except TileReadError as error:
            log.warning("%s", error)
        unreadable = np.zeros((height, width), bool)

        def by_tiles(level: int, x0: int, y0: int, w: int, h: int) -> RGB:
            pixels, bad = self._read_tiles(level, x0, y0, w, h)
            unreadable[y0 - y : y0 - y + h, x0 - x : x0 - x + w] = bad
            return pixels

        pixels = self._clipped(level, x, y, width, height, by_tiles)
        return pixels, unreadable if unreadable.any() else None

    def read(
        self,
        x_level0: float,
        y_level0: float,
        width: int,
        height: int,
        *,
        mpp: float | None = None,
        scale_xy: tuple[float, float] | None = None,
    ) -> RGB:
        """Return (height, width, 3) at a wanted resolution.

        Pixel (i, j) covers level-0 x in [x + i s, x + (i + 1) s), y alike; s is `scale_xy`, or
        follows from `mpp`, or is 1. A pixel's value does not depend on the region asked for,
        beyond one grey level; at a level's own resolution and whole offsets it is that level's
        pixel.

        Raises:
            MissingMppError: if `mpp` is given and the slide's own is unknown.
            TileReadError: if any tile needed cannot be decoded.
        """
        scale_xy = self._scale_xy(mpp, scale_xy)

        def source(*region: int) -> tuple[RGB, Mask | None]:
            return self.read_level(*region), None

        return self._scaled(x_level0, y_level0, width, height, scale_xy, source)[0]

    def read_salvage(
        self,
        x_level0: float,
        y_level0: float,
        width: int,
        height: int,
        *,
        mpp: float | None = None,
        scale_xy: tuple[float, float] | None = None,
    ) -> tuple[RGB, Mask | None]:
        """Like `read`, but undecodable tiles come out as background; see `read_level_salvage`."""
        scale_xy = self._scale_xy(mpp, scale_xy)
        return self._scaled(x_level0, y_level0, width, height, scale_xy, self.read_level_salvage)

    def read_strips(
        self,
        x_level0: float,
        y_level0: float,
        width: int,
        height: int,
        strip_px: int,
        *,
        scale_xy: tuple[float, float],
    ) -> tuple[RGB, Mask | None]:
        """Like `read_salvage`, cut into strips side by side.

        Strips that are whole columns of a file's tiles may be decoded straight into place.

        Args:
            strip_px: the width of a strip, of which `width` is a multiple.

        Returns:
            The pixels (width / strip_px, height, strip_px, 3), and (height, width) as of
            `read_salvage`.
        """
        pixels, unreadable = self.read_salvage(x_level0, y_level0, width, height, scale_xy=scale_xy)
        return pixels.reshape(height, -1, strip_px, 3).swapaxes(0, 1), unreadable

    def level_for_scale(self, scale_xy: tuple[float, float]) -> int:
        """Return the coarsest level that is as fine as wanted, within 1 %."""
        fine = [
            index
            for index, level in enumerate(self.levels)
            if level.downsample_x <= scale_xy[0] * LEVEL_SLACK
            and level.downsample_y <= scale_xy[1] * LEVEL_SLACK
        ]
        return max(fine, key=lambda index: self.levels[index].downsample_x, default=0)

    def thumbnail(self, max_px: int) -> RGB:
        """Return (h, w, 3) of the bounds, aspect kept, the longer side at most `max_px`.

        Unreadable tiles are background; each is logged.
        """
        height, width, scale_xy = self.thumbnail_shape(max_px)
        return self.read_salvage(
            self.bounds.x_level0, self.bounds.y_level0, width, height, scale_xy=scale_xy
        )[0]

    def thumbnail_shape(self, max_px: int) -> tuple[int, int, tuple[float, float]]:
        """Height and width of a thumbnail, and the level-0 pixels (x, y) that its pixels cover."""
        bounds = self.bounds
        scale = max(bounds.width_level0 / max_px, bounds.height_level0 / max_px, 1.0)
        width = max(round(bounds.width_level0 / scale), 1)
        height = max(round(bounds.height_level0 / scale), 1)
        return height, width, (bounds.width_level0 / width, bounds.height_level0 / height)

    def to_dask(self, level: int = 0, *, chunk_px: int = 2048) -> "dask.array.Array":
        """Return a level as a lazy (height, width, 3) uint8 array."""
        import dask.array as da

        shape = (self.levels[level].height, self.levels[level].width, 3)
        chunks = da.core.normalize_chunks(  # type: ignore[no-untyped-call]
            (chunk_px, chunk_px, 3), shape, dtype=np.uint8
        )
        array: dask.array.Array = da.map_blocks(  # type: ignore[no-untyped-call]
            _read_chunk,
            slide=self,
            level=level,
            chunks=chunks,
            dtype=np.uint8,
            meta=np.empty((0, 0, 0), np.uint8),
        )
        return array

    def fingerprint(self) -> str:
        """Return a cheap SHA-256: size, head and tail of the file (of a folder, its listing)."""
        digest = hashlib.sha256()
        if self.path.is_dir():
            digest.update(_listing(self.path))
            return digest.hexdigest()
        size = self.path.stat().st_size
        digest.update(str(size).encode())
        with self.path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(size - FINGERPRINT_BYTES, 0))
            digest.update(file.read(FINGERPRINT_BYTES))
        for extra in self._companions():
            digest.update(_listing(extra) if extra.is_dir() else extra.read_bytes())
        return digest.hexdigest()

    def _companions(self) -> Iterable[Path]:
        """Folders and small files beside the slide's own file that are part of it."""
        return ()

    def _clipped(
        self,
        level: int,
        x: int,
        y: int,
        width: int,
        height: int,
        read_inside: Callable[[int, int, int, int, int], RGB],
    ) -> RGB:
        size = self.levels[level]
        x0, y0 = max(x, 0), max(y, 0)
        x1, y1 = min(x + width, size.width), min(y + height, size.height)
        if (x0, y0, x1, y1) == (x, y, x + width, y + height) and width > 0 and height > 0:
            return read_inside(level, x, y, width, height)
        canvas = self._background(width, height)
        if x0 < x1 and y0 < y1:
            pixels = read_inside(level, x0, y0, x1 - x0, y1 - y0)
            canvas[y0 - y : y1 - y, x0 - x : x1 - x] = pixels
        return canvas

    def _background(self, width: int, height: int) -> RGB:
        canvas = np.empty((height, width, 3), np.uint8)
        canvas[:] = self.background_rgb
        return canvas

    def _read_tiles(self, level: int, x: int, y: int, width: int, height: int) -> tuple[RGB, Mask]:
        """Halve a rectangle along tile edges until what fails is single tiles."""
        try:
            pixels = self._read_inside(level, x, y, width, height)
            return pixels, np.zeros((height, width), bool)
        except TileReadError:
            pass
        size = self.levels[level]
        middle_x = (x + width // 2) // size.tile_width * size.tile_width
        middle_x = middle_x if middle_x > x else middle_x + size.tile_width
        middle_y = (y + height // 2) // size.tile_height * size.tile_height
        middle_y = middle_y if middle_y > y else middle_y + size.tile_height
        split_x, split_y = middle_x < x + width, middle_y < y + height
        if split_x and (width >= height or not split_y):
            left = self._read_tiles(level, x, y, middle_x - x, height)
            right = self._read_tiles(level, middle_x, y, x + width - middle_x, height)
            return np.hstack([left[0], right[0]]), np.hstack([left[1], right[1]])
        if split_y:
            upper = self._read_tiles(level, x, y, width, middle_y - y)
            lower = self._read_tiles(level, x, middle_y, width, y + height - middle_y)
            return np.vstack([upper[0], lower[0]]), np.vstack([upper[1], lower[1]])
        return self._background(width, height), np.ones((height, width), bool)

    def _scale_xy(
        self, mpp: float | None, scale_xy: tuple[float, float] | None
    ) -> tuple[float, float]:
        if scale_xy is not None:
            return scale_xy
        if mpp is None:
            return 1.0, 1.0
        if self.mpp is None:
            raise MissingMppError(
                f"{self.path}: does not say how many micrometres a pixel covers; give it with "
                "--mpp, in a settings file, or as open_slide(path, mpp=...)"
            )
        return mpp / self.mpp.x, mpp / self.mpp.y

    def _windows(
        self,
        x_level0: float,
        y_level0: float,
        width: int,
        height: int,
        scale_xy: tuple[float, float],
    ) -> tuple[int, SourceWindow, SourceWindow]:
        """Return which level is read, and where along x and y."""
        index = self.level_for_scale(scale_xy)
        level = self.levels[index]
        across = source_window(x_level0, scale_xy[0], level.downsample_x, width)
        down = source_window(y_level0, scale_xy[1], level.downsample_y, height)
        return index, across, down

    def _scaled(
        self,
        x_level0: float,
        y_level0: float,
        width: int,
        height: int,
        scale_xy: tuple[float, float],
        source: Callable[[int, int, int, int, int], tuple[RGB, Mask | None]],
    ) -> tuple[RGB, Mask | None]:
        index, across, down = self._windows(x_level0, y_level0, width, height, scale_xy)
        if across.exact and down.exact:
            return source(index, across.first, down.first, width, height)
        if across.count * down.count > SOURCE_BLOCK_PX and max(width, height) > 1:
            left, upper = (width // 2, height) if width >= height else (width, height // 2)
            pixels = np.empty((height, width, 3), np.uint8)
            unreadable = np.zeros((height, width), bool)
            for y in range(0, height, upper):
                for x in range(0, width, left):
                    w, h = min(left, width - x), min(upper, height - y)
                    part, bad = self._scaled(
                        x_level0 + x * scale_xy[0],
                        y_level0 + y * scale_xy[1],
                        w,
                        h,
                        scale_xy,
                        source,
                    )
                    pixels[y : y + h, x : x + w] = part
                    if bad is not None:
                        unreadable[y : y + h, x : x + w] = bad
            return pixels, unreadable if unreadable.any() else None
        pixels, bad = source(index, across.first, down.first, across.count, down.count)
        out = resample(pixels, across, down, width, height)
        if bad is None:
            return out, None
        weight = resample(bad.astype(np.uint8) * 255, across, down, width, height)
        return out, weight > 0


def _listing(folder: Path) -> bytes:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "".join(
        f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\n" for path in files
    ).encode()


def _read_chunk(
    slide: Slide, level: int, block_info: dict[None, dict[str, list[tuple[int, int]]]]
) -> RGB:
    (y0, y1), (x0, x1), _ = block_info[None]["array-location"]
    return slide.read_level(level, x0, y0, x1 - x0, y1 - y0)
