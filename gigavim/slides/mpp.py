"""How many micrometres a pixel covers: every source of it, and which to believe."""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gigavim.errors import SettingsError
from gigavim.frames import Mpp

log = logging.getLogger(__name__)

MICROSCOPE_UM = (0.02, 100.0)
"""Micrometres per pixel that a microscope or slide scanner may have."""

CONTRADICTION = 0.05

PRINT_DPI = frozenset(
    (72, 75, 90, 96, 100, 120, 150, 180, 200, 220, 240, 250, 300, 350, 360, 400, 600)
)
"""Dots per inch that image programs write when they know nothing."""

UM_PER_UNIT = {
    "m": 1e6,
    "cm": 1e4,
    "mm": 1e3,
    "micron": 1.0,
    "um": 1.0,
    "\\u00b5m": 1.0,
    "\u00b5m": 1.0,
    "\u03bcm": 1.0,
    "nm": 1e-3,
    "pm": 1e-6,
    "inch": 25_400.0,
    "meter": 1e6,
    "metre": 1e6,
    "centimeter": 1e4,
    "millimeter": 1e3,
    "micrometer": 1.0,
    "micrometre": 1.0,
    "microns": 1.0,
    "nanometer": 1e-3,
    "angstrom": 1e-4,
}


def choose_mpp(
    path: Path, claims: Iterable[Mpp | None], *, user: float | None = None
) -> Mpp | None:
    """Return the first sensible claim; the user's goes before all.

    Claims outside what microscopes have are dropped; those more than 5 % apart are warned about.

    Args:
        path: the file, for messages.
        claims: what the file's sources say, the most trusted first.
        user: what the user says.

    Raises:
        SettingsError: if the user's value is no positive number.
    """
    believed: Mpp | None = None
    for claim in claims:
        if claim is None:
            continue
        if not is_sensible(claim):
            log.warning(
                "%s: %s says %.4g x %.4g um per pixel, which no scanner has; not used",
                path,
                claim.source,
                claim.x,
                claim.y,
            )
        elif believed is None:
            believed = claim
        elif _differ(believed, claim):
            log.warning(
                "%s: %s says %.4g um per pixel, but %s says %.4g; the first is used "
                "(--slide-mpp overrides)",
                path,
                believed.source,
                believed.x,
                claim.source,
                claim.x,
            )
    return override(path, believed, user)


def override(path: Path, believed: Mpp | None, user: float | None) -> Mpp | None:
    """Return the user's mpp if given, warning where the file contradicts it."""
    if user is None:
        return believed
    if not (math.isfinite(user) and user > 0):
        raise SettingsError(f"mpp of {path} must be a positive number of micrometres, not {user}")
    chosen = Mpp(user, user, "user")
    if believed is not None and _differ(believed, chosen):
        log.warning(
            "%s: %s says %.4g um per pixel; the %.4g given is used",
            path,
            believed.source,
            believed.x,
            user,
        )
    return chosen


def is_sensible(claim: Mpp) -> bool:
    """Whether a microscope or slide scanner may have this pixel size."""
    low, high = MICROSCOPE_UM
    return all(math.isfinite(um) and low <= um <= high for um in (claim.x, claim.y))


def _differ(one: Mpp, other: Mpp) -> bool:
    return any(
        abs(a - b) > CONTRADICTION * max(a, b) for a, b in ((one.x, other.x), (one.y, other.y))
    )


def from_properties(properties: Mapping[str, str]) -> list[Mpp]:
    """Read the claims among OpenSlide's properties."""
    claims = []
    for name_x, name_y in (("openslide.mpp-x", "openslide.mpp-y"), ("aperio.MPP", "aperio.MPP")):
        # Of a plain TIFF OpenSlide's figure is that of the resolution tags, which come below.
        if properties.get("openslide.vendor") == "generic-tiff":
            break
        x, y = _number(properties.get(name_x)), _number(properties.get(name_y))
        if x is not None and y is not None:
            claims.append(Mpp(x, y, name_x))
    unit = properties.get("tiff.ResolutionUnit", "inch")
    resolution = from_resolution(
        _number(properties.get("tiff.XResolution")),
        _number(properties.get("tiff.YResolution")),
        unit,
    )
    return [*claims, resolution] if resolution is not None else claims


def from_resolution(x: float | None, y: float | None, unit: str) -> Mpp | None:
    """Read TIFF's resolution tags (pixels per `unit`); None where they are print defaults."""
    um = UM_PER_UNIT.get(unit.lower())
    if um is None or not x or not y or x <= 0 or y <= 0:
        return None
    claim = Mpp(um / x, um / y, "TIFF resolution")
    dpi = 25_400 / claim.x
    if abs(dpi - round(dpi)) < 0.02 and round(dpi) in PRINT_DPI:
        log.info("the resolution of %g dpi is a print default and not used as pixel size", dpi)
        return None
    return claim


def from_description(text: str) -> Mpp | None:
    """Read Aperio's `MPP = 0.499` in a TIFF ImageDescription."""
    match = re.search(r"\bMPP\s*=\s*([0-9.eE+-]+)", text)
    value = _number(match.group(1)) if match else None
    return Mpp(value, value, "ImageDescription") if value is not None else None


def from_ome(
    x: str | None, y: str | None, unit_x: str | None = None, unit_y: str | None = None
) -> Mpp | None:
    """Read PhysicalSizeX and PhysicalSizeY of OME-XML; the unit's default is the micrometre."""
    um_x = UM_PER_UNIT.get((unit_x or "um").lower())
    um_y = UM_PER_UNIT.get((unit_y or "um").lower())
    size_x, size_y = _number(x), _number(y)
    if um_x is None or um_y is None or size_x is None or size_y is None:
        return None
    return Mpp(size_x * um_x, size_y * um_y, "OME-XML")


def from_scale(scale_yx: Sequence[float], units_yx: Sequence[str | None]) -> Mpp | None:
    """Read OME-Zarr's scale of its y and x axes; None where an axis has no unit of length."""
    um_y, um_x = (UM_PER_UNIT.get((unit or "").lower()) for unit in units_yx)
    if um_y is None or um_x is None:
        return None
    return Mpp(scale_yx[1] * um_x, scale_yx[0] * um_y, "OME-Zarr scale")


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
