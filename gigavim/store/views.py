"""A store as the data structures of other libraries: xarray and AnnData."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from gigavim.extras import installed

if TYPE_CHECKING:
    import anndata
    import xarray

    from gigavim.store.reader import EmbeddingStore


STRIP_PX = 256
"""Rows of the label map held at once."""


@dataclass(frozen=True, slots=True)
class Spots:
    """Where the entries of a table lie: tokens, or windows of several."""

    xy_level0: npt.NDArray[np.float64]
    """(n, 2) top-left corners."""
    row_col: npt.NDArray[np.int64]
    """(n, 2) cell of the grid, or of the pooled level."""
    side_px: int
    """Side of a spot in map pixels."""
    side_xy_level0: tuple[float, float]

    @property
    def centres_xy_level0(self) -> npt.NDArray[np.float64]:
        """(n, 2)"""
        return self.xy_level0 + np.divide(self.side_xy_level0, 2)


def spots(store: "EmbeddingStore", pool: int = 1) -> Spots:
    """Positions of the tokens in scan order or, for `pool` > 1, of windows row by row."""
    frame, grid = store.frame, store.info.grid
    if pool == 1:
        side = grid.patch_px
        xy = np.asarray(store.xy_level0[:])
        row_col = np.asarray(store.row_col[:]).astype(np.int64)
    else:
        side = (pool - 1) * grid.stride_px + grid.patch_px
        row_col = np.argwhere(store.pooled_counts(pool) > 0)
        step = pool * grid.stride_px
        origin, scale = (frame.x_level0, frame.y_level0), (frame.scale_x, frame.scale_y)
        xy = np.add(origin, row_col[:, ::-1] * np.multiply(scale, step))
    return Spots(xy, row_col, side, (side * frame.scale_x, side * frame.scale_y))


def feature_chunks(store: "EmbeddingStore", pool: int = 1) -> Iterator[npt.NDArray[np.float32]]:
    """(n, D) float32 embeddings in the order of `spots`, a shard or a row of windows at a time."""
    if pool == 1:
        array = store.embeddings
        step = (array.shards or array.chunks)[0]
        for start in range(0, array.shape[0], step):
            yield np.asarray(array[start : start + step]).astype(np.float32)
        return
    level, counts = store.pooled(pool), store.pooled_counts(pool)
    for row in range(0, len(counts), level.chunks[0]):
        band = slice(row, row + level.chunks[0])
        yield np.asarray(level[band])[counts[band] > 0].astype(np.float32)


def to_xarray(store: "EmbeddingStore") -> "xarray.Dataset":
    """Embeddings and positions as a lazy data set; `xarray` has to be installed."""
    library = installed("xarray", "xarray")
    xy, row_col = np.asarray(store.xy_level0[:]), np.asarray(store.row_col[:])
    variables: dict[str, Any] = {"embeddings": (("token", "feature"), store.dask())}
    coords: dict[str, Any] = {
        "x_level0": ("token", xy[:, 0]),
        "y_level0": ("token", xy[:, 1]),
        "row": ("token", row_col[:, 0]),
        "col": ("token", row_col[:, 1]),
    }
    if store.probabilities is not None:
        variables["probabilities"] = (("token", "class"), np.asarray(store.probabilities[:]))
        coords["class"] = [spec.name for spec in store.classes]
    attributes = {"slide": store.info.slide.name, "provenance": store.info.provenance}
    return cast("xarray.Dataset", library.Dataset(variables, coords, attributes))


def to_anndata(store: "EmbeddingStore", *, pool: int = 1, lazy: bool = False) -> "anndata.AnnData":
    """Embeddings as AnnData; the extra `gigavim[anndata]` has to be installed.

    X is (n, D) float32; `obsm["spatial"]` the centres (x, y) in level-0 pixels, as squidpy has
    them; `obs` holds tile_id, x, y, slide_id and the label at the centre; `varm["slide"]` and
    `uns["gigavim"]` the slide embedding and the provenance.

    Args:
        store: with embeddings.
        pool: side in cells of the windows that become one entry: 1, or one of `info.pools`.
        lazy: X as a dask array that is read when it is needed (`pool` 1 only).
    """
    library = installed("anndata", "anndata")
    import pandas

    where = spots(store, pool)
    centres = where.centres_xy_level0
    if lazy and pool == 1:
        x: Any = store.dask()
        x = x.astype(np.float32)
    else:
        x = np.concatenate([*feature_chunks(store, pool), np.empty((0, store.info.width))])
        x = x.astype(np.float32)
    names = [spec.name for spec in store.classes]
    obs = pandas.DataFrame(
        {
            "tile_id": np.arange(len(centres)),
            "x": where.xy_level0[:, 0],
            "y": where.xy_level0[:, 1],
            "slide_id": pandas.Categorical.from_codes(
                np.zeros(len(centres), np.int8), categories=[store.info.slide.name]
            ),
            "label": pandas.Categorical.from_codes(centre_labels(store, centres), categories=names),
        },
        index=pandas.Index(np.arange(len(centres)).astype(str)),
    )
    made = library.AnnData(X=x, obs=obs, obsm={"spatial": centres})
    made.varm["slide"] = np.asarray(store.slide_embedding)[:, None]
    made.uns["spatial"] = {
        store.info.slide.name: {
            "scalefactors": {"spot_diameter_fullres": float(max(where.side_xy_level0))}
        }
    }
    made.uns["gigavim"] = _plain(store)
    return cast("anndata.AnnData", made)


def centre_labels(
    store: "EmbeddingStore", centres: npt.NDArray[np.float64]
) -> npt.NDArray[np.uint8]:
    """(n,) labels of the map at level-0 positions (x, y); a strip of the map is held at a time."""
    frame, labels = store.frame, store.labels
    x = np.clip((centres[:, 0] - frame.x_level0) / frame.scale_x, 0, frame.width_px - 1)
    y = np.clip((centres[:, 1] - frame.y_level0) / frame.scale_y, 0, frame.height_px - 1)
    col, row = x.astype(np.int64), y.astype(np.int64)
    found = np.zeros(len(centres), np.uint8)
    order = np.argsort(row, kind="stable")
    starts = np.arange(0, frame.height_px, STRIP_PX)
    for top, first, last in zip(
        starts.tolist(),
        np.searchsorted(row[order], starts),
        np.searchsorted(row[order], starts + STRIP_PX),
    ):
        mine = order[first:last]
        if len(mine):
            strip = labels.read(top, min(top + STRIP_PX, frame.height_px), 0, frame.width_px)
            found[mine] = strip[row[mine] - top, col[mine]]
    return found


def _plain(store: "EmbeddingStore") -> dict[str, Any]:
    """Provenance in the few types that AnnData can write."""
    import orjson

    return {
        "provenance": orjson.dumps(store.info.provenance).decode(),
        "slide_embedding": store.info.slide_embedding,
    }
