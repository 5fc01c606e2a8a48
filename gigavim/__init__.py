"""gigavim: whole-slide and aerial images of any size through one Vision Mamba sequence."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gigavim.conversion import convert as convert
    from gigavim.embedding import embed as embed
    from gigavim.model.checkpoint import load_model as load_model
    from gigavim.segmentation import plan_segmentation as plan_segmentation
    from gigavim.segmentation import segment as segment
    from gigavim.slides import open_slide as open_slide
    from gigavim.store import open_embeddings as open_embeddings

__version__ = "0.1.0"

# Imported when first used, so that `import gigavim` costs nothing.
_LAZY = {
    "convert": "gigavim.conversion",
    "embed": "gigavim.embedding",
    "load_model": "gigavim.model.checkpoint",
    "open_embeddings": "gigavim.store",
    "open_slide": "gigavim.slides",
    "plan_segmentation": "gigavim.segmentation",
    "segment": "gigavim.segmentation",
}
__all__ = [
    "__version__",
    "convert",
    "embed",
    "load_model",
    "open_embeddings",
    "open_slide",
    "plan_segmentation",
    "segment",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gigavim' has no attribute {name!r}")
