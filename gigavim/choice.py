"""Which model runs on a slide, and at which resolution."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gigavim.config import ModelSettings
from gigavim.errors import ModelError
from gigavim.frames import length_text
from gigavim.model.card import ModelCard, is_encoder
from gigavim.model.checkpoint import filled, load_model

if TYPE_CHECKING:
    import torch

    from gigavim.model.segmentation import SegmentationModel
    from gigavim.slides.base import Slide

log = logging.getLogger(__name__)

SLIDE_MODEL, SMALL_SLIDE_MODEL = "histo-nuclei", "histo-nuclei-nano"
RASTER_MODEL = "aerial-landcover"
PICKLED = (".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True, slots=True)
class Choice:
    """A model made for a slide, and the resolution at which it sees it."""

    model: "SegmentationModel"
    card: ModelCard
    mpp: float | None
    """Micrometres per pixel; None where the slide's level-0 pixels are taken as they are."""
    warnings: tuple[str, ...] = ()
    """Why the model may be wrong for the slide; one sentence each."""


def choose_model(slide: "Slide", settings: ModelSettings, device: "torch.device") -> Choice:
    """Load the model that the settings name, or the default for the kind of image; check the fit.

    A slide fits when its mpp is known and within the card's range. With `allow_mpp_mismatch` any
    slide will do: one that is finer than the model's mpp is still brought to it, any other is seen
    pixel by pixel as it is. What only looks wrong, such as a dark background where the model
    expects a bright one, is logged as a warning and kept in `Choice.warnings`.

    Raises:
        ModelError: no model fits, or it is not the slide's resolution or kind.
        MissingMppError: the slide does not state its mpp, and one is needed.
    """
    name = settings.name if settings.name != "auto" else default_model(slide, device)
    model, card = load_model(name)
    if settings.weights:
        model = load_other_weights(card, Path(settings.weights))
    mpp = resolution(slide, card, settings)
    warnings = _warnings(slide, card)
    for warning in warnings:
        log.warning("%s: %s", slide.path, warning)
    return Choice(model, card, mpp, warnings)


def resolution(slide: "Slide", card: ModelCard, settings: ModelSettings) -> float | None:
    """The mpp at which the model sees the slide; see `choose_model`."""
    from gigavim.tokens.grid import missing_mpp

    wanted = settings.mpp or card.mpp
    finest, coarsest = card.mpp_range
    if settings.allow_mpp_mismatch:
        if slide.mpp is None:
            return None
        own = (slide.mpp.x * slide.mpp.y) ** 0.5
        return wanted if settings.mpp or own <= coarsest * 1.05 else None
    if slide.mpp is None:
        raise missing_mpp(slide.path)
    own = (slide.mpp.x * slide.mpp.y) ** 0.5
    # A finer scan is brought to the model's resolution; a coarser one lacks the detail.
    if own > coarsest * 1.05 or not finest * 0.95 <= wanted <= coarsest * 1.05:
        seen, origin = (own, slide.mpp.source) if own > coarsest * 1.05 else (wanted, "model.mpp")
        trained = f"{length_text(finest)} to {length_text(coarsest)}"
        asked = "leave out --mpp and --mag, " if settings.mpp else ""
        raise ModelError(
            f"{slide.path}: {card.name} was trained for {trained} per pixel, this would be "
            f"{length_text(seen)} (from {origin}). Choose another --model, correct the file's "
            f"resolution with --slide-mpp, {asked}or insist with "
            "--allow-mpp-mismatch."
        )
    return wanted


def _warnings(slide: "Slide", card: ModelCard) -> tuple[str, ...]:
    from gigavim.tokens.illumination import has_dark_background

    if card.illumination != "brightfield" or not has_dark_background(slide):
        return ()
    return (
        f"looks like fluorescence (its background is dark), but {card.name} was trained on "
        "brightfield slides: its result will mean little. Choose another --model.",
    )


def load_other_weights(card: ModelCard, path: Path) -> "SegmentationModel":
    """A model of the card's architecture with the weights of another safetensors file.

    Raises:
        ModelError: the file cannot be read, or its tensors do not fit.
    """
    from gigavim.model.weights import read_safetensors

    if path.suffix in PICKLED or (path.is_dir() and is_encoder(path)):
        raise ModelError(
            f"{path}: --weights takes a safetensors file of a whole segmentation model here; an "
            "encoder (`gigavim models import` turns published .pth files into one) is what "
            "`gigavim train --weights` starts from"
        )
    return filled(card, read_safetensors(path), path)


def default_model(slide: "Slide", device: "torch.device") -> str:
    """The shipped model for a kind of image: for slides the small one, unless a GPU runs it."""
    if slide.georeference is not None:
        return RASTER_MODEL
    return SLIDE_MODEL if device.type == "cuda" else SMALL_SLIDE_MODEL
