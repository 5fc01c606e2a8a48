"""Seamless noise that can be asked for at any point of an endless plane, compiled with numba.

Everything a painter draws comes from integer hashes of world coordinates, so that a region looks
the same whichever neighbours are rendered with it, and an image of any size needs little memory.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])

_MIX_X = np.uint64(0x9E3779B97F4A7C15)
_MIX_Y = np.uint64(0xC2B2AE3D27D4EB4F)
_MIX_SEED = np.uint64(0x165667B19E3779F9)
_MIX_LAST = np.uint64(0xD6E8FEB86659FD93)
_SHIFT = np.uint64(32)
_TO_UNIT = np.uint64(11)
_TO_SIXTEEN = np.uint64(60)
_GRADIENT_X = np.cos(np.arange(16) * np.pi / 8)
_GRADIENT_Y = np.sin(np.arange(16) * np.pi / 8)


def compiled(function: Function) -> Function:
    """`numba.njit` without the GIL, keeping the function's type.

    Not cached on disk: numba would not notice a change in a function that another file calls.
    """
    return cast(Function, numba.njit(nogil=True)(function))


@compiled
def hash_cell(x: int, y: int, seed: int) -> np.uint64:
    """64 well-mixed bits of an integer cell."""
    mixed = np.uint64(x) * _MIX_X ^ np.uint64(y) * _MIX_Y ^ np.uint64(seed) * _MIX_SEED
    mixed = (mixed ^ (mixed >> _SHIFT)) * _MIX_LAST
    mixed = (mixed ^ (mixed >> _SHIFT)) * _MIX_X
    return mixed ^ (mixed >> _SHIFT)


@compiled
def uniform(x: int, y: int, seed: int) -> float:
    """A number in [0, 1) that belongs to an integer cell."""
    bits = hash_cell(x, y, seed) >> _TO_UNIT
    return float(bits) * (1.0 / 9007199254740992.0)


@compiled
def _corner(x: int, y: int, seed: int, dx: float, dy: float) -> float:
    i = hash_cell(x, y, seed) >> _TO_SIXTEEN
    return float(_GRADIENT_X[i] * dx + _GRADIENT_Y[i] * dy)


@compiled
def perlin(x: float, y: float, seed: int) -> float:
    """Gradient noise of unit wavelength, about -0.7 to 0.7 (Perlin, SIGGRAPH 2002)."""
    ix = int(np.floor(x))
    iy = int(np.floor(y))
    dx = x - ix
    dy = y - iy
    u = dx * dx * dx * (dx * (dx * 6.0 - 15.0) + 10.0)
    v = dy * dy * dy * (dy * (dy * 6.0 - 15.0) + 10.0)
    top = (1.0 - u) * _corner(ix, iy, seed, dx, dy) + u * _corner(ix + 1, iy, seed, dx - 1.0, dy)
    low = (1.0 - u) * _corner(ix, iy + 1, seed, dx, dy - 1.0) + u * _corner(
        ix + 1, iy + 1, seed, dx - 1.0, dy - 1.0
    )
    return 1.4 * ((1.0 - v) * top + v * low)


@compiled
def fbm(x: float, y: float, octaves: int, seed: int) -> float:
    """A sum of `octaves` of Perlin noise, each twice as fine and half as strong."""
    total = 0.0
    strength = 1.0
    for i in range(octaves):
        total += strength * perlin(x, y, seed + 7919 * i)
        x *= 2.0
        y *= 2.0
        strength *= 0.5
    return total


@compiled
def smoothstep(low: float, high: float, value: float) -> float:
    """0 at `low`, 1 at `high` (which may be the smaller), smooth between, flat beyond."""
    t = min(max((value - low) / (high - low), 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)
