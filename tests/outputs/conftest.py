from pathlib import Path

import numpy as np
import pytest

from gigavim.frames import ClassSpec, MapFrame
from gigavim.outputs.labels import LabelStore

CLASSES = (
    ClassSpec("background", (255, 255, 255), object_type="none"),
    ClassSpec("tissue", (220, 40, 60)),
    ClassSpec("nuclei", (30, 40, 200), parent="tissue", object_type="detection"),
)


@pytest.fixture
def classes():
    return CLASSES


@pytest.fixture
def store(tmp_path: Path):
    """Build a label store from an array, in a folder that no writer sees."""

    def build(labels: np.ndarray, coverage: np.ndarray | None = None, cell_px: int = 16):
        height, width = labels.shape
        cells_hw = (-(-height // cell_px), -(-width // cell_px))
        made = LabelStore.create(
            tmp_path / "scratch" / "labels",
            height=height,
            width=width,
            cell_px=cell_px,
            cells_hw=cells_hw,
        )
        made.write_rows(0, labels)
        made.write_coverage(0, 0, np.ones(cells_hw, np.uint8) if coverage is None else coverage)
        return made

    return build


@pytest.fixture
def frame_of():
    """The frame of a map that begins at a bounds offset, at a scale that is no integer."""

    def build(labels: np.ndarray, scale_xy=(2.004, 1.996), **more) -> MapFrame:
        return MapFrame(
            width_px=labels.shape[1],
            height_px=labels.shape[0],
            x_level0=1037.0,
            y_level0=513.0,
            scale_x=scale_xy[0],
            scale_y=scale_xy[1],
            mpp_x=0.5,
            mpp_y=0.5,
            **more,
        )

    return build
