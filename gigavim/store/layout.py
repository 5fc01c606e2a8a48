"""The on-disk format of an embedding store, version 1. `docs/format.md` describes it for users.

A store is one zarr v3 hierarchy. Nothing outside this file knows the names and shapes of its
arrays; a change that an older reader would misread raises `MAJOR`, any other one `MINOR`.

    zarr.json              attribute "gigavim_store": `StoreInfo`
    checksums.sha256       of every other file, as `sha256sum --check` reads it
    tokens/embeddings      (n, D) float16 or float32, in scan order, after the final norm
    tokens/row_col         (n, 2) int32, the token's cell in the grid
    tokens/xy_level0       (n, 2) float64, top-left corner of its patch in level-0 pixels
    tokens/probabilities   (n, classes) float16, mean over the patch's pixels (on request)
    index                  (rows, cols) int32 or int64, place among the tokens; -1: no token there
    pooled/<p>/embeddings  (ceil(rows / p), ceil(cols / p), D) as tokens; nan where no token lies
    pooled/<p>/count       (the same, without D) uint32, tokens that the mean is of
    slide/mean             (D,) float32, of all tokens
    slide/class_tokens     (k, D) float32, where the model has class tokens
    map/labels             (height, width) uint8, the label map
    map/coverage           (rows, cols) uint8, `Coverage` of each cell
    tissue                 (h, w) uint8, what was taken for tissue (1), over `StoreInfo.tissue`
    thumbnail              (h, w, 3) uint8, the slide's bounds
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import zarr
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from zarr.codecs import BloscCodec, BloscShuffle

from gigavim.errors import StoreError
from gigavim.frames import Bounds, ClassSpec, GeoReference, MapFrame
from gigavim.tokens.order import ScanOrder

MAJOR, MINOR = 1, 1
ATTRIBUTE = "gigavim_store"
CHECKSUMS = "checksums.sha256"
SUFFIX = ".embeddings.zarr"

CHUNK_BYTES = 1 << 20
"""About what one request to object storage should bring."""
CHUNKS_PER_SHARD = 32
POSITIONS_PER_CHUNK = 1 << 16
"""Of the narrow token arrays, at most."""
POOL_SHARD = 128
"""Side in cells of a pooled level's shards."""
COARSEST_CELLS = 32
"""Pooling stops where no side of the grid has more cells."""

EmbeddingType = Literal["float16", "float32"]


class _Record(BaseModel):
    # A later minor version may say more.
    model_config = ConfigDict(extra="ignore", frozen=True)


class FrameInfo(_Record):
    """A `MapFrame` as JSON: `mpp` is null where unknown."""

    width_px: int = Field(ge=1)
    height_px: int = Field(ge=1)
    origin_xy_level0: tuple[float, float]
    scale_xy: tuple[float, float]
    mpp_xy: tuple[float, float] | None
    crs_wkt: str | None = None
    transform_level0: tuple[float, float, float, float, float, float] | None = None

    @classmethod
    def of(cls, frame: MapFrame) -> Self:
        """Take over a frame."""
        known = math.isfinite(frame.mpp_x * frame.mpp_y)
        georeference = frame.georeference
        return cls(
            width_px=frame.width_px,
            height_px=frame.height_px,
            origin_xy_level0=(frame.x_level0, frame.y_level0),
            scale_xy=(frame.scale_x, frame.scale_y),
            mpp_xy=(frame.mpp_x, frame.mpp_y) if known else None,
            crs_wkt=None if georeference is None else georeference.crs_wkt,
            transform_level0=None if georeference is None else georeference.transform,
        )

    def frame(self) -> MapFrame:
        """The frame again."""
        georeference = None
        if self.crs_wkt is not None and self.transform_level0 is not None:
            georeference = GeoReference(self.crs_wkt, self.transform_level0)
        return MapFrame(
            self.width_px, self.height_px, *self.origin_xy_level0, *self.scale_xy,
            *(self.mpp_xy or (math.nan, math.nan)), georeference,
        )  # fmt: skip


class GridInfo(_Record):
    """The grid of patches."""

    rows: int = Field(ge=1)
    cols: int = Field(ge=1)
    patch_px: int = Field(ge=1)
    stride_px: int = Field(ge=1)
    order: str
    """As `ScanOrder` writes it."""

    @property
    def scan_order(self) -> ScanOrder:
        """`order`, parsed."""
        return ScanOrder.parse(self.order)


class SlideInfo(_Record):
    """The slide that a store was made of."""

    name: str
    path: str
    fingerprint: str
    bounds_level0: tuple[int, int, int, int]
    """x, y, width, height."""
    size_level0: tuple[int, int]
    """width, height."""

    @property
    def bounds(self) -> Bounds:
        """`bounds_level0` as a record."""
        return Bounds(*self.bounds_level0)


class StoreInfo(_Record):
    """Everything about a store that is not an array."""

    version: tuple[int, int]
    slide: SlideInfo
    frame: FrameInfo
    grid: GridInfo
    tissue: FrameInfo
    classes: tuple[ClassSpec, ...]
    tokens: int = Field(ge=0)
    width: int = Field(ge=1)
    """D, the numbers per embedding."""
    has_embeddings: bool
    """False while a run without embeddings keeps its map in this layout."""
    pools: tuple[int, ...] = ()
    slide_embedding: Literal["mean", "class_tokens"] = "mean"
    """Which of the two arrays the model's card holds for *the* slide embedding."""
    class_pixels: tuple[int, ...] | None = None
    """How many pixels of the label map each class has; since 1.1."""
    facts: dict[str, Any] = {}
    """What a summary says beyond the map: tokens, plan, seconds, provenance."""

    @property
    def provenance(self) -> dict[str, Any]:
        """How the store was made."""
        found = self.facts.get("provenance", {})
        return dict(found)


