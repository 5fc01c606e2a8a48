"""A store on object storage (moto's server plays S3): read by window, and no more than that."""

import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gigavim
from gigavim.config import Settings
from gigavim.errors import StoreError
from gigavim.model.checkpoint import save_model
from gigavim.model.config import VimConfig
from gigavim.model.segmentation import SegmentationModel
from gigavim.model.vim import Vim
from gigavim.store import layout

moto_server = pytest.importorskip("moto.server", reason="moto is not installed")
s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a server that speaks S3, which s3fs finds in the environment."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": address,
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        s3fs.S3FileSystem.clear_instance_cache()
        # A bucket of its own: all of moto's servers in a process share them.
        s3fs.S3FileSystem(use_listings_cache=False).mkdir("stores")
        yield address
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module")
def pair(s3, make_card, tmp_path_factory) -> tuple[Any, str]:
    """A store of 4,096 tokens in 64 chunks on the disk, and its URL on S3."""
    import tifffile
    import torch

    folder = tmp_path_factory.mktemp("remote")
    torch.manual_seed(5)
    config = VimConfig(
        d_model=32, depth=1, patch_px=8, stride_px=8, class_token="none", pooling="mean",
        position="block", grid_hw=(4, 4),
    )  # fmt: skip
    save_model(folder / "model", SegmentationModel(Vim(config), 3), make_card(config))
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    tifffile.imwrite(
        folder / "slide.tif", pixels, tile=(256, 256), photometric="rgb", compression="deflate",
        resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
    )  # fmt: skip
    settings = Settings().with_flags(
        model={"name": str(folder / "model")}, tokens={"tissue": "none"},
        compute={"precision": "fp32"}, output={"directory": str(folder / "out")},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK_BYTES", 4096)
        store = gigavim.embed(folder / "slide.tif", settings=settings).open()
    assert store.embeddings.chunks == (64, 32)
    url = "s3://stores/slide.embeddings.zarr"
    s3fs.S3FileSystem(use_listings_cache=False).put(store.location, url, recursive=True)
    return store, url


class Requests:
    """What was fetched: bytes by key, out of the calls that s3fs makes of S3."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.fetched: list[tuple[str, int]] = []
        original = s3fs.S3FileSystem._cat_file

        async def counted(filesystem, path, *arguments, **options):
            data = await original(filesystem, path, *arguments, **options)
            self.fetched.append((path, len(data)))
            return data

        patch.setattr(s3fs.S3FileSystem, "_cat_file", counted)

    def bytes_of(self, pattern: str) -> list[int]:
        return [size for path, size in self.fetched if re.search(pattern, path)]


def test_a_window_is_the_same_from_s3(pair):
    local, url = pair
    remote = gigavim.open_embeddings(url)
    assert (remote.info, len(remote)) == (local.info, len(local))
    for window in ((100, 60, 90, 70), (0, 0, 512, 512), (-40, 500, 100, 100), (600, 0, 9, 9)):
        ours, theirs = local.window(*window), remote.window(*window)
        for name in ("places", "embeddings", "row_col", "xy_level0"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    assert np.array_equal(remote.at_level0(77, 300), local.at_level0(77, 300))
    assert np.array_equal(remote.slide_embedding, local.slide_embedding)
    assert np.array_equal(remote.labels.read(3, 90, 7, 200), local.labels.read(3, 90, 7, 200))
    assert np.array_equal(pickle.loads(pickle.dumps(remote)).numpy(), local.numpy())


def test_a_window_fetches_its_chunks_only(pair, monkeypatch):
    local, url = pair
    remote = gigavim.open_embeddings(url)
    requests = Requests(monkeypatch)
    window = remote.window(96, 64, 60, 28)
    chunks = len(np.unique(window.places // 64))
    assert 0 < chunks <= 8  # of 64
    shard = local.embeddings.shards[0]
    index_bytes = shard // 64 * 16 + 4
    embeddings = requests.bytes_of(r"tokens/embeddings/c/")
    shards = len(np.unique(window.places // shard))
    assert embeddings.count(index_bytes) == shards
    assert len(embeddings) == shards + chunks
    files = (Path(local.location) / "tokens" / "embeddings" / "c").rglob("*")
    assert sum(embeddings) < sum(file.stat().st_size for file in files if file.is_file()) / 4
    assert not requests.bytes_of(r"(pooled|map|thumbnail|tissue)/")


def test_other_file_systems_and_their_options(pair):
    local, _ = pair
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(local.location, "/kept.embeddings.zarr", recursive=True)
    found = gigavim.open_embeddings("memory://kept.embeddings.zarr").window(100, 60, 90, 70)
    assert np.array_equal(found.embeddings, local.window(100, 60, 90, 70).embeddings)
    memory.rm("/kept.embeddings.zarr", recursive=True)


def test_options_of_the_file_system_are_kept(pair, s3, monkeypatch):
    local, url = pair
    options = {"key": "testing", "secret": "testing", "client_kwargs": {"endpoint_url": s3}}
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    remote = pickle.loads(pickle.dumps(gigavim.open_embeddings(url, **options)))
    assert np.array_equal(remote.at_level0(77, 300), local.at_level0(77, 300))


def test_what_is_not_on_s3_says_so(s3):
    assert os.environ["AWS_ENDPOINT_URL"] == s3
    with pytest.raises(StoreError, match="there is no embedding store"):
        gigavim.open_embeddings("s3://stores/nothing.embeddings.zarr")
    with pytest.raises(StoreError, match="there is no embedding store"):
        gigavim.open_embeddings("s3://nobucket/nothing.embeddings.zarr")
