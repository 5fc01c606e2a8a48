"""The label map as a pyramidal OME-TIFF: palette colours, physical size, class names.

Reduced levels are SubIFDs of the first image, as OME-TIFF prescribes
(https://docs.openmicroscopy.org/ome-model/latest/ome-tiff/specification.html#sub-resolutions).
Values are labels; Bio-Formats shows them with the TIFF's colour map, as false colours.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

import numpy as np
import orjson
import tifffile

from gigavim import __version__
from gigavim.errors import OutputError
from gigavim.frames import ClassSpec, MapFrame
from gigavim.outputs.atomic import atomic_path
from gigavim.outputs.labels import LabelMap, halve

TILE_PX = 512
TOP_LEVEL_PX = 1024
"""The coarsest level has no side longer than this."""
BIGTIFF_BYTES = 0xF000_0000
"""Classic TIFF ends at 4 GiB; what might not fit when stored as it is becomes a BigTIFF."""


def write_ome_tiff(
    labels: LabelMap,
    frame: MapFrame,
    classes: Sequence[ClassSpec],
    path: str | Path,
    *,
    name: str = "segmentation",
    overwrite: bool = False,
    workers: int | None = None,
) -> None:
    """Write a label map as OME-TIFF, streamed by tiles.

    Args:
        labels: the (height, width) label map.
        frame: its placement; gives the physical size of a pixel.
        classes: name and colour of each label value.
        path: the file to write, by convention ending in `.ome.tif`.
        name: of the image, shown by viewers.
        overwrite: replace the file if it exists.
        workers: threads that compress; about half the cores if absent.

    Raises:
        OutputError: the file exists, or cannot be written.
    """
    if not labels.height or not labels.width:
        raise OutputError(f"{path}: cannot be written: the label map is empty")
    shapes = level_shapes(labels.height, labels.width)
    pixels = sum(height * width for height, width in shapes)
    uuid = uuid5(NAMESPACE_URL, f"gigavim:{name}:{labels.height}x{labels.width}")
    sized = math.isfinite(frame.mpp_x * frame.mpp_y)
    metadata = _metadata(frame, classes, name=name, uuid=str(uuid))
    with (
        atomic_path(path, overwrite=overwrite) as partial,
        # Beside the output, where there is room for it; its own files are smaller still.
        tempfile.TemporaryDirectory(prefix=".levels-", dir=partial.parent) as scratch,
        tifffile.TiffWriter(partial, bigtiff=pixels > BIGTIFF_BYTES, ome=True) as tiff,
    ):
        for level, (height, width) in enumerate(shapes):
            if level:
                # Odd levels take the second of two pixels, even ones the first: the pixel taken
                # stays within a third of a level's pixel from the centre of what it stands for.
                labels = halve(labels, Path(scratch) / str(level), offset=level % 2)
            scale_x, scale_y = frame.width_px / width, frame.height_px / height
            tiff.write(
                _tiles(labels),
                shape=(height, width),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="palette",
                colormap=colormap(classes),
                compression="zlib",
                resolution=(
                    (1e4 / (frame.mpp_x * scale_x), 1e4 / (frame.mpp_y * scale_y))
                    if sized
                    else None
                ),
                resolutionunit="CENTIMETER" if sized else "NONE",
                maxworkers=workers,
                subfiletype=1 if level else None,
                subifds=None if level else len(shapes) - 1,
                metadata=None if level else metadata,
            )


def level_shapes(height: int, width: int) -> list[tuple[int, int]]:
    """(height, width) of each level, finest first: halves, rounded up, down to `TOP_LEVEL_PX`."""
    shapes = [(height, width)]
    while max(shapes[-1]) > TOP_LEVEL_PX:
        height, width = shapes[-1]
        shapes.append((-(-height // 2), -(-width // 2)))
    return shapes


def colormap(classes: Sequence[ClassSpec]) -> np.ndarray:
    """(3, 256) uint16 TIFF colour map; values that are no class are black."""
    palette = np.zeros((3, 256), np.uint16)
    for value, spec in enumerate(classes):
        # 257 takes 0..255 onto 0..65535 exactly.
        palette[:, value] = np.multiply(spec.color_rgb, 257)
    return palette


def _tiles(labels: LabelMap) -> Iterator[np.ndarray]:
    """Tiles row by row, read several at a time."""
    for y in range(0, labels.height, TILE_PX):
        y1 = min(y + TILE_PX, labels.height)
        for x in range(0, labels.width, 4 * TILE_PX):
            window = labels.read(y, y1, x, min(x + 4 * TILE_PX, labels.width))
            for left in range(0, window.shape[1], TILE_PX):
                part = window[:, left : left + TILE_PX]
                tile = np.zeros((TILE_PX, TILE_PX), np.uint8)
                tile[: part.shape[0], : part.shape[1]] = part
                yield tile


def _metadata(
    frame: MapFrame, classes: Sequence[ClassSpec], *, name: str, uuid: str
) -> dict[str, object]:
    table = [
        {"value": value, "name": spec.name, "color": spec.color_rgb, "parent": spec.parent}
        for value, spec in enumerate(classes)
    ]
    size = {
        "PhysicalSizeX": frame.mpp_x,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": frame.mpp_y,
        "PhysicalSizeYUnit": "µm",
    }
    return (size if math.isfinite(frame.mpp_x * frame.mpp_y) else {}) | {
        "axes": "YX",
        "Creator": f"gigavim {__version__}",
        "UUID": uuid,
        "Name": name,
        "Channel": {"Name": "class"},
        "MapAnnotation": {
            "Namespace": "gigavim/classes",
            "Description": "Name of each label value",
            "Value": {str(value): spec.name for value, spec in enumerate(classes)},
        },
        "CommentAnnotation": {
            "Namespace": "gigavim/classes.json",
            "Value": orjson.dumps(table).decode(),
        },
    }