@dataclass(frozen=True, slots=True)
class TokenArrays:
    """The shapes of the token arrays."""

    tokens: int
    width: int
    dtype: EmbeddingType

    @property
    def chunk(self) -> int:
        """Tokens per chunk: a power of two of about `CHUNK_BYTES`."""
        row_bytes = self.width * (2 if self.dtype == "float16" else 4)
        wanted = 1 << max(6, (CHUNK_BYTES // row_bytes).bit_length() - 1)
        return min(wanted, 1 << max(0, (self.tokens - 1).bit_length())) if self.tokens else 1

    @property
    def shard(self) -> int:
        """Tokens per shard, a multiple of `chunk`; the writer fills one at a time."""
        return self.chunk * min(CHUNKS_PER_SHARD, max(1, -(-self.tokens // self.chunk)))

    @property
    def narrow_chunk(self) -> int:
        """Tokens per chunk of the arrays of a few numbers per token; divides `shard`."""
        chunks = self.shard // self.chunk
        most = max(1, POSITIONS_PER_CHUNK // self.chunk)
        return self.chunk * max(k for k in range(1, chunks + 1) if chunks % k == 0 and k <= most)


def pool_factors(rows: int, cols: int) -> tuple[int, ...]:
    """Sides in cells of the windows that embeddings are pooled over: 2, 4, 8, ..."""
    factors, pool = [], 2
    while max(rows, cols) * 2 > COARSEST_CELLS * pool:
        factors.append(pool)
        pool *= 2
    return tuple(factors)


def create_tokens(
    root: zarr.Group, arrays: TokenArrays, *, classes: int | None
) -> dict[str, "zarr.Array[Any]"]:
    """Make the token arrays, by name; `classes` columns of probabilities where wanted."""
    group = root.create_group("tokens")
    columns: list[tuple[str, int, str, str]] = [
        ("embeddings", arrays.width, arrays.dtype, "feature"),
        ("row_col", 2, "int32", "row_col"),
        ("xy_level0", 2, "float64", "xy"),
    ]
    if classes is not None:
        columns.append(("probabilities", classes, "float16", "class"))
    return {
        name: group.create_array(
            name,
            shape=(arrays.tokens, width),
            chunks=(arrays.chunk if name == "embeddings" else arrays.narrow_chunk, width),
            shards=(arrays.shard, width),
            dtype=dtype,
            fill_value=0,
            compressors=codec(),
            dimension_names=("token", dimension),
        )
        for name, width, dtype, dimension in columns
    }


def create_pooled(
    root: zarr.Group, pool: int, *, rows: int, cols: int, width: int, dtype: EmbeddingType
) -> tuple["zarr.Array[Any]", "zarr.Array[Any]"]:
    """Make the arrays of one pooled level: embeddings and count."""
    height, across = -(-rows // pool), -(-cols // pool)
    group = root.create_group(f"pooled/{pool}")
    row_bytes = width * (2 if dtype == "float16" else 4)
    side = POOL_SHARD
    while side > 8 and side**2 * row_bytes > CHUNK_BYTES:
        side //= 2
    embeddings = group.create_array(
        "embeddings", shape=(height, across, width), chunks=(side, side, width),
        shards=(POOL_SHARD, POOL_SHARD, width), dtype=dtype, fill_value=math.nan,
        dimension_names=("y", "x", "feature"), compressors=codec(),
    )  # fmt: skip
    count = group.create_array(
        "count", shape=(height, across), chunks=(POOL_SHARD, POOL_SHARD), dtype="uint32",
        fill_value=0, dimension_names=("y", "x"), compressors=codec(),
    )  # fmt: skip
    return embeddings, count


def create_plain(
    root: zarr.Group, name: str, shape: Sequence[int], dtype: str, dimensions: Sequence[str],
    *, fill_value: int = 0,
) -> "zarr.Array[Any]":  # fmt: skip
    """Make an array of moderate size, in chunks of at most 1,024 a side."""
    return root.create_array(
        name,
        shape=tuple(shape),
        chunks=tuple(max(1, min(side, 1024)) for side in shape),
        dtype=dtype,
        fill_value=fill_value,
        compressors=codec(),
        dimension_names=tuple(dimensions),
    )


def codec() -> BloscCodec:
    """The compression of every array of a store: any zarr v3 reader has it."""
    return BloscCodec(cname="lz4", clevel=1, shuffle=BloscShuffle.bitshuffle)


def is_store(path: Path) -> bool:
    """Whether a folder is, or was meant to be, an embedding store."""
    try:
        return ATTRIBUTE in (path / "zarr.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def write_info(root: zarr.Group, info: StoreInfo) -> None:
    """Put the description of a store into its root."""
    plain = info.model_dump(mode="json")
    plain["classes"] = [asdict(spec) for spec in info.classes]
    root.attrs[ATTRIBUTE] = plain


def read_info(attributes: Mapping[str, Any], source: str) -> StoreInfo:
    """The description of a store, checked.

    Raises:
        StoreError: it is not there, damaged, or of a later major version.
    """
    found = attributes.get(ATTRIBUTE)
    if not isinstance(found, dict):
        raise StoreError(f"{source}: is no embedding store of gigavim (`gigavim embed` makes them)")
    version = found.get("version")
    if isinstance(version, list) and version[:1] > [MAJOR]:
        raise StoreError(
            f"{source}: is of format version {'.'.join(map(str, version))}, and this gigavim reads"
            f" {MAJOR}.x: install a newer gigavim"
        )
    try:
        return StoreInfo.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise StoreError(f"{source}: its description is damaged: {place}: {first['msg']}") from None
