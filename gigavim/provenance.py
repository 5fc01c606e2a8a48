"""How a result was made: enough to make it again, and to tell when it cannot be."""

import hashlib
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gigavim import __version__
from gigavim.choice import Choice
from gigavim.config import OutputSettings, Settings
from gigavim.engine.plan import Plan
from gigavim.slides.base import Slide
from gigavim_kernels.backends import backend_name

LIBRARIES = ("torch", "numpy", "openslide-python", "openslide-bin", "tifffile", "imagecodecs",
             "rasterio", "zarr", "dask")  # fmt: skip


def provenance(slide: Slide, choice: Choice, plan: Plan, settings: Settings) -> dict[str, Any]:
    """Versions, model, reader, input fingerprint and settings of a run, as plain data."""
    return {
        "gigavim": __version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "model": {
            "name": choice.card.name,
            "sha256": _weights_sha256(choice, settings),
            "other_weights": settings.model.weights or None,
            "mpp": choice.mpp,
            "order": choice.card.order,
            "context": _context(settings),
        },
        "input": {
            "reader": slide.reader,
            "mpp": None if slide.mpp is None else asdict(slide.mpp),
            "fingerprint": slide.fingerprint(),
            "description": dict(slide.description),
        },
        "device": plan.device,
        "backend": backend_name(plan.device),
        "precision": plan.precision,
        "chunk": plan.chunk,
        # Where and as what results were written is no part of how they were made.
        "settings": settings.model_dump(
            mode="json", exclude={"output": set(OutputSettings.model_fields) - {"max_unreadable"}}
        ),
    }


def _context(settings: Settings) -> str:
    """What a pixel's class depended on, for people."""
    if settings.model.context == "slide":
        return "slide"
    return f"windows of {settings.model.window_px} px"


def _weights_sha256(choice: Choice, settings: Settings) -> str:
    """Of the weights that ran: the card's own, or those given in their place."""
    if not settings.model.weights:
        return choice.card.sha256
    with Path(settings.model.weights).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
