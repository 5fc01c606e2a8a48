"""Bags of an archive of stores, and the examples of docs/ that use them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from torch.utils.data import DataLoader

import gigavim
from gigavim.config import Settings
from gigavim.errors import StoreError
from gigavim.store.dataset import EmbeddingBags, find_stores

ROOT = Path(__file__).parents[2]


def write_field(path: Path, spots: bool, seed: int) -> None:
    """Grey noise, with or without dark spots."""
    random = np.random.default_rng(seed)
    pixels = random.integers(150, 200, (224, 256, 3), dtype=np.uint8)
    if spots:
        for y, x in random.integers(10, 200, (12, 2)):
            pixels[y : y + 14, x : x + 14] = (60, 30, 90)
    tifffile.imwrite(
        path, pixels, photometric="rgb", resolution=(2e4, 2e4), resolutionunit="CENTIMETER"
    )


@pytest.fixture(scope="module")
def archive(tmp_path_factory, make_exact_model):
    folder = tmp_path_factory.mktemp("archive")
    settings = Settings().with_flags(
        model={"name": str(make_exact_model(4, 4))}, tokens={"tissue": "none"},
        compute={"threads": 1}, output={"directory": str(folder / "stores")},
    )  # fmt: skip
    rows = ["slide,label,split"]
    for number in range(10):
        path = folder / f"s{number}.tif"
        write_field(path, bool(number % 2), number)
        gigavim.embed(path, settings=settings)
        rows.append(f"s{number},{number % 2},{'train' if number < 6 else 'test'}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_what_a_killed_run_left_is_no_store(tmp_path):
    for name in (".partial-0a1b2c3d-a.embeddings.zarr", "deep/b.embeddings.zarr"):
        (tmp_path / name).mkdir(parents=True)
    assert [path.name for path in find_stores(tmp_path)] == ["b.embeddings.zarr"]


def test_bags_hold_the_pooled_embeddings(archive):
    stores = find_stores(archive)
    assert [path.name for path in stores] == [f"s{n}.embeddings.zarr" for n in range(10)]
    bags = EmbeddingBags(stores, [n % 2 for n in range(10)], pool=1)
    bag = bags[3]
    store = gigavim.open_embeddings(stores[3])
    assert bag.name == "s3.tif"
    assert float(bag.label) == 1
    assert np.array_equal(bag.features.numpy(), store.numpy().astype(np.float32))
    assert np.array_equal(bag.xy_level0[0].numpy(), store.xy_level0[0] + 2)
    assert len(EmbeddingBags(stores, pool=1, limit=20)[0].features) == 20
    assert EmbeddingBags(stores, pool=1)[0].label.isnan()


def test_bags_load_in_worker_processes(archive):
    bags = EmbeddingBags(find_stores(archive)[:3], pool=1)
    names = [bag.name for bag in DataLoader(bags, batch_size=None, num_workers=1)]
    assert names == ["s0.tif", "s1.tif", "s2.tif"]


def test_what_cannot_be_bags(archive, tmp_path):
    with pytest.raises(StoreError, match="no store"):
        EmbeddingBags(find_stores(tmp_path))
    with pytest.raises(StoreError, match="10 stores have 1 labels"):
        EmbeddingBags(find_stores(archive), [1])
    with pytest.raises(StoreError, match="pooled by 16"):
        EmbeddingBags(find_stores(archive))[0]


def test_the_example_of_attention_learns(archive):
    command = [
        sys.executable, ROOT / "docs/examples/mil.py", archive / "stores", archive / "labels.csv",
        "--pool", 1, "--epochs", 15,
    ]  # fmt: skip
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy 1.000 on 4 slides" in done.stdout
