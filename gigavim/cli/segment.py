"""`gigavim segment`: slides in, maps out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gigavim.cli import options
from gigavim.cli.progress import Bars
from gigavim.config import Settings, load_settings
from gigavim.errors import GigavimError
from gigavim.names import own_name, result_stem

if TYPE_CHECKING:
    from gigavim.segmentation import Segmentation

FORMATS = ["ome-tiff", "geojson", "geojson.gz", "geotiff", "overlay"]


@click.command("segment")
@options.inputs()
@click.option(
    "-o",
    "--output",
    "--results-dir",
    "--job-dir",
    "output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the results  [default: gigavim_out].",
)
@click.option("--model", metavar="NAME|DIR", help="A name of `gigavim models`, or a model folder.")
@click.option("--weights", metavar="FILE", help="Other weights for that model (safetensors).")
@click.option(
    "--mpp",
    type=click.FloatRange(min=0, min_open=True),
    metavar="UM",
    help="Micrometres per pixel at which the model sees the slide  [default: as trained].",
)
@click.option(
    "--mag",
    type=click.FloatRange(min=0, min_open=True),
    metavar="X",
    help="The same as a magnification: --mag 20 is --mpp 0.5.",
)
@options.slide_mpp
@click.option(
    "--allow-mpp-mismatch",
    is_flag=True,
    default=None,
    help="Run the model at a resolution, or on a kind of image, it was not trained for.",
)
@options.channels_option
@click.option("--tissue", metavar="auto|none|FILE", help="What to segment  [default: auto].")
@click.option(
    "--min-tissue",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Share of a patch that must be tissue  [default: 0, any].",
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(FORMATS),
    help="Repeatable  [default: ome-tiff, geojson, overlay; geotiff for georeferenced input].",
)
@click.option("--overwrite", is_flag=True, default=None, help="Replace results that are there.")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps  [default: auto].")
@click.option(
    "--precision", type=click.Choice(["auto", "fp32", "bf16"]), help="Of matrix products."
)
@click.option("--threads", type=click.IntRange(min=0), help="CPU threads of the encoder.")
@click.option("--num-workers", type=click.IntRange(min=0), help="Threads that read the slide.")
@click.option("--max-memory", metavar="SIZE", help="Such as 4GB  [default: 80 % of what is free].")
@click.option("--max-gpu-memory", metavar="SIZE", help="The same for the device's memory.")
@click.option("--scratch-dir", metavar="DIR", help="For working files  [default: in the output].")
@click.option("--dry-run", is_flag=True, help="Say what it would take, and stop.")
@click.option(
    "--fail-fast/--skip-errors",
    default=False,
    help="Stop at the first slide that fails, or go on  [default: go on].",
)
@options.config
@options.as_json
@options.verbosity
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
    settings = _settings(config, flags)
    stems = output_stems(inputs)
    failed: list[tuple[Path, GigavimError]] = []
    for path, stem in stems.items():
        try:
            _segment_one(path, stem, settings, dry_run=dry_run, as_json=as_json)
        except GigavimError as error:
            if len(stems) == 1 or fail_fast:
                raise
            click.echo(f"Error: {error}", err=True)
            failed.append((path, error))
    if failed:
        click.echo(f"\n{len(failed)} of {len(stems)} slides failed:", err=True)
        for path, reason in failed:
            click.echo(f"  {path}: {type(reason).__name__}", err=True)
        return 3 if len(failed) < len(stems) else 1
    return 0


def _settings(config: Path | None, flags: dict[str, Any]) -> Settings:
    if flags["mpp"] and flags["mag"]:
        raise click.UsageError("--mpp and --mag say the same thing: give one of them.")
    mpp = (
        10 / flags["mag"] if flags["mag"] else flags["mpp"]
    )  # 10 um / magnification, by convention
    return load_settings(config).with_flags(
        input={"slide_mpp": flags["slide_mpp"], "channels": flags["channels"]},
        model={
            "name": flags["model"],
            "weights": flags["weights"],
            "mpp": mpp,
            "allow_mpp_mismatch": flags["allow_mpp_mismatch"],
        },
        tokens={key: flags[key] for key in ("tissue", "min_tissue", "num_workers")},
        compute={
            key: flags[key]
            for key in (
                "device", "precision", "threads", "max_memory", "max_gpu_memory", "scratch_dir"
            )
        },
        output={
            "directory": None if flags["output"] is None else str(flags["output"]),
            "formats": list(flags["formats"]) or None,
            "overwrite": flags["overwrite"],
        },
    )  # fmt: skip


def output_stems(inputs: tuple[Path, ...]) -> dict[Path, str]:
    """Name each slide's results: its stem, or its whole name where two share a stem.

    A path given twice counts once.

    Raises:
        click.UsageError: two inputs have the same name: one would replace the other's results.
    """
    paths = list(dict.fromkeys(inputs))
    stems = [result_stem(path) for path in paths]
    names = [
        stem if stems.count(stem) == 1 else own_name(path)
        for path, stem in zip(paths, stems, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            raise click.UsageError(f"two inputs are named {name}: run them with different -o.")
    return dict(zip(paths, names, strict=True))


def _segment_one(
    path: Path, stem: str, settings: Settings, *, dry_run: bool, as_json: bool
) -> None:
    from gigavim.segmentation import plan_segmentation, segment

    if dry_run:
        click.echo("\n".join(plan_segmentation(path, settings).describe()))
        return
    if not options.is_quiet():
        click.echo(f"{path}", err=True)
    result = segment(path, settings=settings, stem=stem, progress=Bars(quiet=options.is_quiet()))
    if as_json:
        import orjson

        click.echo(orjson.dumps(result.summary).decode())
    elif not options.is_quiet():
        _report(result)


def _report(result: "Segmentation") -> None:
    """What a user wants to know at once: areas, and where the files are."""
    for entry in result.areas():
        click.echo(f"  {entry}")
    for path in result.outputs.values():
        click.echo(f"  wrote {path}")
