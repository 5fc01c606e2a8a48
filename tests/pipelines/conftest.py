"""Tasks that do nothing, or go wrong in every way, and archives of small files for them."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

FAULTY = '''
"""A task whose slides are text files; their first word says what happens to them."""
import ctypes, os, time
from pathlib import Path
from types import SimpleNamespace


def run(path, *, settings, stem, progress):
    word, *rest = Path(path).read_text().split()
    folder = Path(settings.output.directory)
    if word == "segfault":
        ctypes.string_at(0)
    elif word == "hang":
        ctypes.PyDLL(None).sleep(1000)  # with the interpreter's lock held, as a decoder may
    elif word == "hoard":
        hoard = []
        while True:
            hoard.append(bytearray(20_000_000))
            time.sleep(0.01)
    elif word == "unwell":
        raise OSError(5, "Input/output error", str(path))
    elif word == "unwell-once":
        marker = Path(rest[0])
        if not marker.exists():
            marker.touch()
            raise OSError(5, "Input/output error", str(path))
    elif word == "defect":
        raise KeyError("x")
    elif word == "slow":
        (Path(rest[1]) / f"{stem}.{os.getpid()}").touch()
        time.sleep(float(rest[0]))
    elif word == "exit":
        raise SystemExit(0)
    elif word == "interrupt":
        raise KeyboardInterrupt
    elif word == "nothing":
        return None
    elif word == "outside":
        return SimpleNamespace(outputs={"x": Path(path)}, summary={})
    out = folder / f"{stem}.txt"
    summary = {"word": word}
    if word == "odd":
        summary = {
            1: {2}, "classes": [{"name": "a", "fraction": float("nan")}, {"fraction": 1}, "abc"],
            "tokens": "many", "coverage": [1], "warnings": 5, "mpp": float("inf"), "width_px": 1e30,
            "map": "none", "saturation": "high",
        }
    out.write_text(f"{word} {settings.input.slide_mpp} {settings.tokens.tissue}")
    return SimpleNamespace(outputs={"text": out}, summary=summary)
'''
RECIPE = """
[recipe]
task = "{name}:run"
[batch]
timeout = "60s"
retry_wait = "0.1s"
tries = 2
"""


@pytest.fixture
def own_task(tmp_path, monkeypatch) -> Callable[[str, str], Path]:
    """Make a recipe of a task of one's own, by the source of a module with a function `run`."""
    folder = tmp_path / "plugin"
    folder.mkdir()
    # Workers find it as they would a user's.
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    monkeypatch.syspath_prepend(str(folder))

    def make(name: str, source: str) -> Path:
        (folder / f"{name}.py").write_text(source)
        sys.modules.pop(name, None)
        path = tmp_path / f"{name}.toml"
        path.write_text(RECIPE.format(name=name))
        return path

    return make


@pytest.fixture
def faulty(own_task) -> Path:
    """A recipe for slides that are text files, whose first words say what becomes of them."""
    return own_task("faulty", FAULTY)


@pytest.fixture
def make_tissue() -> Callable[[int], np.ndarray]:
    """Pixels of white glass with a stained disc: (300, 420, 3) uint8, different for each seed."""

    def make(seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        pixels = np.full((300, 420, 3), 244, np.uint8)
        y, x = np.ogrid[:300, :420]
        disc = (y - 150) ** 2 + (x - 210) ** 2 < (70 + 5 * (seed % 8)) ** 2
        stain = np.clip(random.normal((190, 120, 170), 25, pixels.shape), 0, 255)
        pixels[disc] = stain.astype(np.uint8)[disc]
        return pixels

    return make


@pytest.fixture
def make_slides(tmp_path) -> Callable[..., Path]:
    def make(folder: str = "slides", **words: str) -> Path:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        for name, text in words.items():
            (place / f"{name}.svs").write_text(text)
        return place

    return make
