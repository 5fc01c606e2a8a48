"""What storing embeddings costs a run: `python -m benchmarks.store [--side N] [--json FILE]`.

A slide made of a real slide's own JPEG tiles, repeated to N x N px (8,192: one million tokens of
8 px), goes through `gigavim.embed` with the shipped model and every pixel kept. Reported are the
seconds of each stage, the share of the store's writing in the whole run, and the store's size.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import gigavim
from benchmarks.reading import repeat_tiles, source_slide
from gigavim.config import Settings


def measure(side: int) -> dict[str, object]:
    """Embed the repeated slide once."""
    with tempfile.TemporaryDirectory() as folder:
        slide = Path(folder) / "slide.tif"
        repeat_tiles(source_slide(), slide, side)
        settings = Settings().with_flags(
            input={"slide_mpp": 0.5}, tokens={"tissue": "none"}, output={"directory": folder}
        )
        started = time.perf_counter()
        result = gigavim.embed(slide, settings=settings)
        whole = time.perf_counter() - started
        seconds = dict(result.summary["seconds"])
        size = sum(p.stat().st_size for p in result.outputs["store"].rglob("*") if p.is_file())
        tokens = result.summary["tokens"]["count"]
    return {
        "tokens": tokens,
        "seconds": seconds | {"whole run": round(whole, 2)},
        "store_share": round(seconds["store"] / whole, 4),
        "store_mb": round(size / 1e6, 1),
        "bytes_per_token": round(size / tokens, 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=8192)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.side)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
