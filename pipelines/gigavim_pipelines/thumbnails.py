"""Small pictures of slides with their results over them, for the report."""

from collections.abc import Mapping
from pathlib import Path

THUMBNAIL = "thumbnail"
SIDE_PX = 200


def add_thumbnail(outputs: Mapping[str, Path], folder: Path, slide_id: str) -> dict[str, Path]:
    """Make a thumbnail of a slide's overlay, if it has one; return the outputs with it."""
    overlay = outputs.get("overlay")
    if overlay is None or THUMBNAIL in outputs:
        return dict(outputs)
    from PIL import Image

    path = folder / f"{slide_id}.thumb.jpg"
    with Image.open(overlay) as picture:
        small = picture.convert("RGB")
        small.thumbnail((SIDE_PX, SIDE_PX))
        small.save(path, format="JPEG", quality=80)
    return {**outputs, THUMBNAIL: path}
