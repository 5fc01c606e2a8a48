"""Decoded tiles that more than one request needs, shared by threads and bounded in bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tile = npt.NDArray[np.uint8]

DEFAULT_CACHE_BYTES = 192 << 20


@dataclass(slots=True)
class _Entry:
    tile: Tile
    served_px: int = 0


class TileCache:
    """A least-recently-used cache; a tile asked for by two threads at once is decoded once."""

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._tiles: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._pending: dict[Hashable, Future[Tile]] = {}
        self._bytes = 0

    def find(self, key: Hashable) -> Tile | None:
        """Return the tile if it is here."""
        with self._lock:
            entry = self._tiles.get(key)
            return entry.tile if entry is not None else None

    def holds_any(self, keys: Iterable[Hashable]) -> bool:
        """Return whether any of the tiles is here."""
        if not self._tiles:
            return False
        with self._lock:
            return any(key in self._tiles for key in keys)

    def get(self, key: Hashable, decode: Callable[[], Tile], use_px: int, whole_px: int) -> Tile:
        """Return the tile, decoding it if it is not here; an error of `decode` is not kept.

        Args:
            key: which tile.
            decode: gives the tile.
            use_px: pixels of it that this request uses.
            whole_px: pixels of it that lie in the image. Blocks that cut an image up use a tile's
                pixels once each; when all are used, the tile is let go and its memory used again.
        """
        with self._lock:
            entry = self._tiles.get(key)
            if entry is not None:
                self._use(key, entry, use_px, whole_px)
                return entry.tile
            future = self._pending.get(key)
            mine = future is None
            if future is None:
                future = self._pending[key] = Future()
        if not mine:
            tile = future.result()
            with self._lock:
                entry = self._tiles.get(key)
                if entry is not None:
                    self._use(key, entry, use_px, whole_px)
            return tile
        try:
            tile = decode()
        except BaseException as error:
            with self._lock:
                del self._pending[key]
            future.set_exception(error)
            raise
        with self._lock:
            del self._pending[key]
            self._keep(key, tile)
            if key in self._tiles:
                self._use(key, self._tiles[key], use_px, whole_px)
        future.set_result(tile)
        return tile

    def clear(self) -> None:
        """Forget every tile."""
        with self._lock:
            self._tiles.clear()
            self._bytes = 0

    def _use(self, key: Hashable, entry: _Entry, use_px: int, whole_px: int) -> None:
        entry.served_px += use_px
        if entry.served_px == whole_px:
            del self._tiles[key]
            self._bytes -= entry.tile.nbytes
        else:
            self._tiles.move_to_end(key)

    def _keep(self, key: Hashable, tile: Tile) -> None:
        if tile.nbytes > self.max_bytes:
            return
        self._tiles[key] = _Entry(tile)
        self._bytes += tile.nbytes
        while self._bytes > self.max_bytes:
            _, dropped = self._tiles.popitem(last=False)
            self._bytes -= dropped.tile.nbytes
