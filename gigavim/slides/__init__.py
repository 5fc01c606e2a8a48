"""Whole-slide and aerial images as RGB pixels at any resolution, whatever their format."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gigavim.slides.base import Slide

__all__ = ["open_slide"]


def open_slide(
    path: str | Path,
    *,
    mpp: float | None = None,
    channels: tuple[int, int, int] | None = None,
) -> "Slide":
    """Open a slide of any format.

    Args:
        path: a file, or a folder of OME-Zarr or DICOM.
        mpp: micrometres per level-0 pixel, where the file does not say or is wrong.
        channels: the three channels to take as red, green and blue, of a file that does not say.

    Raises:
        SlideError: if it cannot be read; the message says why and what to do.
    """
    from gigavim.slides.base import OpenOptions
    from gigavim.slides.registry import open_with_registry

    return open_with_registry(Path(path), OpenOptions(mpp=mpp, channels=channels))
