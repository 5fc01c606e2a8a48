"""Archives put to the test: `python -m benchmarks.batch overhead|archive|scaling [--out FILE]`.

- overhead: 10,000 slides of which each is a line of text: milliseconds a slide, size of the ledger,
  memory of the client;
- archive: 200 slides, 10 of them corrupt, 2 that crash their worker, 1 that hangs. One run to the
  end, and one that is ended with `kill -9` ten times at random moments and goes on: 187 done to the
  same bytes, 13 failed for the right reasons, none begun again after it was done;
- scaling: one worker against two, of one thread each.

Everything is written to a temporary folder, and runs through the command line as a user's would.
"""

import argparse
import ctypes
import json
import logging
import os
import platform
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import tifffile

CRASH, HANG = b"crash", b"hang"
RECIPE = """
[recipe]
task = "benchmarks.batch:{task}"
[batch]
timeout = "{timeout}"
retry_wait = "1s"
"""
Facts = dict[str, Any]


def no_op(path: Path, *, settings: Any, stem: str, progress: Any) -> SimpleNamespace:
    """Write one line: a slide's task without a slide's work."""
    out = Path(settings.output.directory) / f"{stem}.txt"
    out.write_bytes(path.read_bytes())
    return SimpleNamespace(outputs={"text": out}, summary={})


def segment_or_die(path: Path, *, settings: Any, stem: str, progress: Any) -> Any:
    """Segment; but a file may stand for one that crashes or hangs a decoder."""
    import gigavim

    with (path.parent.parent / "journal").open("a") as journal:
        journal.write(f"{stem} {time.time()}\n")
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith(CRASH):
        ctypes.string_at(0)
    if head.startswith(HANG):
        ctypes.PyDLL(None).sleep(10_000)  # the interpreter's lock is held meanwhile
    return gigavim.segment(path, settings=settings, stem=stem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["overhead", "archive", "scaling"])
    parser.add_argument("--slides", type=int, help="how many [10000, 200, 24]")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gigavim-batch-") as folder:
        work = Path(folder)
        if chosen.what == "overhead":
            facts = overhead(work, chosen.slides or 10_000)
        elif chosen.what == "archive":
            facts = archive(work, chosen.slides or 200, chosen.kills, chosen.seed)
        else:
            facts = scaling(work, chosen.slides or 24)
    facts |= {"machine": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()}
    print(json.dumps(facts, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(facts, indent=2) + "\n")


def overhead(work: Path, count: int) -> Facts:
    slides = work / "slides"
    slides.mkdir()
    for number in range(count):
        (slides / f"slide{number:06d}.svs").write_text("nothing\n")
    recipe = _recipe(work, "no_op", "60s")
    started = time.perf_counter()
    process = _start(work, recipe, slides, "out", "--workers", "2", "-q")
    memory: dict[int, int] = {}
    client = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            rss = client.memory_info().rss
        except psutil.NoSuchProcess:
            break
        tenth = 10 * _done(work / "out") // count
        memory[tenth] = max(memory.get(tenth, 0), rss)
        time.sleep(2)
    seconds = time.perf_counter() - started
    _finish(process, work, "out", 0)
    again = time.perf_counter()
    _finish(_start(work, recipe, slides, "out", "--workers", "2", "-q"), work, "out", 0)
    return {
        "slides": count,
        "ms_per_slide": round(seconds / count * 1e3, 2),
        "seconds_to_find_all_done": round(time.perf_counter() - again, 1),
        "ledger_mb": round((work / "out/ledger.sqlite").stat().st_size / 1e6, 2),
        "client_mb_by_tenth_done": {key: round(rss / 1e6) for key, rss in memory.items()},
    }


def archive(work: Path, count: int, kills: int, seed: int) -> Facts:
    slides = work / "slides"
    slides.mkdir()
    expected = make_archive(slides, count)
    recipe = _recipe(work, "segment_or_die", "30s")
    options = ("--workers", "2", "--tries", "2", "--set", "compute.threads=1")
    started = time.perf_counter()
    _finish(_start(work, recipe, slides, "whole", *options), work, "whole", 3)
    whole_s = time.perf_counter() - started
    journal = work / "journal"
    journal.unlink()
    rng = random.Random(seed)
    for _ in range(kills):
        process = _start(work, recipe, slides, "killed", *options)
        time.sleep(rng.uniform(2, 2 * whole_s / kills))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"killed with {_done(work / 'killed')} slides done", file=sys.stderr)
    _finish(_start(work, recipe, slides, "killed", *options), work, "killed", 3)
    facts = {"slides": count, "kills": kills, "seconds_whole": round(whole_s, 1)}
    for name in ("whole", "killed"):
        facts[name] = _check(work / name, expected)
    same = results(work / "whole") == results(work / "killed")
    ended = {
        record["id"]: record["started"] + record["seconds"] for record in _records(work / "killed")
    }
    begun = [line.split() for line in journal.read_text().splitlines()]
    late = [name for name, when in begun if name in ended and float(when) > ended[name]]
    facts |= {"same_results": same, "begun_after_done": len(late), "begun": len(begun)}
    assert same
    assert not late
    return facts


