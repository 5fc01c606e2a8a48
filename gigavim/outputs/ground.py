"""From map pixels to the ground: CRS, WGS84, and areas on the ellipsoid."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import shapely
from rasterio import Affine
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.warp import transform
from shapely.geometry.polygon import orient

from gigavim.errors import OutputError
from gigavim.frames import MapFrame

WGS84 = CRS.from_epsg(4326)
_SEMI_MAJOR_M = 6378137.0
_FLATTENING = 1 / 298.257223563


def map_affine(frame: MapFrame) -> Affine:
    """Affine from map pixel edges (x, y) to the raster's CRS; the frame has a georeference."""
    if frame.georeference is None:
        raise OutputError("the slide is not georeferenced")
    a, b, c, d, e, f = frame.georeference.transform
    return Affine(
        a * frame.scale_x,
        b * frame.scale_y,
        a * frame.x_level0 + b * frame.y_level0 + c,
        d * frame.scale_x,
        e * frame.scale_y,
        d * frame.x_level0 + e * frame.y_level0 + f,
    )


def map_crs(frame: MapFrame) -> CRS | None:
    """The raster's CRS, None where the file gives a transform only.

    Raises:
        OutputError: its definition is not understood.
    """
    if frame.georeference is None or not frame.georeference.crs_wkt:
        return None
    try:
        return CRS.from_wkt(frame.georeference.crs_wkt)
    except (CRSError, RasterioError, CPLE_BaseError) as error:
        raise OutputError(f"the raster's CRS is not understood: {error}") from error


@dataclass(frozen=True, slots=True)
class GroundTransform:
    """Map pixels to longitude and latitude."""

    affine: Affine
    crs: CRS
    max_edge_px: float
    """A straight edge longer than this would leave the straight line in degrees by more than a
    tenth of a pixel."""

    @classmethod
    def of(cls, frame: MapFrame) -> Self:
        """Build the transform of a frame that has a CRS."""
        crs = map_crs(frame)
        if crs is None:
            raise OutputError("the raster has no CRS; its polygons cannot be placed on Earth")
        # Sagitta s of a chord c on a circle of radius R: c = sqrt(8 R s); half of it for safety.
        pixel_m = frame.mpp_x * 1e-6
        edge_m = 0.5 * (8 * _SEMI_MAJOR_M * 0.1 * pixel_m) ** 0.5
        return cls(affine=map_affine(frame), crs=crs, max_edge_px=max(1.0, edge_m / pixel_m))

    def lonlat(self, xy: np.ndarray) -> np.ndarray:
        """(n, 2) map pixel edges (x, y) to (n, 2) WGS84 (longitude, latitude) in degrees.

        Raises:
            OutputError: the CRS cannot be converted, or not there.
        """
        to_crs = np.array(self.affine[:6]).reshape(2, 3)
        x, y = to_crs[:, :2] @ xy.T + to_crs[:, 2:]
        if self.crs == WGS84:
            return np.stack([x, y], 1)
        try:
            lon, lat = transform(self.crs, WGS84, x, y)
        except (CRSError, RasterioError, CPLE_BaseError) as error:
            raise OutputError(f"the raster's CRS cannot be converted to WGS84: {error}") from error
        lonlat = np.stack([lon, lat], 1)
        if not np.isfinite(lonlat).all():
            raise OutputError(
                "a part of the raster lies where its CRS cannot be converted to WGS84"
            )
        return lonlat

    def to_wgs84(self, polygons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) counter-clockwise polygons in map pixels to WGS84 ones, and (n,) areas in m².

        Exterior rings stay counter-clockwise. A polygon over the antimeridian becomes a
        multi-polygon cut there (RFC 7946, 3.1.9).
        """
        if not len(polygons):
            return polygons, np.zeros(0)
        _, xy, (ring_starts, polygon_starts) = shapely.to_ragged_array(
            shapely.segmentize(polygons, self.max_edge_px)
        )
        lonlat = self.lonlat(xy)
        ring_m2 = ring_areas_m2(lonlat, ring_starts)
        areas = np.abs(np.add.reduceat(ring_m2, polygon_starts[:-1]))
        crossing = self.crs != WGS84 and bool((np.abs(np.diff(lonlat[:, 0])) > 180).any())
        if crossing:
            lonlat = _unwrapped(lonlat, ring_starts, polygon_starts)
        placed = shapely.from_ragged_array(
            shapely.GeometryType.POLYGON, lonlat, (ring_starts, polygon_starts)
        )
        if self.affine.determinant < 0:
            placed = shapely.reverse(placed)
        return (_cut_at_antimeridian(placed) if crossing else np.asarray(placed)), areas


def ring_areas_m2(lonlat: np.ndarray, ring_starts: np.ndarray) -> np.ndarray:
    """Areas on the WGS84 ellipsoid of closed rings of (longitude, latitude) in degrees.

    Those of clockwise rings are negative.

    The area is minus the integral of Q(latitude) over longitude along the ring, where Q is the area
    between equator and latitude per radian of longitude (Snyder 1987, "Map projections: a working
    manual", eq. 3-12). Edges are straight in degrees; Simpson's rule integrates each.

    Args:
        lonlat: (n, 2), rings one after the other, each ending in its first point.
        ring_starts: (rings + 1,) where each begins.
    """
    lon, lat = np.radians(lonlat).T
    step = np.diff(lon, append=lon[-1:])
    # The shorter way round, where an edge passes the antimeridian.
    step = np.where(np.abs(step) > np.pi, step - np.sign(step) * 2 * np.pi, step)
    end = np.append(lat[1:], lat[-1:])
    strips = -step * (_strip_m2(lat) + 4 * _strip_m2((lat + end) / 2) + _strip_m2(end)) / 6
    strips[ring_starts[1:] - 1] = 0.0  # from one ring to the next
    return np.asarray(np.add.reduceat(strips, ring_starts[:-1]))


def _strip_m2(lat: np.ndarray) -> np.ndarray:
    """Area between equator and latitude (radians) per radian of longitude."""
    squared = _FLATTENING * (2 - _FLATTENING)  # e²
    e = squared**0.5
    sine = np.sin(lat)
    semi_minor_m2 = (_SEMI_MAJOR_M * (1 - _FLATTENING)) ** 2
    return np.asarray(
        semi_minor_m2 / 2 * (sine / (1 - squared * sine**2) + np.arctanh(e * sine) / e)
    )


def _unwrapped(
    lonlat: np.ndarray, ring_starts: np.ndarray, polygon_starts: np.ndarray
) -> np.ndarray:
    """Longitudes of polygons that pass the antimeridian, taken to 0 .. 360."""
    lonlat = lonlat.copy()
    starts = ring_starts[polygon_starts]
    for start, stop in pairwise(starts):
        lon = lonlat[start:stop, 0]
        if np.ptp(lon) > 180:
            lon[lon < 0] += 360
    return lonlat


def _cut_at_antimeridian(polygons: np.ndarray) -> np.ndarray:
    out = np.array(polygons, dtype=object)
    for place in np.flatnonzero(shapely.bounds(polygons)[:, 2] > 180):
        west = shapely.intersection(out[place], shapely.box(-180, -90, 180, 90))
        east = shapely.intersection(out[place], shapely.box(180, -90, 540, 90))
        east = shapely.transform(east, lambda xy: xy - (360, 0))
        parts = [part for part in shapely.get_parts([west, east]) if part.geom_type == "Polygon"]
        out[place] = shapely.MultiPolygon([orient(part) for part in parts])
    return out
