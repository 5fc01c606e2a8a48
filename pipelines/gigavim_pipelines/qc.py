"""Is a slide fit for use? Resolution, tissue, focus, stain and damage, without a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from PIL import Image
from scipy import ndimage

from gigavim.config import Settings
from gigavim.names import as_text, result_stem
from gigavim.outputs.atomic import OutputSet
from gigavim.slides import open_slide
from gigavim.slides.base import RGB, Slide
from gigavim.tokens.tissue import TissueMask, tissue_mask

FIELDS = 32
"""Places in the tissue that are looked at closely."""
FIELD_PX = 256
FIELD_MPP = 0.5
"""Focus is judged at the resolution at which most models work."""
BLURRED_BELOW = 0.12
"""Of `fine_detail`. H&E in focus (CMU-1 and OS-1 of OpenSlide's test data, NuInsSeg) measures 0.22
and more, the same blurred by a Gaussian of 1.5 pixels 0.11 and less."""
GLASS_BELOW = 6.0
"""Standard deviation of the brightness of a field with nothing in it, noise and JPEG included."""
ROUNDING = 20 / 12
"""What rounding pixels to whole numbers (variance 1/12) adds to the variance of their Laplacian,
the squares of whose weights sum to 20."""
LITTLE_TISSUE = 0.01
PALE_BELOW = 0.08
"""Mean saturation (0 to 1) of stained tissue; unstained sections have less."""
PICTURE_PX = 1024
OUTLINE_RGB = (0, 160, 0)


@dataclass(frozen=True, slots=True)
class QualityCheck:
    """What `check_quality` made."""

    outputs: dict[str, Path]
    summary: dict[str, Any]


def check_quality(
    path: str | Path, *, settings: Settings, stem: str | None = None, progress: object = None
) -> QualityCheck:
    """Look at a slide as far as needed to say whether it is fit for use.

    Args:
        path: a slide.
        settings: `input` and `tokens.tissue` are heeded, results go to `output.directory`.
        stem: first part of the results' names; the slide's own if absent.
        progress: not told; it takes a second.

    Returns:
        `STEM.qc.json` with measures and warnings, `STEM.qc.png` with the tissue outlined.

    Raises:
        SlideError: the slide cannot be read at all.
        OutputError: the results cannot be written.
    """
    path, channels = Path(path), settings.input.channels
    folder, stem = Path(settings.output.directory), stem or result_stem(path)
    targets = {"qc": folder / f"{stem}.qc.json", "overlay": folder / f"{stem}.qc.png"}
    picked = (channels[0], channels[1], channels[2]) if len(channels) == 3 else None
    with (
        open_slide(path, mpp=settings.input.slide_mpp or None, channels=picked) as slide,
        OutputSet(overwrite=settings.output.overwrite) as outputs,
    ):
        parts = {kind: outputs.path(target) for kind, target in targets.items()}
        mode = settings.tokens.tissue
        tissue = tissue_mask(slide, mode=mode if mode in ("auto", "none") else Path(mode))
        measures = measure(slide, tissue)
        summary = {
            "slide": as_text(path),
            "reader": slide.reader,
            "width_px": slide.levels[0].width,
            "height_px": slide.levels[0].height,
            "levels": len(slide.levels),
            "mpp": None if slide.mpp is None else slide.mpp.x,
            **measures,
            "warnings": warnings(slide, measures),
        }
        parts["qc"].write_bytes(orjson.dumps(summary, option=orjson.OPT_INDENT_2))
        _picture(slide, tissue).save(parts["overlay"], format="PNG")
    return QualityCheck(targets, summary)


def measure(slide: Slide, tissue: TissueMask) -> dict[str, Any]:
    """Tissue, and from up to 32 fields spread over it: focus, saturation, what cannot be read.

    Tissue is what a model would be shown: found and widened, with glass around it. Fields of glass
    alone are not judged.
    """
    share = tissue.share
    area_mm2 = None
    if slide.mpp is not None:
        frame = tissue.frame
        cell = frame.scale_x * frame.scale_y * slide.mpp.x * slide.mpp.y
        area_mm2 = round(float(tissue.mask.sum()) * cell / 1e6, 4)
    details, saturations, unreadable = [], [], 0
    centres = _spread(tissue)
    for x_level0, y_level0 in centres:
        pixels, bad = _field(slide, x_level0, y_level0)
        if bad:
            unreadable += 1
            continue
        if float(pixels.mean(-1).std()) < GLASS_BELOW:
            continue
        details.append(fine_detail(pixels))
        saturations.append(_saturation(pixels))
    fields = len(details)
    return {
        "tissue_fraction": round(share, 4),
        "tissue_mm2": area_mm2,
        "fields": len(centres),
        "judged_fields": fields,
        "unreadable_fields": unreadable,
        "fine_detail": round(float(np.median(details)), 4) if fields else None,
        "blurred_fraction": round(float(np.mean(np.array(details) < BLURRED_BELOW)), 4)
        if fields
        else None,
        "saturation": round(float(np.median(saturations)), 4) if fields else None,
    }


def warnings(slide: Slide, measures: dict[str, Any]) -> list[str]:
    """What its owner should look at."""
    found = []
    if slide.mpp is None:
        found.append("no mpp")
    if measures["tissue_fraction"] == 0:
        found.append("no tissue")
    elif measures["tissue_fraction"] < LITTLE_TISSUE:
        found.append("little tissue")
    if measures["unreadable_fields"]:
        found.append("unreadable tiles")
    if measures["blurred_fraction"] is not None and measures["blurred_fraction"] > 0.5:
        found.append("out of focus")
    if measures["saturation"] is not None and measures["saturation"] < PALE_BELOW:
        found.append("pale or unstained")
    return found


def fine_detail(pixels: RGB) -> float:
    """Energy of the finest detail of (h, w, 3) over that of detail twice as coarse.

    The variance of the Laplacian of the brightness at full and at half resolution, less what
    rounding adds; their ratio does not depend on contrast or stain, as the variance alone does. 0
    where there is no detail at all.
    """
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    height, width = grey.shape[0] // 2 * 2, grey.shape[1] // 2 * 2
    half = grey[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3))
    fine = float(ndimage.laplace(grey).var()) - ROUNDING
    coarse = float(ndimage.laplace(half).var()) - ROUNDING / 4
    return max(fine, 0.0) / coarse if coarse > ROUNDING / 4 else 0.0


def _saturation(pixels: RGB) -> float:
    """Mean saturation (HSV, 0 to 1) of the half of the pixels that is darkest: the tissue's."""
    values = pixels.reshape(-1, 3).astype(np.float32)
    dark = values[np.argsort(values.sum(1))[: max(len(values) // 2, 1)]]
    high = dark.max(1)
    return float(((high - dark.min(1)) / np.maximum(high, 1)).mean())


def _spread(tissue: TissueMask) -> list[tuple[float, float]]:
    """Level-0 centres of up to `FIELDS` mask pixels, evenly spread in reading order."""
    rows, cols = np.nonzero(tissue.mask)
    chosen = np.unique(np.linspace(0, len(rows) - 1, FIELDS).astype(int)) if len(rows) else ()
    frame = tissue.frame
    return [
        (
            frame.x_level0 + (float(cols[index]) + 0.5) * frame.scale_x,
            frame.y_level0 + (float(rows[index]) + 0.5) * frame.scale_y,
        )
        for index in chosen
    ]


def _field(slide: Slide, x_level0: float, y_level0: float) -> tuple[RGB, bool]:
    """Pixels around a place at 0.5 um, finer only if the slide is coarser; whether unreadable.

    Of a slide that is smaller than a field, by what it or its owner says of its mpp, all of it.
    """
    whole = max(slide.bounds.width_level0, slide.bounds.height_level0) / FIELD_PX
    scale = 1.0 if slide.mpp is None else max(min(FIELD_MPP / slide.mpp.x, whole), 1.0)
    half = FIELD_PX * scale / 2
    pixels, bad = slide.read_salvage(
        round(x_level0 - half), round(y_level0 - half), FIELD_PX, FIELD_PX, scale_xy=(scale, scale)
    )
    return pixels, bad is not None


def _picture(slide: Slide, tissue: TissueMask) -> Image.Image:
    """A small picture of the slide's bounds, the tissue outlined."""
    picture = slide.thumbnail(PICTURE_PX).copy()
    height, width = picture.shape[:2]
    mask = Image.fromarray(_over_bounds(slide, tissue)).resize(
        (width, height), Image.Resampling.BOX
    )
    inside = np.asarray(mask) > 127
    outline = inside & ~ndimage.binary_erosion(inside, iterations=2, border_value=0)
    picture[outline] = OUTLINE_RGB
    return Image.fromarray(picture)


def _over_bounds(slide: Slide, tissue: TissueMask) -> npt.NDArray[np.uint8]:
    """The mask as 0 and 255 over the slide's bounds, which a mask file need not share."""
    bounds, frame = slide.bounds, tissue.frame
    height, width = tissue.mask.shape
    x = bounds.x_level0 + (np.arange(width) + 0.5) * bounds.width_level0 / width
    y = bounds.y_level0 + (np.arange(height) + 0.5) * bounds.height_level0 / height
    cols = np.floor((x - frame.x_level0) / frame.scale_x).astype(int)
    rows = np.floor((y - frame.y_level0) / frame.scale_y).astype(int)
    known = ((rows >= 0) & (rows < height))[:, None] & ((cols >= 0) & (cols < width))
    picked = tissue.mask[np.clip(rows, 0, height - 1)][:, np.clip(cols, 0, width - 1)]
    return np.where(known & picked, 255, 0).astype(np.uint8)