def make_archive(folder: Path, count: int) -> dict[str, str]:
    """Write small slides, some bad; return the reason why each of the bad ones will fail."""
    bad = {f"corrupt{number}": "corrupt" for number in range(10)}
    bad |= {"crash0": "crash", "crash1": "crash", "hang0": "timeout"}
    for number in range(count - len(bad)):
        write_slide(folder / f"slide{number:04d}.tif", seed=number)
    for number, data in enumerate(broken_files(10, (folder / "slide0000.tif").read_bytes())):
        (folder / f"corrupt{number}.tif").write_bytes(data)
    for name in ("crash0", "crash1", "hang0"):
        (folder / f"{name}.tif").write_bytes(CRASH if name.startswith("crash") else HANG)
    return bad


def broken_files(count: int, whole: bytes) -> list[bytes]:
    """Files that others' fuzzers found, where GIGAVIM_TEST_DATA names some; else a good one cut."""
    from gigavim.errors import CorruptSlideError
    from gigavim.slides import open_slide

    logging.disable()  # what readers say of such files would fill the screen
    found = []
    for path in sorted(Path(os.environ.get("GIGAVIM_TEST_DATA", "")).glob("corrupt/*/*.tif*")):
        try:
            open_slide(path, mpp=0.5).close()
        except CorruptSlideError:
            found.append(path.read_bytes())
        except Exception:  # damaged in a way that has another name
            continue
    cut = [whole[: 200 + 40 * number] for number in range(count)]
    return [*found, *cut][:count]


def write_slide(path: Path, *, seed: int, side: int = 512) -> None:
    """White glass with a stained disc, at 0.5 um a pixel."""
    rng = np.random.default_rng(seed)
    pixels = np.full((side, side, 3), 244, np.uint8)
    y, x = np.ogrid[:side, :side]
    disc = (y - side / 2) ** 2 + (x - side / 2) ** 2 < (0.2 + 0.02 * (seed % 10)) ** 2 * side**2
    stain = np.clip(rng.normal((190, 120, 170), 25, (side, side, 3)), 0, 255).astype(np.uint8)
    pixels[disc] = stain[disc]
    tifffile.imwrite(
        path, pixels, tile=(128, 128), photometric="rgb", compression="deflate",
        resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
    )  # fmt: skip


