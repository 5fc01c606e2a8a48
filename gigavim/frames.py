"""Where pixels lie: the few records that every stage passes on.

Two frames are used. *Level-0 pixels* are those of the file's finest level, x to the right and y
down. *Map pixels* are those of the model's resolution (its mpp), whose top-left corner is the
slide's bounds origin. Pixel i of either frame covers the interval [i, i + 1).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bounds:
    """The scanned part of a slide, in level-0 pixels."""

    x_level0: int
    y_level0: int
    width_level0: int
    height_level0: int


@dataclass(frozen=True, slots=True)
class Mpp:
    """Micrometres per level-0 pixel, and where the figure comes from."""

    x: float
    y: float
    source: str
    """For example "openslide.mpp-x", "OME-XML", "TIFF resolution", "crs", "user"."""


@dataclass(frozen=True, slots=True)
class GeoReference:
    """Where a raster lies on Earth."""

    crs_wkt: str
    transform: tuple[float, float, float, float, float, float]
    """Affine (a, b, c, d, e, f): X = a x + b y + c, Y = d x + e y + f for level-0 pixel edges."""


@dataclass(frozen=True, slots=True)
class MapFrame:
    """The placement of a map (a label map, say) on its slide.

    Map pixel edge (i, j) lies at level-0 (x_level0 + i * scale_x, y_level0 + j * scale_y).
    """

    width_px: int
    height_px: int
    x_level0: float
    y_level0: float
    scale_x: float
    """Level-0 pixels per map pixel, along x."""
    scale_y: float
    mpp_x: float
    """Micrometres per map pixel, along x."""
    mpp_y: float
    georeference: GeoReference | None = None
    """That of level-0 pixels, where the slide is a georeferenced raster."""


@dataclass(frozen=True, slots=True)
class ClassSpec:
    """A class that a model predicts; its label value is its place in the model card's list."""

    name: str
    color_rgb: tuple[int, int, int]
    parent: str | None = None
    """A class whose regions contain this one's: nuclei lie in tissue."""
    object_type: str = "annotation"
    """How QuPath shows it: "annotation", "detection", or "none" for what is not exported."""


def length_text(um: float) -> str:
    """A length in the unit that a reader expects: "0.5 um" on a slide, "1.5 m" from the air."""
    return f"{um:.4g} um" if um < 1e4 else f"{um / 1e6:.4g} m"
