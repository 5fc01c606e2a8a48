"""The slide that a store was made of, opened again."""

from pathlib import Path
from typing import TYPE_CHECKING

from gigavim.config import InputSettings
from gigavim.errors import OutputError, SlideError
from gigavim.slides import open_slide

if TYPE_CHECKING:
    from gigavim.slides.base import Slide
    from gigavim.store.reader import EmbeddingStore


def open_slide_of(store: "EmbeddingStore", path: str = "") -> "Slide":
    """Open a store's slide as it was opened when the store was made.

    Args:
        store: knows the slide's path, its fingerprint, and how its metadata were corrected.
        path: where the slide is now, if not where it was.

    Raises:
        OutputError: it is not there, or is another one.
        SlideError: it cannot be read.
    """
    known = Path(path or store.info.slide.path)
    if not known.exists():
        raise OutputError(
            f"{known}: the slide is not there, and this needs its pixels: name it with --slide FILE"
        )
    given = store.info.provenance.get("settings", {}).get("input", {})
    corrected = InputSettings.model_validate(given)
    channels = corrected.channels
    picked = (channels[0], channels[1], channels[2]) if len(channels) == 3 else None
    slide = open_slide(known, mpp=corrected.slide_mpp or None, channels=picked)
    try:
        if slide.fingerprint() != store.info.slide.fingerprint:
            raise OutputError(
                f"{known}: is not the slide that {store.location} was made of: name that one with"
                " --slide FILE"
            )
    except (OutputError, SlideError, OSError):
        slide.close()
        raise
    return slide
