"""Render gigavim's sample images: an H&E slide and an aerial scene, with their true labels."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
from painting import aerial, histology
from painting.aerial_land import CLASS_NAMES
from painting.bands import render_bands
from painting.cog import write_cogs
from painting.pyramid import PyramidStream
from painting.svs import write_label_map, write_svs
from tqdm import tqdm

MOST_PX = 200_000  # a band of full width must fit in memory
HISTOLOGY_QUALITY = 80
AERIAL_QUALITY = 75
AERIAL_RGB = {
    "building": (214, 69, 65),
    "land": (219, 190, 134),
    "road": (120, 124, 130),
    "vegetation": (96, 160, 82),
    "water": (62, 126, 196),
}


def parse_size(
    _context: click.Context, _option: click.Parameter, text: str | None
) -> tuple[int, int] | None:
    """`4096x3072` or `20000` (a square) as (width, height)."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"{text!r} is neither WIDTHxHEIGHT nor one number of pixels")
    return int(parts[0]), int(parts[-1])


@contextmanager
def whole_or_absent(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Temporary siblings to write to, renamed to `paths` on success and removed on failure."""
    parts = tuple(path.with_name(f".{path.name}.part") for path in paths)
    try:
        yield parts
        for part, path in zip(parts, paths):
            part.replace(path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def make_histology(out: Path, size: tuple[int, int], seed: int) -> None:
    """Write histology.svs and histology_labels.tif."""
    width, height = size
    plan = histology.plan_slide(width, height, seed)
    with (
        tqdm(total=width * height, unit="px", unit_scale=True, desc="histology") as bar,
        whole_or_absent(out / "histology.svs", out / "histology_labels.tif") as (slide, labels),
    ):
        stream = PyramidStream(
            partial(histology.render_region, plan),
            width,
            height,
            quality=HISTOLOGY_QUALITY,
            region_px=histology.REGION_PX,
            progress=bar.update,
        )
        write_svs(
            slide, stream, mpp=histology.MPP, quality=HISTOLOGY_QUALITY, title=f"Sample {seed}"
        )
        write_label_map(labels, stream.label_tiles, width=width, height=height, mpp=histology.MPP)


def make_aerial(out: Path, size: tuple[int, int], seed: int) -> None:
    """Write aerial.tif and aerial_labels.tif."""
    width, height = size
    with (
        tqdm(total=width * height, unit="px", unit_scale=True, desc="aerial") as bar,
        whole_or_absent(out / "aerial.tif", out / "aerial_labels.tif") as (image, labels),
    ):
        bands = render_bands(
            partial(aerial.render_region, seed),
            width,
            height,
            band_px=aerial.REGION_PX,
            progress=bar.update,
        )
        write_cogs(
            image,
            labels,
            bands,
            width=width,
            height=height,
            crs=aerial.CRS,
            origin_xy=aerial.ORIGIN_EASTING_NORTHING,
            metres_per_px=aerial.METRES_PER_PX,
            quality=AERIAL_QUALITY,
            classes={k: (name, AERIAL_RGB[name]) for k, name in CLASS_NAMES.items()},
        )


@dataclass(frozen=True, slots=True)
class Scene:
    """How to write one sample, and which sizes make sense for it."""

    make: Callable[[Path, tuple[int, int], int], None]  # folder, (width, height), seed
    usual_size: tuple[int, int]
    least_px: int


SCENES = {
    "histology": Scene(make_histology, (4096, 3072), histology.MIN_SIZE_PX),
    "aerial": Scene(make_aerial, (4096, 3072), aerial.MIN_SIZE_PX),
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("scene", type=click.Choice([*SCENES, "all"]), default="all")
@click.option(
    "--size",
    callback=parse_size,
    metavar="PX",
    help="WIDTHxHEIGHT, or one side of a square.  [default: 4096x3072]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parent,
    help="Folder to write to.  [default: this script's]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=7,
    show_default=True,
    help="Another number draws another picture.",
)
def main(scene: str, size: tuple[int, int] | None, out: Path, seed: int) -> None:
    """Render SCENE (histology, aerial or all) with its true label map.

    The same seed and size give the same bytes. Memory does not grow with the height.

    \b
    Example, a slide of 400 megapixels:
      python sample_data/make.py --size 20000 --out /tmp histology
    """
    names = list(SCENES) if scene == "all" else [scene]
    for name in names:
        width, height = size or SCENES[name].usual_size
        least = SCENES[name].least_px
        if min(width, height) < least or max(width, height) > MOST_PX:
            raise click.BadParameter(
                f"{width}x{height} does not suit {name}: both sides must lie between {least} "
                f"and {MOST_PX} px",
                param_hint="--size",
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in names:
            SCENES[name].make(out, size or SCENES[name].usual_size, seed)
    except OSError as error:
        raise click.ClickException(f"cannot write to {out}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
