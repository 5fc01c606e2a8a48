"""Embeddings as the HDF5 files of TRIDENT, CLAM and STAMP; fields are those that each one reads.

- TRIDENT (trident/IO.py, `save_h5`): `features` and `coords`, attributes on `coords`; patches and
  slide features in files of their own.
- CLAM (create_patches_fp.py, extract_features_fp.py): the same names, other attributes, and
  `pt_files/<slide>.pt`, a bare tensor, from which its training reads.
- STAMP: `feats` and `coords` in micrometres, attributes on the root.

Coordinates of the first two are top-left corners in whole level-0 pixels.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gigavim.errors import OutputError
from gigavim.extras import installed
from gigavim.outputs.atomic import explained
from gigavim.store.views import Spots, feature_chunks, spots

if TYPE_CHECKING:
    from gigavim.store.reader import EmbeddingStore

STAMP_VERSION = "2.0.0"
"""STAMP refuses files of a version later than its own; these are of any 2.x."""


def write_trident(store: "EmbeddingStore", paths: tuple[Path, ...], *, pool: int = 1) -> None:
    """Write features, patches and slide features as TRIDENT does.

    Args:
        store: with embeddings.
        paths: of the three files, in that order.
        pool: side in cells of the windows that become one entry.

    Raises:
        OutputError: a file cannot be written, or the slide's resolution is not known.
        SettingsError: h5py is not installed.
    """
    where, encoder = spots(store, pool), encoder_name(store)
    width, height = store.info.slide.size_level0
    grid, name = store.info.grid, store.info.slide.name
    coords_attributes = {
        "patch_size": where.side_px,
        "patch_size_level0": round(where.side_xy_level0[0]),
        "level0_magnification": _magnification(_level0_mpp(store)),
        "target_magnification": _magnification(store.frame.mpp_x),
        "overlap": grid.patch_px - grid.stride_px,
        "name": Path(name).stem,
        "savetodir": ".",
        "level0_width": width,
        "level0_height": height,
    }
    coords = np.round(where.xy_level0).astype(np.int64)
    about = {"name": Path(name).stem, "savetodir": ".", "encoder": encoder}
    with _created(paths[0]) as file:
        _write_features(file, "features", store, where, pool, about)
        _write(file, "coords", coords, coords_attributes)
    with _created(paths[1]) as file:
        _write(file, "coords", coords, coords_attributes)
    with _created(paths[2]) as file:
        _write(file, "features", np.asarray(store.slide_embedding, np.float32), about)
        _write(file, "coords", coords, coords_attributes)


def write_clam(store: "EmbeddingStore", paths: tuple[Path, ...], *, pool: int = 1) -> None:
    """Write CLAM's feature file, its tensor for training, and its patch file, in that order.

    Raises:
        OutputError: a file cannot be written.
        SettingsError: h5py is not installed.
    """
    where = spots(store, pool)
    width, height = store.info.slide.size_level0
    attributes = {
        "patch_size": round(where.side_xy_level0[0]),
        "patch_level": 0,
        "downsample": np.ones(2),
        "downsampled_level_dim": np.array([width, height]),
        "level_dim": np.array([width, height]),
        "name": Path(store.info.slide.name).stem,
        "save_path": ".",
    }
    coords = np.round(where.xy_level0).astype(np.int32)
    with _created(paths[0]) as file:
        _write_features(file, "features", store, where, pool, {})
        _write(file, "coords", coords, {})
    _write_tensor(store, paths[1], len(coords), pool)
    with _created(paths[2]) as file:
        _write(file, "coords", coords, attributes)


def write_stamp(store: "EmbeddingStore", paths: tuple[Path, ...], *, pool: int = 1) -> None:
    """Write STAMP's feature file.

    Raises:
        OutputError: the file cannot be written, or the slide's resolution is not known.
        SettingsError: h5py is not installed.
    """
    where, frame = spots(store, pool), store.frame
    _level0_mpp(store)  # there has to be one
    um_per_level0_px = np.divide((frame.mpp_x, frame.mpp_y), (frame.scale_x, frame.scale_y))
    weights = str(store.info.provenance.get("model", {}).get("sha256", ""))
    with _created(paths[0]) as file:
        file.attrs["stamp_version"] = STAMP_VERSION
        file.attrs["extractor"] = encoder_name(store)
        file.attrs["unit"] = "um"
        file.attrs["tile_size_um"] = float(where.side_px * frame.mpp_x)
        file.attrs["tile_size_px"] = where.side_px
        file.attrs["code_hash"] = weights[:8]
        file.attrs["feat_type"] = "tile"
        _write_features(file, "feats", store, where, pool, {})
        _write(file, "coords", (where.xy_level0 * um_per_level0_px).astype(np.float32), {})


def encoder_name(store: "EmbeddingStore") -> str:
    """What other tools call the encoder: "gigavim-" and the model's name."""
    model = store.info.provenance.get("model", {})
    return f"gigavim-{model.get('name', 'unknown')}"


@contextmanager
def _created(path: Path) -> Iterator[Any]:
    h5py = installed("h5py", "h5")
    with explained(path), h5py.File(path, "w") as file:
        yield file


def _write(file: Any, name: str, values: npt.NDArray[Any], attributes: Mapping[str, Any]) -> None:
    dataset = file.create_dataset(name, data=values, track_times=False)
    for key, value in attributes.items():
        dataset.attrs[key] = value


def _write_features(
    file: Any,
    name: str,
    store: "EmbeddingStore",
    where: Spots,
    pool: int,
    attributes: Mapping[str, Any],
) -> None:
    count, width = len(where.xy_level0), store.info.width
    dataset = file.create_dataset(
        name, shape=(count, width), dtype="float32", chunks=(max(1, min(count, 4096)), width),
        track_times=False,
    )  # fmt: skip
    filled = 0
    for part in feature_chunks(store, pool):
        dataset[filled : filled + len(part)] = part
        filled += len(part)
    for key, value in attributes.items():
        dataset.attrs[key] = value


def _write_tensor(store: "EmbeddingStore", path: Path, count: int, pool: int) -> None:
    """A (count, D) float32 tensor by `torch.save`, gathered in a file and not in memory."""
    import torch

    with explained(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".tensor-") as folder:
        shape = (count, store.info.width)
        rows = np.memmap(Path(folder) / "rows", np.float32, "w+", shape=shape) if count else None
        filled = 0
        for part in feature_chunks(store, pool):
            if rows is not None:
                rows[filled : filled + len(part)] = part
            filled += len(part)
        # By a handle: given a path, torch puts the file's temporary name into the file.
        with path.open("wb") as file:
            torch.save(torch.empty(shape) if rows is None else torch.from_numpy(rows), file)


def _magnification(mpp: float) -> int | float:
    """Of a scan of `mpp` by the convention 10 / mpp, whole where it nearly is."""
    exact = 10 / mpp
    return round(exact) if abs(exact - round(exact)) < 0.05 * exact else exact


def _level0_mpp(store: "EmbeddingStore") -> float:
    mpp = store.frame.mpp_x / store.frame.scale_x
    if not math.isfinite(mpp):
        raise OutputError(
            f"{store.info.slide.name}: this format states a resolution, and the slide's is not"
            " known: embed it again with --slide-mpp"
        )
    return mpp
