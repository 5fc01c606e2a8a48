"""Every kind of head by its name."""

from typing import get_args

from gigavim.errors import ModelError
from gigavim.model.config import HeadKind, VimConfig
from gigavim.model.heads import FpnHead, Head, LinearHead
from gigavim.model.segmenter import SegmenterHead
from gigavim.model.upernet import UperNetHead


def make_head(kind: HeadKind, config: VimConfig, classes: int, width: int = 0) -> Head:
    """Make a head of a kind; `width` 0 is its default. Raises `ModelError` for other kinds."""
    match kind:
        case "linear":
            return LinearHead(config, classes)
        case "fpn":
            return FpnHead(config, classes, width)
        case "upernet":
            return UperNetHead(config, classes, width)
        case "segmenter":
            return SegmenterHead(config, classes, width)
    raise ModelError(f"no head is called {kind!r}: there are {', '.join(get_args(HeadKind))}")
