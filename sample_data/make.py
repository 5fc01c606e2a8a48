"""Render gigavim's sample images: an H&E slide and an aerial scene, with their true labels."""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
from painting import histology
from painting.pyramid import PyramidStream
from painting.svs import write_label_map, write_svs
from tqdm import tqdm

QUALITY = 70


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
            quality=QUALITY,
            region_px=histology.REGION_PX,
            progress=bar.update,
        )
        write_svs(slide, stream, mpp=histology.MPP, quality=QUALITY, title=f"Sample {seed}")
        write_label_map(labels, stream.label_tiles, width=width, height=height, mpp=histology.MPP)


SCENES: dict[str, tuple[Callable[[Path, tuple[int, int], int], None], tuple[int, int], int]] = {
    "histology": (make_histology, (4096, 3072), histology.MIN_SIZE_PX),
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("scene", type=click.Choice([*SCENES, "all"]), default="all")
@click.option(
    "--size",
    callback=parse_size,
    metavar="PX",
    help="WIDTHxHEIGHT, or one side of a square.  [default: the committed size]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parent,
    help="Folder to write to.  [default: this script's]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31),
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
    out.mkdir(parents=True, exist_ok=True)
    for name in SCENES if scene == "all" else [scene]:
        make, usual, least = SCENES[name]
        width, height = size or usual
        if min(width, height) < least:
            raise click.BadParameter(
                f"{width}x{height} is too small for {name}: both sides need {least} px or more",
                param_hint="--size",
            )
        make(out, (width, height), seed)


if __name__ == "__main__":
    sys.exit(main())
