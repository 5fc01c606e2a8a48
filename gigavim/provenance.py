"""How a result was made: enough to make it again, and to tell when it cannot be."""

import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from gigavim import __version__
from gigavim.choice import Choice
from gigavim.config import Settings
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
            "sha256": choice.card.sha256,
            "other_weights": settings.model.weights or None,
            "mpp": choice.mpp,
            "order": choice.card.order,
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
        "settings": settings.model_dump(mode="json"),
    }
