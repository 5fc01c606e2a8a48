"""`gigavim segment`: slides in, maps out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gigavim.cli import options
from gigavim.cli.run import formats, run_slides, settings_from, slide_options, writing_options

if TYPE_CHECKING:
    from gigavim.progress import Progress
    from gigavim.results import Result


@click.command("segment")
@options.inputs()
@formats("ome-tiff, geojson, overlay; geotiff for georeferenced input")
@writing_options
@slide_options
def command(
    inputs: tuple[Path, ...],
    config: Path | None,
    dry_run: bool,
    fail_fast: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Segment slides and write maps that other tools open.

    INPUT is a slide: a file (.svs, .ndpi, .mrxs, .tif, .ome.tif, GeoTIFF, .png, ...) or a folder
    that is one slide (DICOM, OME-Zarr). For each, the output folder receives a label map (pyramidal
    OME-TIFF, or GeoTIFF for a georeferenced raster), polygons (GeoJSON for QuPath), a picture and a
    summary.

    \b
    Examples:
      gigavim segment slide.svs
      gigavim segment *.svs -o results --max-memory 4GB
      gigavim segment scan.tif --slide-mpp 0.25 --tissue none
    """  # fmt: skip
    settings = settings_from(config, flags)

    def make(path: Path, stem: str, progress: "Progress") -> "Result":
        from gigavim.segmentation import segment

        return segment(path, settings=settings, stem=stem, progress=progress)

    return run_slides(inputs, settings, make, dry_run=dry_run, fail_fast=fail_fast, as_json=as_json)
