"""How fast slides are read: `python -m benchmarks.reading [--json FILE]`.

A slide of about 16k x 16k px is made of a real slide's own tiles, repeated: the compressed bytes
are copied, nothing is encoded again. Four ways of getting all its pixels are timed in turn, the
best of several runs each, in megapixels per second:

- bare: the same tiles' bytes, in memory, through the JPEG decoder, and nothing else;
- openslide: `read_region` over 512-px blocks, one handle per thread;
- gigavim read: `Slide.read` over 2,048-px blocks;
- gigavim stream: `stream_blocks`, what segmentation reads, at patch 16.
"""

import argparse
import itertools
import json
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import tifffile

from gigavim.slides import open_slide
from gigavim.tokens.grid import make_grid
from gigavim.tokens.order import ScanOrder
from gigavim.tokens.stream import stream_blocks

SIDE_PX = 16_384
BLOCK_PX = 2_048
OPENSLIDE_BLOCK_PX = 512
TILES_PER_JOB = 64
THREADS = (1, 2)

Job = Callable[[int], None]


def source_slide() -> Path:
    """Return the slide whose tiles are repeated."""
    data = os.environ.get("GIGAVIM_TEST_DATA")
    if data:
        return Path(data) / "wsi" / "CMU-1-Small-Region.svs"
    return Path(__file__).parent.parent / "sample_data" / "histology.svs"


def repeat_tiles(source: Path, target: Path, side_px: int = SIDE_PX) -> tuple[list[bytes], bytes]:
    """Write the repeated slide; return its tiles in file order, and their JPEG tables."""
    with tifffile.TiffFile(source) as tiff:
        page = tiff.pages.first
        assert isinstance(page, tifffile.TiffPage)
        columns = page.imagewidth // page.tilewidth
        across = -(-page.imagewidth // page.tilewidth)
        rows = page.imagelength // page.tilelength
        # Whole tiles only: those at the edges hold padding.
        inner = [row * across + column for row in range(rows) for column in range(columns)]
        stored = []
        for index in inner:
            tiff.filehandle.seek(page.dataoffsets[index])
            stored.append(tiff.filehandle.read(page.databytecounts[index]))
        side = side_px // page.tilewidth
        tiles = [
            stored[(row % rows) * columns + column % columns]
            for row, column in itertools.product(range(side), range(side))
        ]
        tables = page.jpegtables or b""
        photometric, description = page.photometric, page.description
        tile = (page.tilelength, page.tilewidth)
    with tifffile.TiffWriter(target, bigtiff=True) as writer:
        writer.write(
            iter(tiles),
            shape=(side * tile[0], side * tile[1], 3),
            dtype=np.uint8,
            tile=tile,
            photometric=photometric,
            compression="jpeg",
            subsampling=(1, 1) if photometric == tifffile.PHOTOMETRIC.RGB else (2, 2),
            description=description,
            metadata=None,
            extratags=[(347, 7, len(tables), tables, True)] if tables else [],
        )
    return tiles, tables


def corners(side: int, block: int) -> Iterator[tuple[int, int]]:
    """Yield the blocks' corners in raster order."""
    for y, x in itertools.product(range(0, side, block), range(0, side, block)):
        yield x, y


def seconds(jobs: int, job: Job, threads: int) -> float:
    """Return how long all jobs take on a pool of threads."""
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        for _ in pool.map(job, range(jobs)):
            pass
        return time.perf_counter() - start


def bare_job(path: Path, tiles: Sequence[bytes], tables: bytes) -> Job:
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        assert isinstance(page, tifffile.TiffPage)
        colourspace, outcolourspace = tifffile.tifffile.jpeg_decode_colorspace(
            page.photometric, page.planarconfig, page.extrasamples, page.is_jfif
        )

    def job(index: int) -> None:
        for tile in tiles[index * TILES_PER_JOB : (index + 1) * TILES_PER_JOB]:
            imagecodecs.jpeg8_decode(
                tile, tables=tables or None, colorspace=colourspace, outcolorspace=outcolourspace
            )

    return job


def openslide_job(path: Path, side: int) -> tuple[int, Job]:
    local = threading.local()
    places = list(corners(side, OPENSLIDE_BLOCK_PX))

    def job(index: int) -> None:
        if not hasattr(local, "slide"):
            local.slide = openslide.OpenSlide(path)
        x, y = places[index]
        size = (min(OPENSLIDE_BLOCK_PX, side - x), min(OPENSLIDE_BLOCK_PX, side - y))
        np.asarray(local.slide.read_region((x, y), 0, size))

    return len(places), job


def gigavim_job(path: Path, side: int) -> tuple[int, Job]:
    slide = open_slide(path)
    assert slide.reader == "tiff", slide.reader
    places = list(corners(side, BLOCK_PX))

    def job(index: int) -> None:
        x, y = places[index]
        slide.read(x, y, min(BLOCK_PX, side - x), min(BLOCK_PX, side - y))

    return len(places), job


def stream_seconds(path: Path, threads: int) -> float:
    """Return how long the stream of patches takes over the whole slide."""
    with open_slide(path, mpp=0.5) as slide:
        grid = make_grid(slide, mpp=0.5, patch_px=16, stride_px=16, order=ScanOrder("raster"))
        kept = np.ones((grid.rows, grid.cols), np.bool_)
        start = time.perf_counter()
        for _ in stream_blocks(slide, grid, kept, block_px=BLOCK_PX, workers=threads):
            pass
        return time.perf_counter() - start


def measure(source: Path, repeats: int) -> dict[str, dict[int, float]]:
    """Return Mpx/s of each way at each number of threads."""
    times: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "repeated.svs"
        tiles, tables = repeat_tiles(source, path)
        with open_slide(path) as slide:
            side = slide.levels[0].width
        bare = (-(-len(tiles) // TILES_PER_JOB), bare_job(path, tiles, tables))
        # In turn, so that a busy moment of the machine hits all alike.
        for _, threads in itertools.product(range(repeats), THREADS):
            times["bare"][threads].append(seconds(*bare, threads))
            times["openslide"][threads].append(seconds(*openslide_job(path, side), threads))
            times["gigavim read"][threads].append(seconds(*gigavim_job(path, side), threads))
            times["gigavim stream"][threads].append(stream_seconds(path, threads))
    return {
        way: {threads: side * side / min(runs) / 1e6 for threads, runs in by_threads.items()}
        for way, by_threads in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    source = source_slide()
    rates = measure(source, arguments.repeats)
    print(f"tiles of {source.name}, repeated to about {SIDE_PX} x {SIDE_PX} px; Mpx/s")
    print(f"{'':16}" + "".join(f"{threads:>10} thr" for threads in THREADS))
    for way, by_threads in rates.items():
        print(f"{way:16}" + "".join(f"{rate:>14.0f}" for rate in by_threads.values()))
    ours = rates["gigavim stream"][2]
    ratios = {
        "times_openslide": ours / rates["openslide"][2],
        "share_of_bare": ours / rates["bare"][2],
    }
    print(
        f"stream at 2 threads: {ratios['times_openslide']:.1f} x openslide (reach: 3), "
        f"{ratios['share_of_bare']:.2f} of bare decoding (reach: 0.85)"
    )
    if arguments.json:
        figures = {"source": source.name, "mpx_per_s": rates, **ratios}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