def scaling(work: Path, count: int) -> Facts:
    slides = work / "slides"
    slides.mkdir()
    for number in range(count):
        write_slide(slides / f"slide{number:04d}.tif", seed=number, side=2048)
    recipe = _recipe(work, "segment_or_die", "10m")
    options = ("--set", "compute.threads=1", "--set", "tokens.num_workers=1", "-q")
    rates = {}
    for workers in (1, 2):
        out = f"out{workers}"
        run = _start(work, recipe, slides, out, "--workers", str(workers), *options)
        _finish(run, work, out, 0)
        # Of the time in which all workers work: each one's first slide makes it warm.
        ends = sorted(record["started"] + record["seconds"] for record in _records(work / out))
        rates[workers] = (len(ends) - 2 * workers + 1) / (ends[-workers] - ends[workers - 1])
    return {
        "slides": count,
        "slides_per_minute": {key: round(60 * rate, 2) for key, rate in rates.items()},
        "two_over_one": round(rates[2] / rates[1], 2),
        "two_over_one_of_bare_loops": ceiling(),
    }


def ceiling() -> float:
    """What a second process adds on this machine at this moment, whatever the work."""
    code = "import time; t = time.time(); sum(i * i for i in range(10**7)); print(time.time() - t)"

    def seconds(processes: int) -> float:
        running = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
            for _ in range(processes)
        ]
        return max(float(process.communicate()[0]) for process in running)

    return round(2 * seconds(1) / seconds(2), 2)


def results(out: Path) -> dict[str, Any]:
    """What must not depend on how often a run was killed: all but times and provenance."""
    found: dict[str, Any] = {}
    for path in sorted(out.glob("slides/*/*")):
        if path.name.endswith((".labels.ome.tif", ".overlay.png")):
            found[path.name] = path.read_bytes()
        elif path.name.endswith(".geojson"):
            found[path.name] = json.loads(path.read_text())["features"]
        elif path.name.endswith(".summary.json"):
            found[path.name] = json.loads(path.read_text())["classes"]
    return found


def _check(out: Path, expected: dict[str, str]) -> Facts:
    """All slides done but the bad ones, which failed for the right reasons."""
    with closing(sqlite3.connect(out / "ledger.sqlite")) as db:
        states = Counter(row[0] for row in db.execute("SELECT state FROM slides"))
        reasons = dict(db.execute("SELECT id, reason FROM slides WHERE state = 'failed'"))
        twice = db.execute(
            "SELECT count(*) FROM (SELECT id FROM attempts WHERE outcome IN ('done', 'found')"
            " GROUP BY id HAVING count(*) > 1)"
        ).fetchone()[0]
    assert reasons == expected, reasons
    assert not twice
    left = [path.name for path in (out / "slides").iterdir() if path.name.startswith(".")]
    assert not left, left
    return {"states": dict(states), "reasons": dict(Counter(reasons.values()))}


def _records(out: Path) -> list[Facts]:
    return [json.loads(path.read_text()) for path in out.glob("slides/*/*.done.json")]


def _done(out: Path) -> int:
    return len(list(out.glob("slides/[!.]*/*.done.json")))


def _recipe(work: Path, task: str, timeout: str) -> Path:
    path = work / f"{task}.toml"
    path.write_text(RECIPE.format(task=task, timeout=timeout))
    return path


def _start(
    work: Path, recipe: Path, slides: Path, out: str, *options: str
) -> "subprocess.Popen[bytes]":
    """A run of the command line in a process group of its own."""
    root = str(Path(__file__).parent.parent)
    paths = [root, os.environ.get("PYTHONPATH", "")]
    with (work / f"{out}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "gigavim", "batch", str(recipe), str(slides), "-o",
             str(work / out), *options],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)},
            stdout=subprocess.DEVNULL, stderr=log, start_new_session=True,
        )  # fmt: skip


def _finish(process: "subprocess.Popen[bytes]", work: Path, out: str, code: int) -> None:
    """Wait for a run, which must end with a code."""
    if process.wait() != code:
        log = (work / f"{out}.log").read_text(errors="replace")
        raise SystemExit(f"the run ended with {process.returncode}, not {code}:\n{log[-5000:]}")


if __name__ == "__main__":
    main()
