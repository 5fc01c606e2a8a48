"""How fast a label map becomes polygons: `python -m benchmarks.polygons [--side N] [--json FILE]`.

Four maps of five classes, each in a process of its own that reports its own peak memory:

- regions: smooth fields of a few hundred pixels, as a tissue model gives;
- nuclei: tissue fields with a nucleus every 26 px or so;
- cells: the nuclei alone: without large regions memory should not grow with the side;
- noise: fields with ragged, speckled borders, the worst that a model writes.

What is timed is `write_geojson`, reading the label store included; memory is the peak resident set
of the process above what it held before, and as a whole.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gigavim.engine.memory import resident_bytes
from gigavim.frames import ClassSpec, MapFrame
from gigavim.outputs.geojson import write_geojson
from gigavim.outputs.labels import LabelStore

SIDE_PX = 16_384
KINDS = ("regions", "nuclei", "cells", "noise")
CLASSES = (
    ClassSpec("background", (255, 255, 255), object_type="none"),
    ClassSpec("tumor", (200, 30, 30)),
    ClassSpec("stroma", (30, 200, 30)),
    ClassSpec("necrosis", (120, 120, 30)),
    ClassSpec("nuclei", (30, 30, 200), object_type="detection"),
)


def fields(y0: int, height: int, width: int) -> np.ndarray:
    """(height, width) 0..3: four classes in smooth patches of 100 to 1,000 px."""
    y, x = np.mgrid[y0 : y0 + height, :width].astype(np.float32)
    wave = np.sin(x / 310 + np.sin(y / 173)) + np.sin(y / 290 + np.sin(x / 211))
    return np.digitize(wave, (-0.7, 0.1, 0.8)).astype(np.uint8)


def strip(kind: str, y0: int, height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Rows y0.. of a map."""
    labels = fields(y0, height, width)
    if kind in ("nuclei", "cells"):
        y, x = np.mgrid[y0 : y0 + height, :width]
        cy, cx = y // 26, x // 26
        wobble = (cy * 7919 + cx * 104729) % 97 / 97.0
        radius2 = ((y % 26 - 13) / (0.8 + 0.4 * wobble)) ** 2 + (x % 26 - 13) ** 2
        tissue = labels > 0
        if kind == "cells":
            labels[:] = 0
        labels[(radius2 < 40 + 35 * wobble) & tissue] = 4
    if kind == "noise":
        rough = random.integers(0, 1000, labels.shape, dtype=np.uint16)
        labels[rough < 2] = 4
    return labels


def make(kind: str, side: int, folder: Path) -> None:
    """Write a map into a label store."""
    random = np.random.default_rng(0)
    labels = LabelStore.create(
        folder / "map", height=side, width=side, cell_px=16, cells_hw=(-(-side // 16),) * 2,
        lasting=True,
    )  # fmt: skip
    for y in range(0, side, 256):
        labels.write_rows(y, strip(kind, y, min(256, side - y), side, random))


def measure(kind: str, side: int) -> dict[str, float | str]:
    """Write one map as GeoJSON in this process."""
    import resource

    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, whose memory does not count.
        command = [sys.executable, "-m", "benchmarks.polygons", "--make", folder, "--only", kind]
        subprocess.run([*command, "--side", str(side)], check=True)
        labels = LabelStore(Path(folder) / "map")
        frame = MapFrame(side, side, 0.0, 0.0, 1.0, 1.0, 0.5, 0.5)
        warm = LabelStore.create(
            Path(folder) / "warm", height=64, width=64, cell_px=16, cells_hw=(4, 4)
        )
        warm.write_rows(0, np.eye(64, dtype=np.uint8))
        write_geojson(warm, frame, CLASSES, Path(folder) / "warm.geojson")
        before, started, worked = resident_bytes(), time.perf_counter(), time.process_time()
        target = Path(folder) / "map.geojson"
        features = write_geojson(labels, frame, CLASSES, target)
        seconds, worked = time.perf_counter() - started, time.process_time() - worked
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "map": kind,
            "seconds": round(seconds, 2),
            "cpu_seconds": round(worked, 2),
            "mpx_per_s": round(side**2 / 1e6 / seconds, 1),
            "features": features,
            "file_mb": round(target.stat().st_size / 1e6, 1),
            "peak_mb": round(peak / 1e6),
            "peak_above_start_mb": round((peak - before) / 1e6),
        }


def main() -> None:
    """Measure each map in a fresh process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=SIDE_PX)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.make:
        make(options.only, options.side, options.make)
        return
    if options.only:
        print(json.dumps(measure(options.only, options.side)))
        return
    rows = []
    for kind in KINDS:
        command = [sys.executable, "-m", "benchmarks.polygons", "--side", str(options.side)]
        done = subprocess.run(
            [*command, "--only", kind], capture_output=True, text=True, check=True, env=os.environ
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
