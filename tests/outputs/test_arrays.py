"""What TensorStore writes, zarr reads."""

import errno

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BloscShuffle
from zarr.storage import MemoryStore

from gigavim.errors import OutputError
from gigavim.outputs.arrays import ArrayWriter, write_array
from gigavim.outputs.atomic import explained

CODEC = BloscCodec(cname="lz4", clevel=1, shuffle=BloscShuffle.bitshuffle)


def made(folder, shape, dtype, *, chunks, shards=None, fill=0):
    return zarr.create_group(folder).create_array(
        "a", shape=shape, dtype=dtype, chunks=chunks, shards=shards, compressors=CODEC,
        fill_value=fill,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "int64", "uint8"])
@pytest.mark.parametrize("shards", [None, (8, 6)], ids=["chunks", "shards"])
@pytest.mark.parametrize("shape", [(1, 1), (8, 6), (17, 7), (33, 13)], ids=str)
def test_zarr_reads_what_was_written(tmp_path, shape, shards, dtype):
    fill = np.nan if dtype.startswith("float") else 3
    array = made(tmp_path, shape, dtype, chunks=(4, 3), shards=shards, fill=fill)
    values = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    writer = ArrayWriter(array)
    for start in range(0, shape[0], 8):
        writer.write(slice(start, min(start + 8, shape[0])), values[start : start + 8])
    read = zarr.open_array(tmp_path / "a", mode="r")
    assert read.dtype == dtype
    assert np.array_equal(read[:], values)
    writer.write((slice(0, 1), slice(0, 1)), np.full((1, 1), 9, dtype))
    assert read[0, 0] == 9
    assert np.array_equal(read[1:], values[1:])


def test_what_is_not_written_is_the_fill_value(tmp_path):
    array = made(tmp_path, (16, 6), "float16", chunks=(4, 3), shards=(8, 6), fill=np.nan)
    values = np.full((8, 6), np.nan, np.float16)
    ArrayWriter(array).write(slice(0, 8), values)
    assert np.isnan(array[:]).all()
    assert not [path for path in (tmp_path / "a" / "c").rglob("*") if path.is_file()]


def test_the_same_bytes_every_time(tmp_path):
    values = np.random.default_rng(0).integers(0, 5, (64, 30), np.uint8)
    for name in ("one", "two"):
        array = made(tmp_path / name, values.shape, "uint8", chunks=(4, 3), shards=(32, 30))
        write_array(array, values)
    one, two = (sorted((tmp_path / name / "a" / "c").rglob("*")) for name in ("one", "two"))
    files = [(a, b) for a, b in zip(one, two, strict=True) if a.is_file()]
    assert files
    assert all(a.read_bytes() == b.read_bytes() for a, b in files)


def test_what_the_disk_refuses_is_an_error_of_the_system(tmp_path):
    array = made(tmp_path, (16, 6), "uint8", chunks=(4, 3))
    writer = ArrayWriter(array)
    (tmp_path / "a" / "c").write_text("in the way")
    with pytest.raises(OSError, match=r"a'$") as caught:
        writer.write(..., np.ones((16, 6), np.uint8))
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)
    with pytest.raises(ValueError, match="local disk"):
        ArrayWriter(zarr.create_array(MemoryStore(), shape=(3,), dtype="uint8"))


def test_errors_without_a_number_say_what_happened(tmp_path):
    store = tmp_path / "a.embeddings.zarr"
    array = made(store, (16, 6), "uint8", chunks=(4, 3), shards=(8, 6))
    writer = ArrayWriter(array)
    with pytest.raises(ValueError, match="mismatch"):  # of the caller, and not of the disk
        writer.write(..., np.ones((17, 6), np.uint8))
    writer.write(..., np.ones((16, 6), np.uint8))
    (store / "a" / "c" / "0" / "0").write_bytes(b"cut")
    with pytest.raises(OutputError) as caught, explained(store):
        writer.write((slice(0, 1), slice(0, 1)), np.ones((1, 1), np.uint8))
    message = str(caught.value)
    assert message.startswith(f"{store}: cannot be written: a/c/0/0: Existing shard has size of 3")
    assert message.endswith("; check the disk, or choose another output folder")
    assert "\n" not in message
    for text, told in (("{", "a/zarr.json: Invalid JSON;"), (None, "a/zarr.json: does not exist;")):
        (store / "a" / "zarr.json").unlink()
        if text is not None:
            (store / "a" / "zarr.json").write_text(text)
        with pytest.raises(OutputError, match=told), explained(store):
            ArrayWriter(array)
        (store / "a" / "zarr.json").touch()
