"""The size of a raster's pixels on the ground."""

import math
from typing import TYPE_CHECKING

from affine import Affine

from gigavim.frames import Mpp

if TYPE_CHECKING:
    from rasterio.crs import CRS

WGS84_A_M = 6_378_137.0
WGS84_E2 = 6.694379990141316e-3

MAX_DEGREES = 720.0
MAX_UNITS = 1e9
"""Coordinates beyond these (feet or metres) lie on no map."""

MAX_MPP = 1e13
"""Pixels of more than ten thousand kilometres are damage."""

MAP_DISTORTION = 0.01
"""Where the map's metres differ from the ground's by more than this, the ground's are taken."""


def ground_mpp(crs: "CRS | None", transform: Affine, width: int, height: int) -> Mpp | None:
    """Return micrometres per pixel at the raster's centre; None without a usable CRS.

    Of a projected CRS these are its own units, unless they are stretched by more than 1 %, as those
    of Web Mercator are away from the equator; then, and for degrees, the length on the WGS 84
    ellipsoid.
    """
    if crs is None or not math.isfinite(transform.determinant) or transform.determinant == 0:
        return None
    ground = _geodesic(crs, transform, width / 2, height / 2)
    if crs.is_projected:
        try:
            metres = float(crs.linear_units_factor[1])
        except Exception:  # rasterio's CRSError, where a CRS states no unit
            metres = 1.0
        x = math.hypot(transform.a, transform.d) * metres * 1e6
        y = math.hypot(transform.b, transform.e) * metres * 1e6
        if not (0 < x < MAX_MPP and 0 < y < MAX_MPP):
            return None
        if ground is None or abs(x / ground.x - 1) <= MAP_DISTORTION:
            return Mpp(x, y, "crs")
    return ground


def _geodesic(crs: "CRS", transform: Affine, x: float, y: float) -> Mpp | None:
    from rasterio.errors import RasterioError
    from rasterio.warp import transform as to_crs

    a, b, c, d, e, f = tuple(transform)[:6]
    pixels = ((x, y), (x + 1, y), (x, y + 1))
    points = [(a * i + b * j + c, d * i + e * j + f) for i, j in pixels]
    # PROJ does not come back from coordinates far off the Earth.
    limit = MAX_DEGREES if crs.is_geographic else MAX_UNITS
    if not all(abs(value) <= limit for point in points for value in point):
        return None
    try:
        lon, lat = to_crs(crs, "EPSG:4326", [p[0] for p in points], [p[1] for p in points])[:2]
    except (RasterioError, ValueError):
        return None
    if not all(math.isfinite(value) for value in (*lon, *lat)):
        return None
    # Radii of curvature along the parallel and the meridian.
    sine, cosine = math.sin(math.radians(lat[0])), math.cos(math.radians(lat[0]))
    w = math.sqrt(1 - WGS84_E2 * sine * sine)
    parallel_m, meridian_m = WGS84_A_M / w * cosine, WGS84_A_M * (1 - WGS84_E2) / w**3

    def metres(i: int) -> float:
        east = math.radians(lon[i] - lon[0]) * parallel_m
        north = math.radians(lat[i] - lat[0]) * meridian_m
        return math.hypot(east, north)

    mpp_x, mpp_y = metres(1) * 1e6, metres(2) * 1e6
    return Mpp(mpp_x, mpp_y, "crs, on the ellipsoid") if mpp_x > 0 and mpp_y > 0 else None
