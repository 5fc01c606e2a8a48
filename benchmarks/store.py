"""What storing embeddings costs a run: `python -m benchmarks.store [--side N] [--json FILE]`.

A slide made of a real slide's own JPEG tiles, repeated to N x N px (8,192: one million tokens of
8 px), is embedded with the shipped model and every pixel kept. The share of writing is the time
that `gigavim.embed` takes longer than the same run that writes nothing: it opens, plans, reads,
encodes and decodes alike, but makes no picture, no files, no checksums and no summary. Each is run
several times, in turn, in one process; of each the median counts. Times of the first pair, which
compiles, are shown but not counted.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

import gigavim
from benchmarks.reading import repeat_tiles, source_slide
from gigavim.config import Settings
from gigavim.pipeline import Stopwatch, open_input, prepare, swept
from gigavim.progress import Silent
from gigavim.results import Embedding
from gigavim.store.build import decoded

RUNS = 3


def bare(slide: Path, settings: Settings, folder: Path) -> float:
    """Seconds of the run that writes nothing."""
    watch, silent, started = Stopwatch(), Silent(), time.perf_counter()
    with open_input(slide, settings) as opened:
        job = prepare(opened, settings, scratch=folder, watch=watch)
        with (
            swept(job, settings, folder, watch, silent, picture_px=0) as run,
            torch.inference_mode(),
        ):
            for _ in decoded(job, run):
                pass
    return time.perf_counter() - started


def stored(slide: Path, settings: Settings, folder: Path) -> tuple[float, Embedding]:
    """Seconds of a run that makes a store, and what it made."""
    started = time.perf_counter()
    result = gigavim.embed(slide, settings=settings)
    return time.perf_counter() - started, result


def measure(side: int, runs: int) -> dict[str, object]:
    """Embed the repeated slide with and without a store."""
    without, whole = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slide = folder / "slide.tif"
        repeat_tiles(source_slide(), slide, side)
        settings = Settings().with_flags(
            input={"slide_mpp": 0.5},
            tokens={"tissue": "none"},
            output={"directory": name, "overwrite": True},
        )
        for _ in range(runs + 1):
            without.append(round(bare(slide, settings, folder), 2))
            seconds, result = stored(slide, settings, folder)
            whole.append(round(seconds, 2))
            print(f"without a store {without[-1]} s, with one {whole[-1]} s", flush=True)
        size = sum(p.stat().st_size for p in result.outputs["store"].rglob("*") if p.is_file())
    tokens = result.summary["tokens"]["count"]
    typical, longer = statistics.median(without[1:]), statistics.median(whole[1:])
    return {
        "tokens": tokens,
        "seconds_without_store": without,
        "seconds_with_store": whole,
        "seconds_of_stages": result.summary["seconds"],
        "store_seconds": round(longer - typical, 2),
        "store_share": round(1 - typical / longer, 4),
        "store_mb": round(size / 1e6, 1),
        "bytes_per_token": round(size / tokens, 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.side, options.runs)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
