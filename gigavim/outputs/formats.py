"""The table of output formats: their names, their files, what they need."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gigavim.errors import OutputError
from gigavim.outputs.atomic import OutputSet


@dataclass(frozen=True, slots=True)
class Format:
    """One format."""

    files: tuple[str, ...]
    """Names, in which `{stem}` stands for the slide's; the first is the one people look for."""
    help: str
    embeddings: bool = False
    """Holds embeddings."""
    ground: bool = False
    """For georeferenced rasters only."""
    is_folder: bool = False
    by_itself: bool = False
    """Written by a command of its own, not on request."""


FORMATS: dict[str, Format] = {
    "ome-tiff": Format(("{stem}.labels.ome.tif",), "label map: QuPath, napari, Fiji"),
    "ome-zarr": Format(
        ("{stem}.ome.zarr",), "slide and label map (NGFF): napari, Vitessce", is_folder=True
    ),
    "geojson": Format(("{stem}.geojson",), "polygons: QuPath; WGS84 for rasters on Earth"),
    "geojson.gz": Format(("{stem}.geojson.gz",), "the same, compressed"),
    "geotiff": Format(("{stem}.labels.tif",), "label map with CRS (COG)", ground=True),
    "gpkg": Format(("{stem}.gpkg",), "polygons in the raster's CRS (GeoPackage)", ground=True),
    "geoparquet": Format(("{stem}.parquet",), "the same as GeoParquet", ground=True),
    "overlay": Format(("{stem}.overlay.png",), "a picture to look at"),
    "csv": Format(("{stem}.areas.csv",), "areas of the classes"),
    "h5-trident": Format(
        (
            "trident/features/{stem}.h5",
            "trident/patches/{stem}_patches.h5",
            "trident/slide_features/{stem}.h5",
        ),
        "embeddings as TRIDENT's files",
        embeddings=True,
    ),
    "h5-clam": Format(
        ("clam/h5_files/{stem}.h5", "clam/pt_files/{stem}.pt", "clam/patches/{stem}.h5"),
        "embeddings as CLAM's files",
        embeddings=True,
    ),
    "h5-stamp": Format(("stamp/{stem}.h5",), "embeddings as STAMP's file", embeddings=True),
    "anndata": Format(("{stem}.h5ad",), "embeddings: scanpy, squidpy", embeddings=True),
    "spatialdata": Format(
        ("{stem}.spatialdata.zarr",),
        "all of it: SpatialData, LazySlide (wsidata)",
        embeddings=True,
        is_folder=True,
    ),
    "summary": Format(("{stem}.summary.json",), "areas, coverage, provenance", by_itself=True),
    "store": Format(
        ("{stem}.embeddings.zarr",),
        "the embedding store",
        embeddings=True,
        is_folder=True,
        by_itself=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Targets:
    """Where the results of a slide go."""

    formats: tuple[str, ...]
    paths: dict[str, Path]
    """The file to look for, by format."""
    files: dict[str, tuple[Path, ...]]
    """All files, by format."""

    def reserve(self, outputs: OutputSet) -> dict[str, tuple[Path, ...]]:
        """Temporary paths by format, to be written to.

        Raises:
            OutputError: one exists already, or cannot be made.
        """
        return {
            name: tuple(
                outputs.folder(path) if FORMATS[name].is_folder else outputs.path(path)
                for path in paths
            )
            for name, paths in self.files.items()
        }


def result_paths(
    folder: Path, stem: str, formats: Iterable[str], *, georeferenced: bool
) -> Targets:
    """The files of a slide's results.

    Raises:
        OutputError: a format is unknown, or not for this slide.
    """
    names = tuple(dict.fromkeys(formats))
    for name in names:
        if name not in FORMATS:
            raise OutputError(f"unknown format {name!r}: choose from {', '.join(FORMATS)}")
        if FORMATS[name].ground and not georeferenced:
            raise OutputError(
                f"{stem}: {name} needs a georeferenced input, and this one is not: leave out"
                f" --format {name}."
            )
    files: Mapping[str, tuple[Path, ...]] = {
        name: tuple(folder / part.format(stem=stem) for part in FORMATS[name].files)
        for name in names
    }
    return Targets(names, {name: paths[0] for name, paths in files.items()}, dict(files))


def needs_embeddings(formats: Iterable[str]) -> bool:
    """Whether one of the formats holds embeddings."""
    return any(FORMATS[name].embeddings for name in formats)
