"""Reading an embedding store: by place in the sequence, by position on the slide, as arrays."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
import numpy.typing as npt
import zarr

from gigavim.errors import StoreError
from gigavim.frames import Bounds, ClassSpec, MapFrame
from gigavim.outputs.labels import LabelStore
from gigavim.store import layout
from gigavim.store.checksums import missing_files
from gigavim.store.layout import StoreInfo

if TYPE_CHECKING:
    import anndata
    import xarray
    from dask.array import Array as DaskArray

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class TokenWindow:
    """Tokens of a part of the slide, in scan order."""

    places: npt.NDArray[np.int64]
    """(n,) in the sequence."""
    embeddings: Floats
    """(n, D)"""
    row_col: npt.NDArray[np.int64]
    """(n, 2) cells of the grid."""
    xy_level0: npt.NDArray[np.float64]
    """(n, 2) top-left corners of the patches in level-0 pixels."""


class EmbeddingStore:
    """A store of `gigavim embed`, opened for reading; arrays are read when asked for.

    Made by `gigavim.open_embeddings`. Reading by several threads is safe, and a store pickles as
    its location.
    """

    def __init__(
        self,
        location: str,
        root: zarr.Group,
        info: StoreInfo,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self.location = location
        """Path or URL."""
        self.info = info
        """Slide, grid, classes, provenance."""
        self.root = root
        """The zarr group, for what this class does not offer."""
        self._storage_options = storage_options or {}

    @classmethod
    def open(cls, location: str | Path, *, complete: bool = True, **storage_options: Any) -> Self:
        """Open a folder, or with fsspec a URL such as "s3://bucket/slide.embeddings.zarr".

        Args:
            location: the folder or URL.
            complete: look whether all files are there; whether they are as they were, `gigavim
                verify` tells.
            storage_options: what fsspec wants to know for a URL, such as anon=True.

        Raises:
            StoreError: there is no such store, or it is incomplete, damaged or of a later version.
        """
        text = str(location)
        try:
            if "://" in text:
                from zarr.storage import FsspecStore

                store: Any = FsspecStore.from_url(
                    text, storage_options=storage_options, read_only=True
                )
            else:
                store = Path(text)
            root = zarr.open_group(store, mode="r", zarr_format=3)
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"{text}: {_why_not(text, error)}") from error
        except ImportError as error:
            raise StoreError(
                f"{text}: {_first_line(error)} (for s3:// pip install 'gigavim[s3]')"
            ) from error
        info = layout.read_info(root.attrs.asdict(), text)
        missing = missing_files(text, storage_options) if complete else []
        if missing:
            raise StoreError(
                f"{text}: {len(missing):,} of its files are missing, such as {missing[0]}, and"
                " would be read as zeros: `gigavim verify` names them; copy it again, or make it"
                " anew"
            )
        return cls(text, root, info, storage_options)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self).open, **self._storage_options), (self.location,)

    def __len__(self) -> int:
        """Tokens."""
        return self.info.tokens

    def __repr__(self) -> str:
        info = self.info
        return f"<EmbeddingStore of {info.slide.name}: {info.tokens:,} tokens x {info.width}>"

    @property
    def frame(self) -> MapFrame:
        """Where the map lies on the slide; cell (row, col) begins at map pixel stride_px * col."""
        return self.info.frame.frame()

    @property
    def bounds(self) -> Bounds:
        """The scanned part of the slide, in level-0 pixels."""
        return self.info.slide.bounds

    @property
    def classes(self) -> tuple[ClassSpec, ...]:
        """What the values of the label map mean."""
        return self.info.classes

    @property
    def embeddings(self) -> "zarr.Array[Any]":
        """(n, D) float16 or float32 in scan order."""
        return self._tokens("embeddings")

    @property
    def row_col(self) -> "zarr.Array[Any]":
        """(n, 2) int32 cells of the grid."""
        return self._tokens("row_col")

    @property
    def xy_level0(self) -> "zarr.Array[Any]":
        """(n, 2) float64 top-left corners of the patches."""
        return self._tokens("xy_level0")

    @property
    def probabilities(self) -> "zarr.Array[Any] | None":
        """(n, classes) float16, None where they were not asked for."""
        return self._tokens("probabilities") if "tokens/probabilities" in self.root else None

    @cached_property
    def index(self) -> "zarr.Array[Any]":
        """(rows, cols) place among the tokens, -1 where there is none."""
        return self._array("index")

    @cached_property
    def slide_embedding(self) -> Floats:
        """(D,) float32: the mean of the class tokens, or of all tokens where there are none."""
        own = self.class_tokens
        return self.mean if own is None else np.asarray(own.mean(0))

    @cached_property
    def mean(self) -> Floats:
        """(D,) float32, the mean of all tokens."""
        with self._reading():
            return np.asarray(self._array("slide/mean")[:])

    @cached_property
    def class_tokens(self) -> Floats | None:
        """(k, D) float32, None where the model has no class token."""
        if "slide/class_tokens" not in self.root:
            return None
        with self._reading():
            return np.asarray(self._array("slide/class_tokens")[:])

    @cached_property
    def labels(self) -> LabelStore:
        """The label map and its coverage, read by windows."""
        group = self.root["map"]
        if not isinstance(group, zarr.Group):
            raise self._damaged("map")
        return LabelStore(Path(self.location) / "map", group)

    @cached_property
    def tissue(self) -> npt.NDArray[np.bool_]:
        """(h, w) what was taken for tissue; `info.tissue` says where it lies."""
        with self._reading():
            return np.asarray(self._array("tissue")[:]) > 0

    def thumbnail(self, max_px: int = 2048) -> npt.NDArray[np.uint8]:
        """(h, w, 3) of the slide's bounds, as stored; `max_px` of the longer side at most."""
        with self._reading():
            picture = np.asarray(self._array("thumbnail")[:])
        step = math.ceil(max(picture.shape[:2]) / max_px)
        return np.ascontiguousarray(picture[::step, ::step])

    def numpy(self) -> Floats:
        """(n, D) all embeddings, in memory."""
        with self._reading():
            return np.asarray(self.embeddings[:])

    def dask(self) -> "DaskArray":
        """(n, D) embeddings as a lazy array, a shard per chunk."""
        return _lazy(self.embeddings)

    def grid(self, pool: int = 1) -> "DaskArray":
        """(y, x, D) embeddings as a lazy raster over the slide; nan where there are none.

        Args:
            pool: side in cells of the windows that are averaged: 1, or one of `info.pools`.
        """
        if pool == 1:
            return self._full_grid()
        self._known_pool(pool)
        return _lazy(self._array(f"pooled/{pool}/embeddings"))

    def to_xarray(self) -> "xarray.Dataset":
        """Embeddings and positions as a lazy xarray data set over "token" and "feature"."""
        from gigavim.store.views import to_xarray

        return to_xarray(self)

    def to_anndata(self, *, pool: int = 1, lazy: bool = False) -> "anndata.AnnData":
        """Embeddings as AnnData with squidpy's `obsm["spatial"]` (see `store.views`)."""
        from gigavim.store.views import to_anndata

        return to_anndata(self, pool=pool, lazy=lazy)

    @overload
    def at_level0(self, x: float, y: float) -> Floats: ...

    @overload
    def at_level0(self, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> Floats: ...

    def at_level0(self, x: Any, y: Any) -> Floats:
        """Embeddings of the patches whose centres are nearest to level-0 positions.

        Args:
            x: level-0 pixels, a number or (n,). y: alike.

        Returns:
            (D,), or (n, D); nan where no token lies.
        """
        x_all, y_all = np.broadcast_arrays(np.atleast_1d(x), np.atleast_1d(y))
        frame, grid = self.frame, self.info.grid
        col = _cell(x_all, frame.x_level0, frame.scale_x, frame.width_px, grid)
        row = _cell(y_all, frame.y_level0, frame.scale_y, frame.height_px, grid)
        inside = (col >= 0) & (row >= 0)
        found = np.full((len(col), self.info.width), np.nan, self.embeddings.dtype)
        if inside.any():
            places = np.full(len(col), -1, np.int64)
            with self._reading():
                places[inside] = self.index.vindex[row[inside], col[inside]]
            kept = places >= 0
            found[kept] = self.take(places[kept])
        return found if np.ndim(x) or np.ndim(y) else found[0]

    def take(self, places: npt.NDArray[np.integer[Any]]) -> Floats:
        """(n, D) embeddings at places in the sequence, in the order asked for."""
        unique, back = np.unique(places, return_inverse=True)
        if not len(unique):
            return np.empty((0, self.info.width), self.embeddings.dtype)
        with self._reading():
            return np.asarray(self.embeddings.oindex[unique])[back]

    def window(
        self, x_level0: float, y_level0: float, width_level0: float, height_level0: float
    ) -> TokenWindow:
        """Tokens whose patches touch a rectangle of level-0 pixels; only their chunks are read."""
        frame = self.frame
        left, right = _span(x_level0, width_level0, frame.x_level0, frame.scale_x, self.info.grid)
        top, bottom = _span(y_level0, height_level0, frame.y_level0, frame.scale_y, self.info.grid)
        with self._reading():
            cells = np.asarray(self.index[top:bottom, left:right])
        places = np.sort(cells[cells >= 0]).astype(np.int64)
        if not len(places):
            empty = np.empty((0, 2))
            return TokenWindow(places, self.take(places), empty.astype(np.int64), empty)
        with self._reading():
            return TokenWindow(
                places,
                self.take(places),
                np.asarray(self.row_col.oindex[places]).astype(np.int64),
                np.asarray(self.xy_level0.oindex[places]),
            )

    def pooled_counts(self, pool: int) -> npt.NDArray[np.int64]:
        """(y, x) tokens in each window of a pooled level."""
        self._known_pool(pool)
        with self._reading():
            return np.asarray(self._array(f"pooled/{pool}/count")[:]).astype(np.int64)

    def pooled(self, pool: int) -> "zarr.Array[Any]":
        """(y, x, D) of a pooled level."""
        self._known_pool(pool)
        return self._array(f"pooled/{pool}/embeddings")

    def _known_pool(self, pool: int) -> None:
        if pool not in self.info.pools:
            known = ", ".join(map(str, (1, *self.info.pools)))
            raise StoreError(f"{self.location}: has no level pooled by {pool}: choose from {known}")

    def _tokens(self, name: str) -> "zarr.Array[Any]":
        if not self.info.has_embeddings:
            raise StoreError(f"{self.location}: holds no embeddings")
        array = self._array(f"tokens/{name}")
        if array.shape[0] != self.info.tokens:
            raise self._damaged(f"tokens/{name}")
        return array

    def _array(self, name: str) -> "zarr.Array[Any]":
        try:
            found = self.root[name]
        except (KeyError, ValueError) as error:
            raise self._damaged(name) from error
        if not isinstance(found, zarr.Array):
            raise self._damaged(name)
        return found

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Say of what cannot be decoded that the store is damaged."""
        try:
            yield
        except (ValueError, RuntimeError, OSError) as error:
            raise StoreError(
                f"{self.location}: cannot be read ({_first_line(error)}): `gigavim verify` says"
                " what is damaged"
            ) from error

    def _damaged(self, name: str) -> StoreError:
        return StoreError(
            f"{self.location}: its part {name!r} is missing or damaged: `gigavim verify` says what"
            " is left; make the store again"
        )

    def _full_grid(self) -> "DaskArray":
        import dask.array as da

        grid, width = self.info.grid, self.info.width
        side = layout.POOL_SHARD
        chunks = da.core.normalize_chunks(  # type: ignore[no-untyped-call]
            (side, side, width), (grid.rows, grid.cols, width), dtype=self.embeddings.dtype
        )
        array: DaskArray = da.map_blocks(  # type: ignore[no-untyped-call]
            _grid_chunk, store=self, chunks=chunks, dtype=self.embeddings.dtype,
            meta=np.empty((0, 0, 0), self.embeddings.dtype),
        )  # fmt: skip
        return array


def _lazy(array: "zarr.Array[Any]") -> "DaskArray":
    import dask.array as da

    found: DaskArray = da.from_zarr(  # type: ignore[no-untyped-call]
        array, chunks=array.shards or array.chunks, inline_array=True
    )
    return found


def _grid_chunk(
    store: EmbeddingStore, block_info: dict[None, dict[str, list[tuple[int, int]]]]
) -> Floats:
    (top, bottom), (left, right), _ = block_info[None]["array-location"]
    cells = np.asarray(store.index[top:bottom, left:right])
    out = np.full((*cells.shape, store.info.width), np.nan, store.embeddings.dtype)
    kept = cells >= 0
    out[kept] = store.take(cells[kept])
    return out


def _cell(
    at_level0: npt.NDArray[Any], origin: float, scale: float, length_px: int, grid: layout.GridInfo
) -> npt.NDArray[np.int64]:
    """(n,) cells whose patches' centres are nearest along an axis, -1 outside the map."""
    at_px = np.nan_to_num((at_level0 - origin) / scale, nan=-1.0)
    nearest = np.floor((at_px - grid.patch_px / 2) / grid.stride_px + 0.5)
    last = max(0, -(-(length_px - grid.patch_px) // grid.stride_px))
    cell = np.clip(nearest, 0, last).astype(np.int64)
    return np.where((at_px >= 0) & (at_px < length_px), cell, -1)


def _span(
    start: float, length: float, origin: float, scale: float, grid: layout.GridInfo
) -> tuple[int, int]:
    """First cell and the one past the last whose patches touch an interval along an axis."""
    first_px, last_px = (start - origin) / scale, (start + length - origin) / scale
    first = math.floor((first_px - grid.patch_px) / grid.stride_px) + 1
    return max(0, first), max(0, math.ceil(last_px / grid.stride_px))


def _why_not(location: str, error: Exception) -> str:
    """Why there is no store to open."""
    folder = Path(location)
    if "://" in location or (folder / "zarr.json").is_file():
        return f"there is no embedding store, or its description is damaged ({_first_line(error)})"
    if not folder.exists():
        return "there is no embedding store"
    return "is no embedding store: `gigavim embed` makes one of a slide"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
