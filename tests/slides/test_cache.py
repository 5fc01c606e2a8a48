import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gigavim.slides.buffers import SMALL_BYTES, BufferPool
from gigavim.slides.cache import TileCache
from gigavim.slides.handles import ThreadHandles


def tile(value=0):
    return np.full((10, 10, 3), value, np.uint8)


def test_cache_is_bounded_and_drops_the_oldest():
    cache = TileCache(max_bytes=900)
    for key in range(5):
        cache.get(key, lambda: tile(), 1, 100)
    assert [key for key in range(5) if cache.find(key) is not None] == [2, 3, 4]
    cache.get("large", lambda: np.zeros((100, 100, 3), np.uint8), 1, 10_000)
    assert cache.find("large") is None


def test_a_used_up_tile_is_let_go():
    cache = TileCache()
    for _ in range(4):
        cache.get(0, lambda: tile(), 25, 100)
    assert cache.find(0) is None


def test_two_threads_decode_a_tile_once():
    cache, calls, gate = TileCache(), [], threading.Event()

    def decode():
        calls.append(1)
        gate.wait(5)
        return tile(7)

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(cache.get, 0, decode, 1, 100) for _ in range(4)]
        gate.set()
        assert all((one.result() == 7).all() for one in waiting)
    assert len(calls) == 1


def test_an_error_is_not_kept():
    cache = TileCache()

    def fail():
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        cache.get(0, fail, 1, 100)
    assert (cache.get(0, lambda: tile(3), 1, 100) == 3).all()


def test_a_buffer_is_used_again_only_when_nobody_holds_it():
    pool = BufferPool()
    first = pool.empty(1000, 1000)
    address = first.ctypes.data
    part = first[10:20]
    del first
    assert pool.empty(1000, 1000).ctypes.data != address
    del part
    held = [pool.empty(1000, 1000) for _ in range(2)]
    assert address in {one.ctypes.data for one in held}
    assert len({one.ctypes.data for one in held}) == 2
    assert pool.empty(3, 5).nbytes < SMALL_BYTES


def test_a_pool_keeps_so_much_and_no_more():
    pool = BufferPool(max_bytes=10_000_000)
    held = [pool.empty(1000, 1000) for _ in range(9)]
    assert pool.free == []
    del held
    assert 0 < sum(memory.size for memory in pool.free) <= pool.max_bytes
    # Full of memory of another size, it makes room for what is asked for now.
    addresses = set()
    for _ in range(6):
        small = pool.empty(600, 600)
        addresses.add(small.ctypes.data)
        del small
    assert len(addresses) < 6
    assert sum(memory.size for memory in pool.free) <= pool.max_bytes
    assert pool.empty(2000, 2000).shape == (2000, 2000, 3)


def test_threads_never_get_the_same_memory():
    pool = BufferPool()

    def check(seed):
        array = pool.empty(700, 500 + seed % 3)
        array[:] = seed % 251
        time.sleep(0.001)
        return bool((array == seed % 251).all())

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(check, range(300)))


def test_handles_are_per_thread_and_reopened_after_a_drop():
    class Handle:
        closed = False

        def close(self):
            self.closed = True

    handles = ThreadHandles(Handle)
    mine = handles.get()
    assert handles.get() is mine
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(handles.get).result()
        assert other is not mine
    handles.drop()
    assert mine.closed
    again = handles.get()
    assert again is not mine
    handles.close()
    assert again.closed
    assert other.closed
