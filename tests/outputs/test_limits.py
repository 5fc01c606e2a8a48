"""Full disks and large maps, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

COMMON = """
import resource, sys, time
from pathlib import Path
import numpy as np
from gigavim.errors import OutputError
from gigavim.frames import ClassSpec, GeoReference, MapFrame
from gigavim.outputs.geojson import write_geojson
from gigavim.outputs.geotiff import write_geotiff
from gigavim.outputs.labels import LabelStore
from gigavim.outputs.ome_tiff import write_ome_tiff
from gigavim.outputs.summary import class_areas
from rasterio.crs import CRS

CLASSES = (
    ClassSpec("background", (255, 255, 255), object_type="none"),
    ClassSpec("tissue", (220, 40, 60)),
    ClassSpec("nuclei", (30, 40, 200), parent="tissue", object_type="detection"),
)

def frame(side):
    wkt = CRS.from_epsg(32618).to_wkt()
    geo = GeoReference(wkt, (1.0, 0.0, 5e5, 0.0, -1.0, 4.3e6))
    return {
        "slide": MapFrame(side, side, 0.0, 0.0, 1.0, 1.0, 0.5, 0.5),
        "ground": MapFrame(side, side, 0.0, 0.0, 1.0, 1.0, 1e6, 1e6, geo),
    }

def store(folder, side):
    return LabelStore.create(folder, height=side, width=side, cell_px=16,
                             cells_hw=(-(-side // 16), -(-side // 16)))
"""

FULL = """
target, scratch = Path(sys.argv[1]), sys.argv[2]
noise = np.random.default_rng(0).integers(0, 3, (450, 450), dtype=np.uint8)
labels = store(scratch, 450)
labels.write_rows(0, noise)
frames = frame(450)
work = {
    "a.ome.tif": (write_ome_tiff, "slide"),
    "a.geojson": (write_geojson, "slide"),
    "a.geojson.gz": (write_geojson, "slide"),
    "a.tif": (write_geotiff, "ground"),
}
for name, (write, kind) in work.items():
    for earlier in (None, b"good"):
        if earlier is not None:
            (target / name).write_bytes(earlier)
        try:
            write(labels, frames[kind], CLASSES, target / name, overwrite=earlier is not None)
        except OutputError as error:
            assert name in str(error) and ".partial" not in str(error), error
            assert WORDS in str(error), error
        else:
            raise SystemExit(f"{name}: written where it cannot be")
        assert {p.name: p.read_bytes() for p in target.iterdir()} == (
            {} if earlier is None else {name: earlier}), list(target.iterdir())
        (target / name).unlink(missing_ok=True)
"""


def run(code: str, *arguments: object, prefix: tuple[str, ...] = ()) -> str:
    command = [*prefix, sys.executable, "-W", "ignore", "-c", COMMON + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a small disk")
def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(tmp_path):
    mount = 'mount -t tmpfs -o size=40k tmpfs "$1" && shift && exec "$@"'
    prefix = ("unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path / "disk"))
    (tmp_path / "disk").mkdir()
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    run("WORDS = 'no space left'" + FULL, tmp_path / "disk", tmp_path / "scratch", prefix=prefix)


@pytest.mark.skipif(sys.platform == "win32", reason="limits are those of POSIX")
def test_a_limit_on_the_size_of_files(tmp_path):
    limit = """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
WORDS = "cannot be written"
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
"""
    (tmp_path / "disk").mkdir()
    run(limit + FULL, tmp_path / "disk", tmp_path / "scratch")


LARGE = """
target, side = Path(sys.argv[1]), int(sys.argv[2])
labels = store(target / "scratch", side)
y, x = np.mgrid[:64, :256]
tile = np.ones((64, 256), np.uint8)
tile[((y - 32) ** 2 + (x % 64 - 32) ** 2) < 300] = 2
row = np.tile(tile, (1, -(-side // 256)))[:, :side]
row[:, : side // 3] = 0
for top in range(0, side, 64):
    labels.write_rows(top, row[: side - top])
def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, frames, started = peak_mb(), frame(side), time.perf_counter()
class_areas(labels, frames["slide"], 3)
write_ome_tiff(labels, frames["slide"], CLASSES, target / "a.ome.tif")
write_geojson(labels, frames["slide"], CLASSES, target / "a.geojson.gz")
write_geotiff(labels, frames["ground"], CLASSES, target / "a.tif")
print(peak_mb() - before, time.perf_counter() - started)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is read the POSIX way")
def test_memory_does_not_follow_the_size_of_the_map(tmp_path):
    side = 16384  # 268 Mpx, 43,000 objects
    assert float(run(LARGE, tmp_path, side).split()[0]) < 450
