"""An image of any height as a stream of full-width bands, rendered by a few threads."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

MOST_THREADS = 8  # each holds the planes of one square, about 100 MB

# (x, y, width, height) -> pixels (height, width, 3) uint8, labels (height, width) uint8
Render = Callable[[int, int, int, int], tuple[np.ndarray, np.ndarray]]


def render_bands(
    render: Render,
    width: int,
    height: int,
    *,
    band_px: int,
    progress: Callable[[int], object],
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (y, pixels (h, width, 3), labels (h, width)) from top to bottom, `band_px` rows each.

    Bands are cut into squares that are rendered in parallel; `progress` is told the pixels done.
    """
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS)) as pool:
        for y in range(0, height, band_px):
            tall = min(band_px, height - y)
            xs = range(0, width, band_px)
            jobs = [pool.submit(render, x, y, min(band_px, width - x), tall) for x in xs]
            pixels = np.empty((tall, width, 3), dtype=np.uint8)
            labels = np.empty((tall, width), dtype=np.uint8)
            for x, job in zip(xs, jobs):
                part, part_labels = job.result()
                pixels[:, x : x + part.shape[1]] = part
                labels[:, x : x + part.shape[1]] = part_labels
                progress(part_labels.size)
            yield y, pixels, labels
